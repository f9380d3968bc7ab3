#pragma once

#include <atomic>
#include <cstddef>
#include <mutex>
#include <string>

#include "cuda/attributes.hpp"
#include "cuda/capture.hpp"
#include "cuda/handle.hpp"
#include "cuda/modules.hpp"
#include "cuda/retired_ranges.hpp"

namespace dwdp::cuda {

// How a region leaves the process: as a file descriptor, to processes of one host, or as 64 bytes
// that any host of the same NVLink domain can import.
enum class HandleType { kPosixFd, kFabric };

// "posix_fd" and "fabric"; FabricError for anything else.
const char* to_string(HandleType type) noexcept;
HandleType parse_handle_type(const std::string& name);

// One GPU, in its primary context. Everything made for it keeps it.
class Device {
 public:
  // Throws FabricError when there is no driver, no such GPU, or no virtual memory management.
  explicit Device(int ordinal);
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;

  int ordinal() const noexcept { return ordinal_; }
  const DeviceAttributes& attributes() const noexcept { return attributes_; }
  const Context& context() const noexcept { return context_; }

  // "GPU 0 (NVIDIA H100)", for errors.
  std::string described() const;

  // Bytes; sizes and offsets of every mapping are multiples of it.
  std::size_t granularity() const noexcept { return granularity_; }

  // Of memory that peers can import.
  CUmemAllocationProp allocation_properties(HandleType type) const noexcept;

  bool can_access_peer(int ordinal) const;

  // What to export memory as. On one host: file descriptors if the GPU supports them, else fabric
  // handles. Across hosts only fabric handles will do. Exports a piece of memory to see that it
  // works, and settles the granularity for it. Throws FabricError naming the reason where it does
  // not.
  HandleType choose_handle_type(bool across_hosts);

  std::size_t free_bytes() const;

  // Whether the driver maps memory read-only; taken to be so until it refuses.
  bool maps_read_only() const noexcept { return maps_read_only_; }
  void set_maps_read_only(bool value) noexcept { maps_read_only_ = value; }

  // These zero or copy memory, the latter between any two addresses, and return when that is done.
  // They order themselves with nothing else.
  void clear(CUdeviceptr start, std::size_t num_bytes);
  void copy(CUdeviceptr dst, CUdeviceptr src, std::size_t num_bytes);

  Captures& captures() noexcept { return captures_; }
  Modules& modules() noexcept { return modules_; }
  RetiredRanges& retired_ranges() noexcept { return retired_ranges_; }

  // Occupies `stream` for `nanoseconds`.
  void spin(CUstream stream, unsigned long long nanoseconds);

 private:
  std::size_t query_granularity(HandleType type) const;
  void try_export(HandleType type);

  const int ordinal_;
  const Context context_;
  const DeviceAttributes attributes_;
  std::size_t granularity_ = 0;
  std::atomic<bool> maps_read_only_{true};

  std::mutex stream_mutex_;
  StreamHandle stream_;
  Captures captures_;
  Modules modules_;
  RetiredRanges retired_ranges_;
};

}  // namespace dwdp::cuda
