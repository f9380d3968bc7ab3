#include "cuda/region.hpp"

#include <utility>

#include "cuda/address_range.hpp"

namespace dwdp::cuda {
namespace {

void check_size(const Device& device, std::size_t num_bytes, const std::string& what) {
  DWDP_CHECK(num_bytes > 0 && num_bytes % device.granularity() == 0, what,
             " has a positive multiple of ", device.granularity(), " bytes, not ", num_bytes);
}

}  // namespace

Region::Region(std::shared_ptr<Device> device, Allocation allocation, std::size_t num_bytes,
               HandleType type, bool imported)
    : device_(std::move(device)),
      allocation_(std::move(allocation)),
      num_bytes_(num_bytes),
      type_(type),
      imported_(imported) {}

Region Region::allocate(std::shared_ptr<Device> device, std::size_t num_bytes, HandleType type) {
  check_size(*device, num_bytes, "a region");
  Region region(device, Allocation::create(*device, num_bytes, type), num_bytes, type, false);
  // What the memory held before is not defined.
  AddressRange range(device, num_bytes);
  range.map(0, region);
  range.enable_access(true);
  device->clear(range.address(), num_bytes);
  return region;
}

Region Region::import_descriptor(std::shared_ptr<Device> device, UniqueFd fd, std::size_t num_bytes,
                                 const std::string& origin) {
  check_size(*device, num_bytes, origin);
  Allocation allocation = Allocation::import_fd(
      *device, fd.get(), concat("importing a region of ", num_bytes, " bytes, ", origin));
  return {std::move(device), std::move(allocation), num_bytes, HandleType::kPosixFd, true};
}

Region Region::import_fabric(std::shared_ptr<Device> device, const FabricHandle& handle,
                             std::size_t num_bytes, const std::string& origin) {
  check_size(*device, num_bytes, origin);
  Allocation allocation = Allocation::import_fabric(
      *device, handle, concat("importing a region of ", num_bytes, " bytes, ", origin));
  return {std::move(device), std::move(allocation), num_bytes, HandleType::kFabric, true};
}

CUmemGenericAllocationHandle Region::handle() const {
  DWDP_CHECK(allocation_.valid(), "the region of ", num_bytes_, " bytes is closed");
  return allocation_.handle();
}

UniqueFd Region::export_descriptor() const {
  handle();
  DWDP_CHECK(type_ == HandleType::kPosixFd, "the region of ", num_bytes_,
             " bytes was allocated for export as a fabric handle, not as a file descriptor");
  return allocation_.export_fd(*device_);
}

FabricHandle Region::export_fabric() const {
  handle();
  DWDP_CHECK(type_ == HandleType::kFabric, "the region of ", num_bytes_,
             " bytes was allocated for export as a file descriptor, not as a fabric handle");
  return allocation_.export_fabric(*device_);
}

}  // namespace dwdp::cuda
