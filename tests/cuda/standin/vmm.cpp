// Virtual memory management: handles, their export and import, reservations, mappings, access.
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstdio>
#include <cstring>

#include "core.hpp"
#include "device.hpp"
#include "memory.hpp"

namespace standin {
namespace {

using Handles = Registry<CUmemGenericAllocationHandle, Physical>;

Handles& handles() {
  static Handles& instance = *new Handles;
  return instance;
}

constexpr char kFabricMagic[8] = {'S', 'T', 'A', 'N', 'D', 'I', 'N', 0};

// What a fabric handle says: where the exporting process has the memory open.
struct FabricName {
  char magic[8];
  std::int64_t pid;
  std::int64_t fd;
  std::uint64_t inode;
};
static_assert(sizeof(FabricName) <= sizeof(CUmemFabricHandle));

CUresult check_properties(const CUmemAllocationProp* prop) {
  if (prop == nullptr || prop->type != CU_MEM_ALLOCATION_TYPE_PINNED ||
      prop->location.type != CU_MEM_LOCATION_TYPE_DEVICE) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  return valid_device(prop->location.id) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_DEVICE;
}

CUresult check_handle_types(const CUmemAllocationProp* prop) {
  const int types = prop->requestedHandleTypes;
  if ((types & ~(CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR | CU_MEM_HANDLE_TYPE_FABRIC)) != 0) {
    return CUDA_ERROR_NOT_SUPPORTED;
  }
  if ((types & CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR) != 0 && !posix_supported()) {
    return CUDA_ERROR_NOT_SUPPORTED;
  }
  if ((types & CU_MEM_HANDLE_TYPE_FABRIC) != 0) {
    const std::string obstacle = fabric_obstacle();
    if (obstacle == "unsupported") return CUDA_ERROR_NOT_SUPPORTED;
    if (obstacle == "create") return CUDA_ERROR_NOT_PERMITTED;
  }
  return CUDA_SUCCESS;
}

CUresult export_fabric(const Physical& physical, void* shareable) {
  if (std::strcmp(fabric_obstacle(), "export") == 0) return CUDA_ERROR_NOT_PERMITTED;
  struct stat info{};
  if (fstat(physical.fd(), &info) != 0) return CUDA_ERROR_UNKNOWN;
  FabricName name{};
  std::memcpy(name.magic, kFabricMagic, sizeof kFabricMagic);
  name.pid = getpid();
  name.fd = physical.fd();
  name.inode = info.st_ino;
  std::memset(shareable, 0, sizeof(CUmemFabricHandle));
  std::memcpy(shareable, &name, sizeof name);
  return CUDA_SUCCESS;
}

int open_fabric(const void* shareable) {
  FabricName name{};
  std::memcpy(&name, shareable, sizeof name);
  if (std::memcmp(name.magic, kFabricMagic, sizeof kFabricMagic) != 0) return -1;
  char path[64];
  std::snprintf(path, sizeof path, "/proc/%lld/fd/%lld", static_cast<long long>(name.pid),
                static_cast<long long>(name.fd));
  const int fd = open(path, O_RDWR | O_CLOEXEC);
  struct stat info{};
  if (fd >= 0 && (fstat(fd, &info) != 0 || info.st_ino != name.inode)) {
    close(fd);
    return -1;
  }
  return fd;
}

}  // namespace

std::int64_t live_handles() { return static_cast<std::int64_t>(handles().size()); }

}  // namespace standin

using standin::AddressSpace;
using standin::handles;
using standin::Physical;

CUresult cuMemGetAllocationGranularity(size_t* granularity, const CUmemAllocationProp* prop,
                                       CUmemAllocationGranularity_flags option) {
  STANDIN_ENTER();
  (void)option;
  STANDIN_TRY(standin::check_properties(prop));
  *granularity = standin::granularity();
  return CUDA_SUCCESS;
}

CUresult cuMemCreate(CUmemGenericAllocationHandle* handle, size_t size,
                     const CUmemAllocationProp* prop, unsigned long long flags) {
  STANDIN_ENTER();
  STANDIN_TRY(standin::check_properties(prop));
  STANDIN_TRY(standin::check_handle_types(prop));
  if (flags != 0 || size == 0 || size % standin::granularity() != 0) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  auto physical = Physical::create(prop->location.id, size, prop->requestedHandleTypes);
  if (physical == nullptr) return CUDA_ERROR_OUT_OF_MEMORY;
  *handle = handles().add(std::move(physical));
  return CUDA_SUCCESS;
}

CUresult cuMemRelease(CUmemGenericAllocationHandle handle) {
  STANDIN_ENTER();
  return handles().remove(handle) == nullptr ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}

CUresult cuMemRetainAllocationHandle(CUmemGenericAllocationHandle* handle, void* addr) {
  STANDIN_ENTER();
  auto physical = AddressSpace::instance().physical_at(reinterpret_cast<CUdeviceptr>(addr));
  if (physical == nullptr) return CUDA_ERROR_INVALID_VALUE;
  *handle = handles().add(std::move(physical));
  return CUDA_SUCCESS;
}

