#include "cuda/device.hpp"

#include <algorithm>

#include "cuda/allocation.hpp"
#include "cuda/kernels/images.hpp"
#include "cuda/kernels/spin.cuh"

namespace dwdp::cuda {

const char* to_string(HandleType type) noexcept {
  return type == HandleType::kFabric ? "fabric" : "posix_fd";
}

HandleType parse_handle_type(const std::string& name) {
  for (const HandleType type : {HandleType::kPosixFd, HandleType::kFabric}) {
    if (name == to_string(type)) return type;
  }
  throw FabricError(concat("there is no handle type '", name, "': use 'posix_fd' or 'fabric'"));
}

Device::Device(int ordinal)
    : ordinal_(ordinal),
      context_(std::make_shared<const PrimaryContext>(ordinal)),
      attributes_(query_attributes(*context_)),
      modules_(context_),
      retired_ranges_(context_, captures_) {
  DWDP_CHECK(attributes_.supports_virtual_memory, described(),
             " does not support virtual memory management (cuMemCreate), which maps experts");
  const bool only_fabric =
      attributes_.supports_fabric_handles && !attributes_.supports_posix_handles;
  granularity_ = query_granularity(only_fabric ? HandleType::kFabric : HandleType::kPosixFd);
  stream_ = make_stream(context_);
}

std::string Device::described() const {
  return concat("GPU ", ordinal_, " (", attributes_.name, ")");
}

CUmemAllocationProp Device::allocation_properties(HandleType type) const noexcept {
  CUmemAllocationProp properties{};
  properties.type = CU_MEM_ALLOCATION_TYPE_PINNED;
  properties.requestedHandleTypes = type == HandleType::kFabric
                                        ? CU_MEM_HANDLE_TYPE_FABRIC
                                        : CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
  properties.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
  properties.location.id = context_->device();
  return properties;
}

std::size_t Device::query_granularity(HandleType type) const {
  const ContextGuard guard(*context_);
  const CUmemAllocationProp properties = allocation_properties(type);
  std::size_t granularity = 0;
  DWDP_CUDA(MemGetAllocationGranularity,
            (&granularity, &properties, CU_MEM_ALLOC_GRANULARITY_MINIMUM), described());
  return granularity;
}

bool Device::can_access_peer(int ordinal) const {
  if (ordinal == ordinal_) return true;
  CUdevice peer = 0;
  DWDP_CUDA(DeviceGet, (&peer, ordinal), "GPU ", ordinal);
  int can_access = 0;
  DWDP_CUDA(DeviceCanAccessPeer, (&can_access, context_->device(), peer), "from ", described(),
            " to GPU ", ordinal);
  return can_access != 0;
}

void Device::try_export(HandleType type) {
  const std::size_t granularity = std::max(granularity_, query_granularity(type));
  const Allocation allocation = Allocation::create(*this, granularity, type);
  if (type == HandleType::kFabric) {
    allocation.export_fabric(*this);
  } else {
    allocation.export_fd(*this);
  }
  granularity_ = granularity;
}

HandleType Device::choose_handle_type(bool across_hosts) {
  if (!across_hosts && attributes_.supports_posix_handles) {
    try_export(HandleType::kPosixFd);
    return HandleType::kPosixFd;
  }
  DWDP_CHECK(attributes_.supports_fabric_handles || across_hosts, described(),
             " can export memory neither as file descriptors nor as fabric handles, so that ranks "
             "cannot share experts");
  DWDP_CHECK(attributes_.supports_fabric_handles, described(),
             " has no fabric handles, which ranks on several hosts need: use GPUs of one NVLink "
             "domain, or put all ranks of a group on one host");
  try {
    try_export(HandleType::kFabric);
  } catch (const FabricError& error) {
    if (error.error_number() == CUDA_ERROR_OUT_OF_MEMORY) throw;
    throw FabricError(concat(
        described(), " cannot export memory by fabric handles, which ranks ",
        across_hosts ? "on several hosts" : "on this GPU", " need: ", error.what(),
        "; its IMEX channel is likely not usable: run nvidia-imex on every host of the NVLink "
        "domain, and let this process open /dev/nvidia-caps-imex-channels/channel0"));
  }
  return HandleType::kFabric;
}

std::size_t Device::free_bytes() const {
  const ContextGuard guard(*context_);
  std::size_t free = 0;
  std::size_t total = 0;
  DWDP_CUDA(MemGetInfo, (&free, &total), described());
  return free;
}

void Device::clear(CUdeviceptr start, std::size_t num_bytes) {
  const ContextGuard guard(*context_);
  const std::lock_guard<std::mutex> lock(stream_mutex_);
  DWDP_CUDA(MemsetD8Async, (start, 0, num_bytes, stream_.get()), num_bytes, " bytes on ",
            described());
  DWDP_CUDA(StreamSynchronize, (stream_.get()), "clearing ", num_bytes, " bytes on ", described());
}

void Device::copy(CUdeviceptr dst, CUdeviceptr src, std::size_t num_bytes) {
  const ContextGuard guard(*context_);
  const std::lock_guard<std::mutex> lock(stream_mutex_);
  DWDP_CUDA(MemcpyAsync, (dst, src, num_bytes, stream_.get()), num_bytes, " bytes on ",
            described());
  DWDP_CUDA(StreamSynchronize, (stream_.get()), "copying ", num_bytes, " bytes on ", described());
}

void Device::spin(CUstream stream, unsigned long long nanoseconds) {
  const CUfunction kernel = modules_.kernel(kSpinImage, kSpinKernel);
  const ContextGuard guard(*context_);
  void* arguments[] = {&nanoseconds};
  DWDP_CUDA(LaunchKernel, (kernel, 1, 1, 1, 1, 1, 1, 0, stream, arguments, nullptr), kSpinKernel,
            " on ", described());
}

}  // namespace dwdp::cuda
