#include "cuda/copy_engine.hpp"

#include <algorithm>
#include <utility>

#include "cuda/kernels/images.hpp"

namespace dwdp::cuda {
namespace {

CUdeviceptr device_pointer(const void* pointer) {
  return static_cast<CUdeviceptr>(reinterpret_cast<std::uintptr_t>(pointer));
}

// Any order of access to the sources will do, because weights do not change.
CUmemcpyAttributes copy_attributes(bool overlap) {
  CUmemcpyAttributes attributes{};
  attributes.srcAccessOrder = CU_MEMCPY_SRC_ACCESS_ORDER_ANY;
  attributes.flags = overlap ? CU_MEMCPY_FLAG_PREFER_OVERLAP_WITH_COMPUTE : CU_MEMCPY_FLAG_DEFAULT;
  return attributes;
}

}  // namespace

CopyEngine::CopyEngine(std::shared_ptr<Device> device, std::size_t num_lanes,
                       std::size_t lane_depth, bool overlap, std::size_t demand_blocks)
    : device_(std::move(device)),
      num_lanes_(num_lanes),
      lane_depth_(lane_depth),
      demand_blocks_(static_cast<unsigned int>(demand_blocks)),
      attributes_(copy_attributes(overlap)),
      last_nodes_(num_lanes),
      demand_timer_(device_->context(), /*threshold_s=*/0.0) {
  DWDP_CHECK(num_lanes > 0 && lane_depth > 0,
             "a copy engine needs at least one lane of depth one, not ", num_lanes,
             " lanes of depth ", lane_depth);
  constexpr std::size_t kMaxBlocks = 65535;
  DWDP_CHECK(demand_blocks > 0 && demand_blocks <= kMaxBlocks, "fetching on demand takes 1 to ",
             kMaxBlocks, " blocks, not ", demand_blocks);
  const std::size_t num_streams = num_lanes * lane_depth;
  for (std::size_t i = 0; i < num_streams; ++i) {
    streams_.push_back(make_stream(device_->context()));
    stream_events_.push_back(make_event(device_->context()));
  }
  if (num_streams > 1) streams_.push_back(make_stream(device_->context()));
}

CopyEngine::~CopyEngine() noexcept { close(); }

bool CopyEngine::uses_batch_copies() const noexcept {
  return driver().memcpy_batch_async_13 != nullptr || driver().memcpy_batch_async_12 != nullptr;
}

CUstream CopyEngine::join_stream() const noexcept { return streams_.back().get(); }

std::shared_ptr<const Fetch> CopyEngine::prepare(
    std::vector<std::vector<Copy>> lanes,
    std::vector<std::shared_ptr<const void>> keep_mapped) const {
  DWDP_CHECK(lanes.size() <= num_lanes_, "a fetch of ", lanes.size(),
             " lanes does not fit a copy engine of ", num_lanes_);
  return std::make_shared<const Fetch>(std::move(lanes), lane_depth_, std::move(keep_mapped));
}

void CopyEngine::submit(const std::shared_ptr<const Fetch>& fetch, Event* after, Event& done) {
  DWDP_CHECK(fetch->batches().size() <= num_lanes_ * lane_depth_, "a fetch for ",
             fetch->batches().size(), " streams does not fit a copy engine of ", num_lanes_,
             " lanes of depth ", lane_depth_);
  const ContextGuard guard(*device_->context());
  const std::lock_guard<std::mutex> lock(mutex_);
  DWDP_CHECK(!closed_, "a fetch of ", fetch->num_bytes(),
             " bytes was submitted to a closed copy engine");
  Event::Dependency dependency;
  if (after != nullptr) dependency = after->dependency();
  if (dependency.captured) {
    submit_to_graph(fetch, *std::move(dependency.captured), done);
  } else {
    submit_to_streams(*fetch, dependency.event, done);
  }
}

void CopyEngine::submit_to_streams(const Fetch& fetch, CUevent after, Event& done) {
  const auto wait = [this](CUstream stream, CUevent event) {
    DWDP_CUDA(StreamWaitEvent, (stream, event, CU_EVENT_WAIT_DEFAULT), "on ", device_->described());
  };
  const CUstream join = join_stream();
  // An empty fetch has nothing but its place in the order.
  if (after != nullptr && fetch.num_slices() == 0) wait(join, after);
  for (std::size_t i = 0; i < fetch.batches().size(); ++i) {
    const Batch& batch = fetch.batches()[i];
    if (batch.sizes.empty()) continue;
    const CUstream stream = streams_[i].get();
    if (after != nullptr) wait(stream, after);
    copy_batch(batch, stream);
    if (stream == join) continue;
    const CUevent copied = stream_events_[i].get();
    DWDP_CUDA(EventRecord, (copied, stream), "after a copy on ", device_->described());
    wait(join, copied);
  }
  done.record(join);
}

void CopyEngine::copy_batch(const Batch& batch, CUstream stream) const {
  // The driver reads the arrays, though it does not say so in their types.
  auto* const dsts = const_cast<CUdeviceptr*>(batch.dsts.data());
  auto* const srcs = const_cast<CUdeviceptr*>(batch.srcs.data());
  auto* const sizes = const_cast<std::size_t*>(batch.sizes.data());
  const std::size_t count = batch.sizes.size();
  CUmemcpyAttributes attributes = attributes_;
  std::size_t first_of_attributes = 0;
  CUresult result = CUDA_SUCCESS;
  if (driver().memcpy_batch_async_13 != nullptr) {
    result = driver().memcpy_batch_async_13(dsts, srcs, sizes, count, &attributes,
                                            &first_of_attributes, 1, stream);
  } else if (driver().memcpy_batch_async_12 != nullptr) {
    std::size_t failed = 0;
    result = driver().memcpy_batch_async_12(dsts, srcs, sizes, count, &attributes,
                                            &first_of_attributes, 1, &failed, stream);
  } else {
    for (std::size_t i = 0; i < count; ++i) {
      DWDP_CUDA(MemcpyAsync, (dsts[i], srcs[i], sizes[i], stream), sizes[i], " bytes on ",
                device_->described());
    }
  }
  if (result != CUDA_SUCCESS) {
    throw driver_error("cuMemcpyBatchAsync", result,
                       concat(count, " slices on ", device_->described()));
  }
}

void CopyEngine::submit_to_graph(const std::shared_ptr<const Fetch>& fetch,
                                 CapturedGeneration generation, Event& done) {
  captured_.insert(fetch);
  if (capture_id_ != generation.id) {
    capture_id_ = generation.id;
    std::fill(last_nodes_.begin(), last_nodes_.end(), nullptr);
  }
  const auto& chains = fetch->chains();
  std::vector<CUgraphNode> leaves;
  for (std::size_t lane = 0; lane < chains.size(); ++lane) {
    if (chains[lane].empty()) continue;
    std::vector<CUgraphNode> dependencies = generation.nodes;
    if (last_nodes_[lane] != nullptr) add_dependency(dependencies, last_nodes_[lane]);
    for (const Copy& copy : chains[lane]) {
      last_nodes_[lane] = add_node(generation.graph, dependencies, copy);
      dependencies.assign(1, last_nodes_[lane]);
    }
    leaves.push_back(last_nodes_[lane]);
  }
  if (leaves.empty()) {
    leaves = generation.nodes;
    for (const CUgraphNode node : last_nodes_) {
      if (node != nullptr) add_dependency(leaves, node);
    }
  }
  generation.nodes = std::move(leaves);
  done.record_captured(std::move(generation));
}

CUgraphNode CopyEngine::add_node(CUgraph graph, const std::vector<CUgraphNode>& dependencies,
                                 const Copy& copy) const {
  CUDA_MEMCPY3D parameters{};
  parameters.srcMemoryType = CU_MEMORYTYPE_UNIFIED;
  parameters.srcDevice = device_pointer(copy.src);
  parameters.dstMemoryType = CU_MEMORYTYPE_UNIFIED;
  parameters.dstDevice = device_pointer(copy.dst);
  parameters.WidthInBytes = copy.num_bytes;
  parameters.Height = 1;
  parameters.Depth = 1;
  CUgraphNode node = nullptr;
  DWDP_CUDA(GraphAddMemcpyNode,
            (&node, graph, dependencies.data(), dependencies.size(), &parameters,
             device_->context()->handle()),
            copy.num_bytes, " bytes on ", device_->described());
  return node;
}

std::shared_ptr<const Demand> CopyEngine::prepare_demand(
    std::vector<std::vector<Copy>> experts, std::vector<std::shared_ptr<const void>> keep_mapped) {
  auto demand = std::make_shared<const Demand>(device_, std::move(experts), std::move(keep_mapped));
  // All that could take long, or fail, when an expert is demanded.
  device_->modules().kernel(kDemandImage, kDemandKernel);
  const std::lock_guard<std::mutex> lock(mutex_);
  if (!demanded_) {
    EventHandle event = make_event(device_->context());
    DeviceMemory counter = allocate_device_memory(device_->context(), sizeof(unsigned long long));
    device_->clear(counter.get(), sizeof(unsigned long long));
    demand_event_ = std::move(event);
    demanded_ = std::move(counter);
  }
  return demand;
}

void CopyEngine::fetch_activated(const std::shared_ptr<const Demand>& demand, const void* indices,
                                 std::size_t count, std::size_t index_bytes, CUstream stream) {
  check_indices(indices, count, index_bytes);
  const CUfunction kernel = device_->modules().kernel(kDemandImage, kDemandKernel);
  const ContextGuard guard(*device_->context());
  const std::lock_guard<std::mutex> lock(mutex_);
  DWDP_CHECK(!closed_, "experts were demanded from a closed copy engine");
  DWDP_CHECK(demanded_, "experts were demanded from a copy engine that prepared no demand");
  const bool capturing = device_->captures().query(stream).active;
  DemandArguments arguments = demand->arguments();
  arguments.indices = indices;
  arguments.num_indices = count;
  arguments.index_bytes = static_cast<std::uint32_t>(index_bytes);
  if (!capturing) {
    arguments.num_bytes_fetched =
        reinterpret_cast<unsigned long long*>(static_cast<std::uintptr_t>(demanded_.get()));
  }
  void* parameters[] = {&arguments};
  if (!capturing) demand_timer_.start(stream);
  DWDP_CUDA(LaunchKernel,
            (kernel, demand_blocks_, 1, 1, kDemandThreads, 1, 1, demand->shared_bytes(), stream,
             parameters, nullptr),
            kDemandKernel, " for ", count, " indices on ", device_->described());
  if (capturing) {
    captured_.insert(demand);
    return;
  }
  demand_timer_.stop(stream);
  DWDP_CUDA(EventRecord, (demand_event_.get(), stream), "on ", device_->described());
}

std::uint64_t CopyEngine::demanded_bytes() {
  const ContextGuard guard(*device_->context());
  const std::lock_guard<std::mutex> lock(mutex_);
  if (!demanded_) return 0;
  DWDP_CUDA(EventSynchronize, (demand_event_.get()), "on ", device_->described());
  unsigned long long num_bytes = 0;
  device_->copy(device_pointer(&num_bytes), demanded_.get(), sizeof(num_bytes));
  return num_bytes;
}

double CopyEngine::demand_waited_s() {
  const ContextGuard guard(*device_->context());
  const std::lock_guard<std::mutex> lock(mutex_);
  demand_timer_.poll();
  return demand_timer_.total_s();
}

void CopyEngine::close() noexcept {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (closed_) return;
  closed_ = true;
  {
    const ContextGuard guard(*device_->context(), std::nothrow);
    for (const StreamHandle& stream : streams_) {
      if (guard.active()) driver().StreamSynchronize(stream.get());
    }
    if (guard.active()) device_->captures().forget_ended();
  }
  captured_.clear();
}

}  // namespace dwdp::cuda
