// Ordinary device memory, and page-locked host memory.
#include <algorithm>
#include <cstdlib>
#include <set>

#include "core.hpp"
#include "device.hpp"
#include "memory.hpp"
#include "stream.hpp"

namespace standin {
namespace {

struct Allocation {
  CUdevice device;
  std::size_t num_bytes;
};

struct Allocations {
  std::mutex mutex;
  std::map<CUdeviceptr, Allocation> device;
  std::set<void*> host;
};

Allocations& allocations() {
  static Allocations& instance = *new Allocations;
  return instance;
}

// What cuMemAlloc aligns to; a page is also what can be mapped.
constexpr std::size_t kAlignment = 4096;

CUresult allocate(CUdeviceptr* address, std::size_t num_bytes) {
  std::shared_ptr<Context> context;
  STANDIN_TRY(current_context(&context));
  STANDIN_TRY(check_capture_allows());
  if (num_bytes == 0) return CUDA_ERROR_INVALID_VALUE;
  const std::size_t rounded = (num_bytes + kAlignment - 1) / kAlignment * kAlignment;
  auto physical = Physical::create(context->device, rounded, 0);
  if (physical == nullptr) return CUDA_ERROR_OUT_OF_MEMORY;
  AddressSpace& space = AddressSpace::instance();
  STANDIN_TRY(space.reserve(rounded, 0, address));
  STANDIN_TRY(space.map(*address, rounded, std::move(physical)));
  STANDIN_TRY(
      space.set_access(*address, rounded, context->device, CU_MEM_ACCESS_FLAGS_PROT_READWRITE));
  const std::lock_guard<std::mutex> lock(allocations().mutex);
  allocations().device[*address] = {context->device, rounded};
  return CUDA_SUCCESS;
}

// As the real one, it waits for the work that may still use the memory.
CUresult give_back(CUdeviceptr address) {
  STANDIN_TRY(check_capture_allows());
  STANDIN_TRY(synchronize_context());
  const std::lock_guard<std::mutex> lock(allocations().mutex);
  const auto found = allocations().device.find(address);
  if (found == allocations().device.end()) return CUDA_ERROR_INVALID_VALUE;
  const std::size_t num_bytes = found->second.num_bytes;
  allocations().device.erase(found);
  STANDIN_TRY(AddressSpace::instance().unmap(address, num_bytes));
  return AddressSpace::instance().free(address, num_bytes);
}

CUresult allocate_host(void** address, std::size_t num_bytes) {
  std::shared_ptr<Context> context;
  STANDIN_TRY(current_context(&context));
  STANDIN_TRY(check_capture_allows());
  if (num_bytes == 0) return CUDA_ERROR_INVALID_VALUE;
  const std::size_t rounded = (num_bytes + kAlignment - 1) / kAlignment * kAlignment;
  *address = std::aligned_alloc(kAlignment, rounded);
  if (*address == nullptr) return CUDA_ERROR_OUT_OF_MEMORY;
  const std::lock_guard<std::mutex> lock(allocations().mutex);
  allocations().host.insert(*address);
  return CUDA_SUCCESS;
}

}  // namespace

void free_allocations(CUdevice device) {
  const std::lock_guard<std::mutex> lock(allocations().mutex);
  auto& live = allocations().device;
  for (auto entry = live.begin(); entry != live.end();) {
    if (entry->second.device != device) {
      ++entry;
      continue;
    }
    AddressSpace::instance().unmap(entry->first, entry->second.num_bytes);
    AddressSpace::instance().free(entry->first, entry->second.num_bytes);
    entry = live.erase(entry);
  }
}

std::int64_t live_memory(const char* kind) {
  const std::string name(kind);
  const std::lock_guard<std::mutex> lock(allocations().mutex);
  const auto num_allocated = static_cast<std::int64_t>(allocations().device.size());
  AddressSpace& space = AddressSpace::instance();
  if (name == "handles") return live_handles();
  if (name == "mappings") return static_cast<std::int64_t>(space.num_mappings()) - num_allocated;
  if (name == "reservations") {
    return static_cast<std::int64_t>(space.num_reservations()) - num_allocated;
  }
  if (name == "allocations") {
    return num_allocated + static_cast<std::int64_t>(allocations().host.size());
  }
  if (name == "memory_bytes") {
    std::size_t total = 0;
    for (int device = 0; device < num_devices(); ++device) total += used_bytes(device);
    return static_cast<std::int64_t>(total);
  }
  if (name == "descriptors") return num_descriptors() - Physical::num_live();
  return -1;
}

}  // namespace standin

using standin::allocations;

CUresult cuMemAlloc(CUdeviceptr* dptr, size_t bytesize) {
  STANDIN_ENTER();
  return standin::allocate(dptr, bytesize);
}

CUresult cuMemFree(CUdeviceptr dptr) {
  STANDIN_ENTER();
  return standin::give_back(dptr);
}

CUresult cuMemAllocHost(void** pp, size_t bytesize) {
  STANDIN_ENTER();
  return standin::allocate_host(pp, bytesize);
}

CUresult cuMemHostAlloc(void** pp, size_t bytesize, unsigned int Flags) {
  STANDIN_ENTER();
  (void)Flags;
  return standin::allocate_host(pp, bytesize);
}

CUresult cuMemHostGetDevicePointer(CUdeviceptr* pdptr, void* p, unsigned int Flags) {
  STANDIN_ENTER();
  if (Flags != 0) return CUDA_ERROR_INVALID_VALUE;
  *pdptr = reinterpret_cast<CUdeviceptr>(p);
  return CUDA_SUCCESS;
}

CUresult cuMemFreeHost(void* p) {
  STANDIN_ENTER();
  STANDIN_TRY(standin::check_capture_allows());
  STANDIN_TRY(standin::synchronize_context());
  const std::lock_guard<std::mutex> lock(allocations().mutex);
  if (allocations().host.erase(p) == 0) return CUDA_ERROR_INVALID_VALUE;
  std::free(p);
  return CUDA_SUCCESS;
}
