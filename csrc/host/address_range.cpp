#include "host/address_range.hpp"

#include <sys/mman.h>

#include "common/error.hpp"

namespace dwdp::host {
namespace {

constexpr int kReserveFlags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;

}  // namespace

// Owns the addresses; shared by the range and the tensors that view it.
class AddressRange::Mapping {
 public:
  explicit Mapping(std::size_t num_bytes)
      : address_(mmap(nullptr, num_bytes, PROT_NONE, kReserveFlags, -1, 0)), num_bytes_(num_bytes) {
    DWDP_CHECK_ERRNO(address_ != MAP_FAILED, "mmap", "reserving a range of ", num_bytes, " bytes");
  }
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;
  ~Mapping() noexcept { munmap(address_, num_bytes_); }

  char* at(std::size_t offset) const noexcept { return static_cast<char*>(address_) + offset; }

 private:
  void* address_;
  std::size_t num_bytes_;
};

AddressRange::AddressRange(std::size_t num_bytes) : num_bytes_(num_bytes) {
  DWDP_CHECK(num_bytes > 0 && num_bytes % granularity() == 0,
             "an address range has a positive multiple of ", granularity(), " bytes, not ",
             num_bytes);
  mapping_ = std::make_shared<Mapping>(num_bytes);
}

const AddressRange::Mapping& AddressRange::mapping() const {
  DWDP_CHECK(mapping_ != nullptr, "the address range of ", num_bytes_, " bytes is closed");
  return *mapping_;
}

std::shared_ptr<const void> AddressRange::keep_mapped() const {
  mapping();
  return mapping_;
}

std::uintptr_t AddressRange::address() const {
  return reinterpret_cast<std::uintptr_t>(mapping().at(0));
}

void AddressRange::map(std::size_t offset, const Region& region, bool writable) {
  const std::size_t length = region.num_bytes();
  DWDP_CHECK(offset % granularity() == 0, "offset ", offset, " is not a multiple of ",
             granularity(), ", the granularity of mappings");
  DWDP_CHECK(length <= num_bytes_ && offset <= num_bytes_ - length, "a region of ", length,
             " bytes at offset ", offset, " does not fit an address range of ", num_bytes_,
             " bytes");
  DWDP_CHECK(!writable || !region.imported(), "a region of ", length,
             " bytes received from a peer can be mapped read-only, not writable");
  char* const target = mapping().at(offset);
  const int protection = writable ? PROT_READ | PROT_WRITE : PROT_READ;
  if (mmap(target, length, protection, MAP_SHARED | MAP_FIXED, region.fd(), 0) == MAP_FAILED) {
    const int error_number = errno;
    // A failed MAP_FIXED may have removed what was there; the addresses must stay ours.
    mmap(target, length, PROT_NONE, kReserveFlags | MAP_FIXED, -1, 0);
    throw FabricError(
        "mmap", error_number,
        concat("mapping a region of ", length, " bytes at offset ", offset, " of a range of ",
               num_bytes_,
               error_number == ENOMEM ? " bytes (vm.max_map_count reached?)" : " bytes"));
  }
}

dlpack::DLManagedTensor* AddressRange::bytes_tensor(std::size_t offset,
                                                    std::size_t num_bytes) const {
  struct View {
    dlpack::DLManagedTensor tensor;
    std::int64_t shape[1];
    std::shared_ptr<Mapping> mapping;
  };
  DWDP_CHECK(num_bytes <= num_bytes_ && offset <= num_bytes_ - num_bytes, "a view of ", num_bytes,
             " bytes at offset ", offset, " reaches past the end of an address range of ",
             num_bytes_, " bytes");
  void* const data = mapping().at(offset);
  auto* const view = new View{{}, {static_cast<std::int64_t>(num_bytes)}, mapping_};
  view->tensor.dl_tensor = {data,
                            {dlpack::kDLCPU, 0},
                            /*ndim=*/1,
                            {dlpack::kDLUInt, /*bits=*/8, /*lanes=*/1},
                            view->shape,
                            /*strides=*/nullptr,
                            /*byte_offset=*/0};
  view->tensor.manager_ctx = view;
  view->tensor.deleter = [](dlpack::DLManagedTensor* tensor) {
    delete static_cast<View*>(tensor->manager_ctx);
  };
  return &view->tensor;
}

}  // namespace dwdp::host