CUresult cuMemGetAllocationPropertiesFromHandle(CUmemAllocationProp* prop,
                                                CUmemGenericAllocationHandle handle) {
  STANDIN_ENTER();
  const auto physical = handles().find(handle);
  if (physical == nullptr) return CUDA_ERROR_INVALID_VALUE;
  *prop = {};
  prop->type = CU_MEM_ALLOCATION_TYPE_PINNED;
  prop->location = {CU_MEM_LOCATION_TYPE_DEVICE, physical->device()};
  prop->requestedHandleTypes = static_cast<CUmemAllocationHandleType>(physical->handle_types());
  return CUDA_SUCCESS;
}

CUresult cuMemExportToShareableHandle(void* shareableHandle, CUmemGenericAllocationHandle handle,
                                      CUmemAllocationHandleType handleType,
                                      unsigned long long flags) {
  STANDIN_ENTER();
  const auto physical = handles().find(handle);
  if (physical == nullptr || flags != 0 || (physical->handle_types() & handleType) == 0) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  if (handleType == CU_MEM_HANDLE_TYPE_FABRIC) {
    return standin::export_fabric(*physical, shareableHandle);
  }
  const int fd = fcntl(physical->fd(), F_DUPFD_CLOEXEC, 0);
  if (fd < 0) return CUDA_ERROR_OPERATING_SYSTEM;
  std::memcpy(shareableHandle, &fd, sizeof fd);
  return CUDA_SUCCESS;
}

CUresult cuMemImportFromShareableHandle(CUmemGenericAllocationHandle* handle, void* osHandle,
                                        CUmemAllocationHandleType shHandleType) {
  STANDIN_ENTER();
  int fd = -1;
  if (shHandleType == CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR && standin::posix_supported()) {
    fd = fcntl(static_cast<int>(reinterpret_cast<std::intptr_t>(osHandle)), F_DUPFD_CLOEXEC, 0);
  } else if (shHandleType == CU_MEM_HANDLE_TYPE_FABRIC) {
    if (*standin::fabric_obstacle() != '\0') return CUDA_ERROR_NOT_PERMITTED;
    fd = standin::open_fabric(osHandle);
  } else {
    return CUDA_ERROR_NOT_SUPPORTED;
  }
  if (fd < 0) return CUDA_ERROR_INVALID_VALUE;
  auto physical = Physical::import(fd, shHandleType);
  if (physical == nullptr) return CUDA_ERROR_INVALID_VALUE;
  *handle = handles().add(std::move(physical));
  return CUDA_SUCCESS;
}

CUresult cuMemAddressReserve(CUdeviceptr* ptr, size_t size, size_t alignment, CUdeviceptr addr,
                             unsigned long long flags) {
  STANDIN_ENTER();
  (void)addr;  // a hint
  if (flags != 0) return CUDA_ERROR_INVALID_VALUE;
  return AddressSpace::instance().reserve(size, alignment, ptr);
}

CUresult cuMemAddressFree(CUdeviceptr ptr, size_t size) {
  STANDIN_ENTER();
  return AddressSpace::instance().free(ptr, size);
}

CUresult cuMemMap(CUdeviceptr ptr, size_t size, size_t offset, CUmemGenericAllocationHandle handle,
                  unsigned long long flags) {
  STANDIN_ENTER();
  auto physical = handles().find(handle);
  if (physical == nullptr || offset != 0 || flags != 0) return CUDA_ERROR_INVALID_VALUE;
  return AddressSpace::instance().map(ptr, size, std::move(physical));
}

CUresult cuMemUnmap(CUdeviceptr ptr, size_t size) {
  STANDIN_ENTER();
  return AddressSpace::instance().unmap(ptr, size);
}

CUresult cuMemSetAccess(CUdeviceptr ptr, size_t size, const CUmemAccessDesc* desc, size_t count) {
  STANDIN_ENTER();
  if (desc == nullptr || count == 0) return CUDA_ERROR_INVALID_VALUE;
  for (std::size_t i = 0; i < count; ++i) {
    const CUmemLocation& location = desc[i].location;
    if (location.type != CU_MEM_LOCATION_TYPE_DEVICE) return CUDA_ERROR_INVALID_VALUE;
    if (!standin::valid_device(location.id)) return CUDA_ERROR_INVALID_DEVICE;
    const auto physical = AddressSpace::instance().physical_at(ptr);
    if (physical != nullptr && !standin::can_access_peer(location.id, physical->device())) {
      return CUDA_ERROR_INVALID_DEVICE;
    }
    STANDIN_TRY(AddressSpace::instance().set_access(ptr, size, location.id, desc[i].flags));
  }
  return CUDA_SUCCESS;
}

CUresult cuMemGetAccess(unsigned long long* flags, const CUmemLocation* location, CUdeviceptr ptr) {
  STANDIN_ENTER();
  if (location->type != CU_MEM_LOCATION_TYPE_DEVICE) return CUDA_ERROR_INVALID_VALUE;
  return AddressSpace::instance().get_access(ptr, location->id, flags);
}
