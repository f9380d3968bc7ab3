#include "host/region.hpp"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstdint>
#include <fstream>
#include <limits>

#include "common/error.hpp"

namespace dwdp::host {
namespace {

constexpr int kSizeSeals = F_SEAL_SHRINK | F_SEAL_GROW;

// linux/memfd.h since 6.3; the C library's headers may be older than the kernel.
constexpr unsigned int kMfdNoexecSeal = 0x0008U;

UniqueFd create_memfd() {
  constexpr unsigned int flags = MFD_CLOEXEC | MFD_ALLOW_SEALING;
  // Kernels with vm.memfd_noexec=2 insist on the flag, kernels before 6.3 do not know it.
  UniqueFd fd(memfd_create("dwdp-region", flags | kMfdNoexecSeal));
  if (!fd.valid() && errno == EINVAL) fd.reset(memfd_create("dwdp-region", flags));
  return fd;
}

// Bytes the kernel thinks can be had without swapping, or the largest number where it does not say.
std::uint64_t available_memory() {
  std::ifstream meminfo("/proc/meminfo");
  std::string key;
  std::uint64_t kib = 0;
  std::string unit;
  while (meminfo >> key >> kib && std::getline(meminfo, unit)) {
    if (key == "MemAvailable:") return kib * 1024;
  }
  return std::numeric_limits<std::uint64_t>::max();
}

}  // namespace

std::size_t granularity() {
  static const auto page_bytes = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  return page_bytes;
}

Region Region::allocate(std::size_t num_bytes) {
  DWDP_CHECK(num_bytes > 0 && num_bytes % granularity() == 0,
             "a region has a positive multiple of ", granularity(), " bytes, not ", num_bytes);
  // Beyond this, fallocate would not fail: it would wake the kernel's out-of-memory killer.
  const std::uint64_t available = available_memory();
  DWDP_CHECK(num_bytes <= available, "a region of ", num_bytes, " bytes is wanted, but only ",
             available, " bytes of memory are available");
  UniqueFd fd = create_memfd();
  DWDP_CHECK_ERRNO(fd.valid(), "memfd_create", "for a region of ", num_bytes, " bytes");
  int result = 0;
  do {
    result = fallocate(fd.get(), 0, 0, static_cast<off_t>(num_bytes));
  } while (result == -1 && errno == EINTR);
  DWDP_CHECK_ERRNO(result == 0, "fallocate", "allocating a region of ", num_bytes, " bytes");
  DWDP_CHECK_ERRNO(fcntl(fd.get(), F_ADD_SEALS, kSizeSeals | F_SEAL_SEAL) == 0,
                   "fcntl(F_ADD_SEALS)", "fixing the size of a region of ", num_bytes, " bytes");
  return Region(std::move(fd), num_bytes, /*imported=*/false);
}

Region Region::import(UniqueFd fd, std::size_t num_bytes, const std::string& origin) {
  struct stat status{};
  DWDP_CHECK_ERRNO(fstat(fd.get(), &status) == 0, "fstat", origin);
  DWDP_CHECK(status.st_size >= 0 && static_cast<std::uint64_t>(status.st_size) == num_bytes, origin,
             " has ", status.st_size, " bytes, not the ", num_bytes, " expected");
  const int seals = fcntl(fd.get(), F_GET_SEALS);
  DWDP_CHECK_ERRNO(seals != -1, "fcntl(F_GET_SEALS)", origin, " is not a sealable memory file");
  DWDP_CHECK((seals & kSizeSeals) == kSizeSeals, origin, " of ", num_bytes,
             " bytes can still be resized by its owner (seals ", seals, "), so it is not mapped");
  return Region(std::move(fd), num_bytes, /*imported=*/true);
}

int Region::fd() const {
  DWDP_CHECK(!closed(), "the region of ", num_bytes_, " bytes is closed");
  return fd_.get();
}

UniqueFd Region::export_descriptor() const {
  // dup would share the open mode; opening the magic link makes a new open file.
  const std::string path = concat("/proc/self/fd/", fd());
  UniqueFd read_only(open(path.c_str(), O_RDONLY | O_CLOEXEC));
  DWDP_CHECK_ERRNO(read_only.valid(), "open", path, ", a region of ", num_bytes_, " bytes");
  return read_only;
}

}  // namespace dwdp::host
