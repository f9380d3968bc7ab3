// Physical memory: created, limited, imported.
#include <dirent.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <array>
#include <climits>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "core.hpp"
#include "memory.hpp"

namespace standin {
namespace {

constexpr char kName[] = "cuda-standin";
constexpr unsigned char kPattern = 0xA5;
constexpr int kMaxDevices = 8;

std::atomic<std::int64_t> live{0};

std::array<std::atomic<std::size_t>, kMaxDevices>& used() {
  static auto& instance = *new std::array<std::atomic<std::size_t>, kMaxDevices>{};
  return instance;
}

// The device that a descriptor's memory is on, which its name says; -1 when it is not memory of a
// stand-in.
int device_of(const char* descriptor) {
  char target[PATH_MAX] = {};
  const std::string link = std::string("/proc/self/fd/") + descriptor;
  if (readlink(link.c_str(), target, sizeof target - 1) < 0) return -1;
  const char* const name = std::strstr(target, kName);
  return name == nullptr ? -1 : std::atoi(name + sizeof kName);
}

}  // namespace

std::size_t granularity() {
  return static_cast<std::size_t>(setting("STANDIN_GRANULARITY", 2 << 20));
}

std::size_t limit_bytes() {
  return static_cast<std::size_t>(setting("STANDIN_MEMORY_BYTES", std::int64_t{1} << 30));
}

std::size_t used_bytes(CUdevice device) { return used()[static_cast<std::size_t>(device)].load(); }

Physical::Physical(int fd, CUdevice device, std::size_t num_bytes, int handle_types, bool imported)
    : fd_(fd),
      device_(device),
      num_bytes_(num_bytes),
      handle_types_(handle_types),
      imported_(imported) {
  ++live;
}

Physical::~Physical() {
  if (fd_ >= 0) close(fd_);
  --live;
  if (!imported_) used()[static_cast<std::size_t>(device_)] -= num_bytes_;
}

std::shared_ptr<Physical> Physical::create(CUdevice device, std::size_t num_bytes,
                                           int handle_types) {
  std::atomic<std::size_t>& taken = used()[static_cast<std::size_t>(device)];
  if (taken.fetch_add(num_bytes) + num_bytes > limit_bytes()) {
    taken -= num_bytes;
    return nullptr;
  }
  char name[32];
  std::snprintf(name, sizeof name, "%s-%d", kName, device);
  const int fd = memfd_create(name, MFD_CLOEXEC);
  // From here on the destructor gives back what was counted.
  std::shared_ptr<Physical> physical(
      new Physical(fd, device, num_bytes, handle_types, /*imported=*/false));
  if (fd < 0 || ftruncate(fd, static_cast<off_t>(num_bytes)) != 0) return nullptr;
  void* const bytes = mmap(nullptr, num_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  if (bytes == MAP_FAILED) return nullptr;
  std::memset(bytes, kPattern, num_bytes);
  munmap(bytes, num_bytes);
  return physical;
}

std::shared_ptr<Physical> Physical::import(int fd, int handle_types) {
  struct stat info{};
  const int device = device_of(std::to_string(fd).c_str());
  if (device < 0 || fstat(fd, &info) != 0) {
    close(fd);
    return nullptr;
  }
  return std::shared_ptr<Physical>(new Physical(fd, device, static_cast<std::size_t>(info.st_size),
                                                handle_types, /*imported=*/true));
}

std::int64_t num_descriptors() {
  std::int64_t count = 0;
  DIR* const folder = opendir("/proc/self/fd");
  while (const dirent* const entry = readdir(folder)) {
    if (device_of(entry->d_name) >= 0) ++count;
  }
  closedir(folder);
  return count;
}

std::int64_t Physical::num_live() { return live; }

}  // namespace standin
