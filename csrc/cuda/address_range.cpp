#include "cuda/address_range.hpp"

#include <cstdint>
#include <utility>

#include "common/composition.hpp"

namespace dwdp::cuda {
namespace {

// What drivers that map nothing read-only answer.
bool refuses_read_only(CUresult result) noexcept {
  return result == CUDA_ERROR_INVALID_VALUE || result == CUDA_ERROR_NOT_SUPPORTED ||
         result == CUDA_ERROR_NOT_PERMITTED;
}

}  // namespace

// Owns the addresses; shared by the range and the tensors that view it.
class AddressRange::Mapping {
 public:
  Mapping(std::shared_ptr<Device> device, std::size_t num_bytes)
      : device_(std::move(device)), composition_(num_bytes, device_->granularity()) {
    const ContextGuard guard(*device_->context());
    DWDP_CUDA(MemAddressReserve, (&start_, num_bytes, device_->granularity(), 0, 0),
              "reserving a range of ", num_bytes, " bytes on ", device_->described());
  }
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;
  ~Mapping() noexcept {
    device_->retired_ranges().add({start_, composition_.num_bytes(), composition_.pieces()});
  }

  CUdeviceptr start() const noexcept { return start_; }
  const Device& device() const noexcept { return *device_; }
  const Composition& composition() const noexcept { return composition_; }

  void map(std::size_t offset, const Region& region);
  void enable_access(bool writable);

 private:
  CUresult set_access(const Composition::Run& run, CUmemAccess_flags flags) const;

  const std::shared_ptr<Device> device_;
  Composition composition_;
  CUdeviceptr start_ = 0;
};

void AddressRange::Mapping::map(std::size_t offset, const Region& region) {
  const std::size_t length = region.num_bytes();
  const CUmemGenericAllocationHandle handle = region.handle();
  composition_.check(offset, length);
  const ContextGuard guard(*device_->context());
  DWDP_CUDA(MemMap, (start_ + offset, length, /*offset=*/0, handle, /*flags=*/0), "mapping ",
            region.imported() ? "a peer's region of " : "a region of ", length, " bytes at offset ",
            offset, " of a range of ", composition_.num_bytes(), " bytes on ",
            device_->described());
  composition_.add({offset, length, region.imported()});
}

CUresult AddressRange::Mapping::set_access(const Composition::Run& run,
                                           CUmemAccess_flags flags) const {
  CUmemAccessDesc access{};
  access.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
  access.location.id = device_->context()->device();
  access.flags = flags;
  return driver().MemSetAccess(start_ + run.offset, run.num_bytes, &access, 1);
}

void AddressRange::Mapping::enable_access(bool writable) {
  const std::vector<Composition::Run> runs = composition_.runs(writable);
  const ContextGuard guard(*device_->context());
  for (const Composition::Run& run : runs) {
    const bool read_only = !writable && device_->maps_read_only();
    CUresult result = set_access(
        run, read_only ? CU_MEM_ACCESS_FLAGS_PROT_READ : CU_MEM_ACCESS_FLAGS_PROT_READWRITE);
    if (read_only && refuses_read_only(result)) {
      result = set_access(run, CU_MEM_ACCESS_FLAGS_PROT_READWRITE);
      if (result == CUDA_SUCCESS) device_->set_maps_read_only(false);
    }
    if (result != CUDA_SUCCESS) {
      throw driver_error("cuMemSetAccess", result,
                         concat("making ", run.num_bytes, " bytes at offset ", run.offset,
                                writable ? " writable" : " readable", " in a range of ",
                                composition_.num_bytes(), " bytes on ", device_->described()));
    }
  }
}

AddressRange::AddressRange(std::shared_ptr<Device> device, std::size_t num_bytes)
    : mapping_(std::make_shared<Mapping>(std::move(device), num_bytes)), num_bytes_(num_bytes) {}

AddressRange::Mapping& AddressRange::mapping() const {
  DWDP_CHECK(mapping_ != nullptr, "the address range of ", num_bytes_, " bytes is closed");
  return *mapping_;
}

CUdeviceptr AddressRange::address() const { return mapping().start(); }

void AddressRange::map(std::size_t offset, const Region& region) { mapping().map(offset, region); }

void AddressRange::enable_access(bool writable) { mapping().enable_access(writable); }

std::shared_ptr<const void> AddressRange::keep_mapped() const {
  mapping();
  return mapping_;
}

dlpack::DLManagedTensor* AddressRange::bytes_tensor(std::size_t offset,
                                                    std::size_t num_bytes) const {
  mapping().composition().check_view(offset, num_bytes);
  void* const data = reinterpret_cast<void*>(static_cast<std::uintptr_t>(address() + offset));
  const dlpack::DLDevice device{dlpack::kDLCUDA, mapping().device().ordinal()};
  return dlpack::make_bytes_tensor(data, num_bytes, device, mapping_);
}

}  // namespace dwdp::cuda
