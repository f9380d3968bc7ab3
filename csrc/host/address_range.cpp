#include "host/address_range.hpp"

#include <sys/mman.h>

#include "common/error.hpp"

namespace dwdp::host {
namespace {

constexpr int kReserveFlags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;

// Mappings are counted: the kernel's limit is the likely reason when memory is not short.
const char* hint(int error_number) {
  return error_number == ENOMEM ? " bytes (vm.max_map_count reached?)" : " bytes";
}

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

AddressRange::AddressRange(std::size_t num_bytes) : composition_(num_bytes, granularity()) {
  mapping_ = std::make_shared<Mapping>(num_bytes);
}

const AddressRange::Mapping& AddressRange::mapping() const {
  DWDP_CHECK(mapping_ != nullptr, "the address range of ", num_bytes(), " bytes is closed");
  return *mapping_;
}

std::shared_ptr<const void> AddressRange::keep_mapped() const {
  mapping();
  return mapping_;
}

std::uintptr_t AddressRange::address() const {
  return reinterpret_cast<std::uintptr_t>(mapping().at(0));
}

void AddressRange::map(std::size_t offset, const Region& region) {
  const std::size_t length = region.num_bytes();
  char* const start = mapping().at(0);
  composition_.check(offset, length);
  char* const target = start + offset;
  if (mmap(target, length, PROT_NONE, MAP_SHARED | MAP_FIXED, region.fd(), 0) == MAP_FAILED) {
    const int error_number = errno;
    // A failed MAP_FIXED may have removed what was there; the addresses must stay ours.
    mmap(target, length, PROT_NONE, kReserveFlags | MAP_FIXED, -1, 0);
    throw FabricError("mmap", error_number,
                      concat("mapping a region of ", length, " bytes at offset ", offset,
                             " of a range of ", num_bytes(), hint(error_number)));
  }
  composition_.add({offset, length, region.imported()});
}

void AddressRange::enable_access(bool writable) {
  const int protection = writable ? PROT_READ | PROT_WRITE : PROT_READ;
  char* const start = mapping().at(0);
  for (const auto& [offset, length] : composition_.runs(writable)) {
    DWDP_CHECK_ERRNO(mprotect(start + offset, length, protection) == 0, "mprotect", "making ",
                     length, " bytes at offset ", offset, writable ? " writable" : " readable",
                     " in a range of ", num_bytes(), hint(dwdp_error_number));
  }
}

dlpack::DLManagedTensor* AddressRange::bytes_tensor(std::size_t offset,
                                                    std::size_t num_bytes) const {
  composition_.check_view(offset, num_bytes);
  return dlpack::make_bytes_tensor(mapping().at(offset), num_bytes, {dlpack::kDLCPU, 0}, mapping_);
}

}  // namespace dwdp::host
