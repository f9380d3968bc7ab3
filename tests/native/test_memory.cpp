#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstring>
#include <fstream>
#include <string>
#include <vector>

#include "check.hpp"
#include "common/error.hpp"
#include "host/address_range.hpp"
#include "host/region.hpp"

namespace dwdp::host {
namespace {

bool all_equal(const char* bytes, std::size_t count, char value) {
  for (std::size_t i = 0; i < count; ++i) {
    if (bytes[i] != value) return false;
  }
  return true;
}

char* bytes_of(const AddressRange& range) { return reinterpret_cast<char*>(range.address()); }

// As in /proc/self/maps, "rw-s" for instance; empty when nothing is mapped at `address`.
std::string protection_of(std::uintptr_t address) {
  std::ifstream maps("/proc/self/maps");
  std::string line;
  while (std::getline(maps, line)) {
    const std::size_t dash = line.find('-');
    const auto start = std::stoull(line.substr(0, dash), nullptr, 16);
    const auto stop = std::stoull(line.substr(dash + 1), nullptr, 16);
    if (address >= start && address < stop) return line.substr(line.find(' ') + 1, 4);
  }
  return {};
}

bool is_mapped(std::uintptr_t address) { return !protection_of(address).empty(); }

TEST(region_is_zeroed_and_of_fixed_size) {
  const std::size_t g = granularity();
  Region region = Region::allocate(3 * g);
  AddressRange range(3 * g);
  range.map(0, region);
  range.enable_access(true);
  CHECK(all_equal(bytes_of(range), 3 * g, 0));
  CHECK_EQUAL(ftruncate(region.fd(), 0), -1);
  CHECK_EQUAL(ftruncate(region.fd(), static_cast<off_t>(4 * g)), -1);
  CHECK_EQUAL(fcntl(region.fd(), F_ADD_SEALS, F_SEAL_WRITE), -1);
  CHECK((fcntl(region.fd(), F_GETFD) & FD_CLOEXEC) != 0);
}

TEST(region_refuses_bad_sizes) {
  CHECK_ERROR(Region::allocate(0), "positive multiple");
  CHECK_ERROR(Region::allocate(granularity() + 1), "positive multiple");
  CHECK_ERROR(Region::allocate(std::size_t{1} << 50), "1125899906842624 bytes is wanted");
}

TEST(region_import_checks_size_and_seals) {
  const std::size_t g = granularity();
  const Region region = Region::allocate(2 * g);
  CHECK_ERROR(Region::import(region.export_descriptor(), g, "piece"), "piece has 8192 bytes");
  UniqueFd unsealed(memfd_create("unsealed", MFD_CLOEXEC | MFD_ALLOW_SEALING));
  CHECK_EQUAL(ftruncate(unsealed.get(), static_cast<off_t>(g)), 0);
  CHECK_ERROR(Region::import(std::move(unsealed), g, "piece"), "can still be resized");
  CHECK_ERROR(Region::import(UniqueFd(), g, "piece"), "fstat failed");
  UniqueFd file(open("/proc/self/exe", O_RDONLY | O_CLOEXEC));
  const auto num_bytes = static_cast<std::size_t>(lseek(file.get(), 0, SEEK_END));
  CHECK_ERROR(Region::import(std::move(file), num_bytes, "piece"), "not a sealable memory file");
}

TEST(ranges_compose_regions_and_share_them) {
  const std::size_t g = granularity();
  Region first = Region::allocate(2 * g);
  Region second = Region::allocate(g);
  AddressRange own(4 * g);
  own.map(g, first);
  own.map(0, second);
  own.map(3 * g, second);
  own.enable_access(true);
  std::memset(bytes_of(own), 'b', g);
  std::memset(bytes_of(own) + g, 'a', 2 * g);
  CHECK(all_equal(bytes_of(own) + 3 * g, g, 'b'));

  const Region imported = Region::import(first.export_descriptor(), 2 * g, "piece");
  AddressRange peer(3 * g);
  peer.map(0, imported);
  CHECK_ERROR(peer.enable_access(true), "read-only, not writable");
  peer.enable_access(false);
  CHECK(all_equal(bytes_of(peer), 2 * g, 'a'));
  // The descriptor itself does not allow it either.
  CHECK_EQUAL(mmap(nullptr, g, PROT_WRITE, MAP_SHARED, imported.fd(), 0), MAP_FAILED);
  CHECK_EQUAL(mprotect(bytes_of(peer), g, PROT_READ | PROT_WRITE), -1);

  peer.map(2 * g, second);
  peer.enable_access(false);
  CHECK(all_equal(bytes_of(peer) + 2 * g, g, 'b'));

  first.close();
  second.close();
  CHECK(first.closed());
  std::memset(bytes_of(own) + g, 'c', 2 * g);
  CHECK(all_equal(bytes_of(peer), 2 * g, 'c'));
}

TEST(ranges_are_accessible_by_run) {
  const std::size_t g = granularity();
  const Region region = Region::allocate(g);
  AddressRange range(8 * g);
  range.enable_access(true);  // nothing mapped: nothing to do
  for (const std::size_t page : {5, 1, 2, 6}) range.map(page * g, region);
  const std::string first = protection_of(range.address() + g);
  CHECK_EQUAL(first, "---s");
  range.enable_access(false);
  for (const std::size_t page : {1, 2, 5, 6}) {
    CHECK_EQUAL(protection_of(range.address() + page * g), "r--s");
  }
  range.enable_access(true);
  CHECK_EQUAL(protection_of(range.address() + 2 * g), "rw-s");
  for (const std::size_t page : {0, 3, 4, 7}) {
    CHECK_EQUAL(protection_of(range.address() + page * g), "---p");
  }
}

TEST(ranges_check_bounds_and_alignment) {
  const std::size_t g = granularity();
  const Region region = Region::allocate(2 * g);
  AddressRange range(4 * g);
  CHECK_ERROR(range.map(g / 2, region), "is not a multiple of");
  CHECK_ERROR(range.map(3 * g, region), "does not fit");
  CHECK_ERROR(range.map(~std::size_t{0} - g + 1, region), "does not fit");
  range.map(g, region);
  for (const std::size_t page : {0, 1, 2}) {
    CHECK_ERROR(range.map(page * g, region), "overlaps one that is mapped there already");
  }
  CHECK_ERROR(range.bytes_tensor(g, 4 * g), "reaches past the end");
  CHECK_ERROR(range.bytes_tensor(~std::size_t{0}, 1), "reaches past the end");
  CHECK_ERROR(AddressRange(0), "positive multiple");
  CHECK_ERROR(AddressRange(g + 1), "positive multiple");
  CHECK_ERROR(AddressRange(std::size_t{1} << 60), "reserving a range");
  Region closed = Region::allocate(g);
  closed.close();
  CHECK_ERROR(range.map(3 * g, closed), "is closed");
}

TEST(range_stays_mapped_while_a_tensor_views_it) {
  const std::size_t g = granularity();
  const Region region = Region::allocate(g);
  AddressRange range(2 * g);
  range.map(g, region);
  range.enable_access(true);
  const std::uintptr_t address = range.address();
  dlpack::DLManagedTensor* const tensor = range.bytes_tensor(g + 8, g - 8);
  CHECK_EQUAL(tensor->dl_tensor.ndim, 1);
  CHECK_EQUAL(tensor->dl_tensor.shape[0], static_cast<std::int64_t>(g - 8));
  CHECK_EQUAL(reinterpret_cast<std::uintptr_t>(tensor->dl_tensor.data), address + g + 8);
  CHECK_EQUAL(static_cast<int>(tensor->dl_tensor.dtype.bits), 8);
  range.close();
  range.close();
  CHECK_ERROR(range.address(), "is closed");
  CHECK_ERROR(range.map(0, region), "is closed");
  CHECK_ERROR(range.enable_access(true), "is closed");
  CHECK_ERROR(range.bytes_tensor(0, g), "is closed");
  std::memset(tensor->dl_tensor.data, 1, g - 8);
  CHECK(is_mapped(address + g));
  tensor->deleter(tensor);
  CHECK(!is_mapped(address + g));
}

}  // namespace
}  // namespace dwdp::host
