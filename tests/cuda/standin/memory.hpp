// Device memory: physical memory behind handles, and the addresses it is mapped at.
//
// Physical memory is a memfd filled with a pattern, since CUDA promises no zeros. Addresses come
// from one arena that is never used twice, so that whatever happens to memory that was given back
// is seen as an illegal address.
#pragma once

#include <cuda.h>

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <shared_mutex>

namespace standin {

// Lives as long as a handle or a mapping of it, in any process.
class Physical {
 public:
  // Null when the device's memory is used up.
  static std::shared_ptr<Physical> create(CUdevice device, std::size_t num_bytes, int handle_types);

  // Takes the descriptor over. Null when it is not memory of a stand-in.
  static std::shared_ptr<Physical> import(int fd, int handle_types);

  Physical(const Physical&) = delete;
  Physical& operator=(const Physical&) = delete;
  ~Physical();

  int fd() const { return fd_; }
  CUdevice device() const { return device_; }
  std::size_t num_bytes() const { return num_bytes_; }
  int handle_types() const { return handle_types_; }

  // How many there are in this process; each has one descriptor.
  static std::int64_t num_live();

 private:
  Physical(int fd, CUdevice device, std::size_t num_bytes, int handle_types, bool imported);

  int fd_;
  CUdevice device_;
  std::size_t num_bytes_;
  int handle_types_;
  bool imported_;
};

// Descriptors of device memory that this process has open: those of the stand-in itself, and
// exported ones.
std::int64_t num_descriptors();

// Bytes of a device that this process has taken, and that it may take.
std::size_t used_bytes(CUdevice device);
std::size_t limit_bytes();
std::size_t granularity();

// The device addresses of this process. Every member function locks.
class AddressSpace {
 public:
  static AddressSpace& instance();

  CUresult reserve(std::size_t num_bytes, std::size_t alignment, CUdeviceptr* address);
  CUresult free(CUdeviceptr address, std::size_t num_bytes);
  CUresult map(CUdeviceptr address, std::size_t num_bytes, std::shared_ptr<Physical> physical);
  CUresult unmap(CUdeviceptr address, std::size_t num_bytes);

  // `flags` of a CUmemAccessDesc, for `device`.
  CUresult set_access(CUdeviceptr address, std::size_t num_bytes, CUdevice device, int flags);
  CUresult get_access(CUdeviceptr address, CUdevice device, unsigned long long* flags);

  // What is mapped at `address`, or null.
  std::shared_ptr<Physical> physical_at(CUdeviceptr address);

  // Whether a copy or a memset may touch these bytes. Addresses outside the arena are the host's
  // and taken on trust.
  bool accessible(CUdeviceptr address, std::size_t num_bytes, bool write);

  // Both check, at the time they run, and keep everything mapped meanwhile. ILLEGAL_ADDRESS.
  CUresult copy(CUdeviceptr dst, CUdeviceptr src, std::size_t num_bytes);
  CUresult fill(CUdeviceptr dst, unsigned int value, std::size_t width, std::size_t count);

  bool on_device(CUdeviceptr address) const { return address - arena_ < kArenaBytes; }
  std::size_t num_reservations();
  std::size_t num_mappings();

 private:
  struct Mapping {
    std::size_t num_bytes;
    std::shared_ptr<Physical> physical;
    std::map<CUdevice, int> access;
  };
  struct Reservation {
    std::size_t num_bytes;
    std::map<CUdeviceptr, Mapping> mappings;
  };
  using Reservations = std::map<CUdeviceptr, Reservation>;

  static constexpr std::size_t kArenaBytes = std::size_t{1} << 42;

  AddressSpace();
  Reservation* containing(CUdeviceptr address, std::size_t num_bytes);
  bool accessible_locked(CUdeviceptr address, std::size_t num_bytes, bool write);
  static bool tiled(const Reservation& reservation, CUdeviceptr address, std::size_t num_bytes);

  std::shared_mutex mutex_;
  CUdeviceptr arena_;
  CUdeviceptr next_;
  Reservations reservations_;
};

std::int64_t live_handles();

// Gives back what cuMemAlloc took on `device`.
void free_allocations(CUdevice device);

// "handles", "mappings", "reservations", "allocations", "memory_bytes" or "descriptors"; -1 for
// others.
std::int64_t live_memory(const char* kind);

}  // namespace standin
