#include "cuda/allocation.hpp"

#include <fcntl.h>

#include <cstdint>
#include <utility>

namespace dwdp::cuda {

Allocation Allocation::create(const Device& device, std::size_t num_bytes, HandleType type) {
  const ContextGuard guard(*device.context());
  const CUmemAllocationProp properties = device.allocation_properties(type);
  CUmemGenericAllocationHandle handle = 0;
  const CUresult result = driver().MemCreate(&handle, num_bytes, &properties, 0);
  if (result == CUDA_ERROR_OUT_OF_MEMORY) {
    throw driver_error("cuMemCreate", result,
                       concat("a region of ", num_bytes, " bytes is wanted, but only ",
                              device.free_bytes(), " bytes are free on ", device.described()));
  }
  if (result != CUDA_SUCCESS) {
    throw driver_error("cuMemCreate", result,
                       concat("a region of ", num_bytes, " bytes that can be exported as ",
                              to_string(type), ", on ", device.described()));
  }
  return Allocation(handle);
}

Allocation Allocation::import_fd(const Device& device, int fd, const std::string& origin) {
  const ContextGuard guard(*device.context());
  CUmemGenericAllocationHandle handle = 0;
  DWDP_CUDA(MemImportFromShareableHandle,
            (&handle, reinterpret_cast<void*>(static_cast<std::uintptr_t>(fd)),
             CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR),
            origin, ", on ", device.described());
  return Allocation(handle);
}

Allocation Allocation::import_fabric(const Device& device, const FabricHandle& handle,
                                     const std::string& origin) {
  const ContextGuard guard(*device.context());
  FabricHandle shareable = handle;
  CUmemGenericAllocationHandle imported = 0;
  DWDP_CUDA(MemImportFromShareableHandle, (&imported, shareable.data(), CU_MEM_HANDLE_TYPE_FABRIC),
            origin, ", on ", device.described());
  return Allocation(imported);
}

Allocation& Allocation::operator=(Allocation&& other) noexcept {
  std::swap(handle_, other.handle_);
  return *this;
}

void Allocation::reset() noexcept {
  const CUmemGenericAllocationHandle old = std::exchange(handle_, 0);
  if (old != 0) driver().MemRelease(old);
}

UniqueFd Allocation::export_fd(const Device& device) const {
  const ContextGuard guard(*device.context());
  int fd = -1;
  DWDP_CUDA(MemExportToShareableHandle, (&fd, handle_, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, 0),
            "on ", device.described());
  UniqueFd exported(fd);
  // Nothing says that the driver does so.
  const int flags = fcntl(fd, F_GETFD);
  DWDP_CHECK_ERRNO(flags != -1 && fcntl(fd, F_SETFD, flags | FD_CLOEXEC) != -1, "fcntl(F_SETFD)",
                   "a descriptor exported by ", device.described());
  return exported;
}

FabricHandle Allocation::export_fabric(const Device& device) const {
  const ContextGuard guard(*device.context());
  FabricHandle exported{};
  DWDP_CUDA(MemExportToShareableHandle, (exported.data(), handle_, CU_MEM_HANDLE_TYPE_FABRIC, 0),
            "on ", device.described());
  return exported;
}

}  // namespace dwdp::cuda
