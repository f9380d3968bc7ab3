#pragma once

#include <array>
#include <cstddef>
#include <string>

#include "common/unique_fd.hpp"
#include "cuda/device.hpp"

namespace dwdp::cuda {

using FabricHandle = std::array<char, sizeof(CUmemFabricHandle)>;

// Owns one handle of physical memory. The memory itself stays while anything maps it or, in this or
// another process, has a handle of it.
class Allocation {
 public:
  // Not zeroed. Throws FabricError with the bytes needed and the bytes free when memory is short.
  static Allocation create(const Device& device, std::size_t num_bytes, HandleType type);

  // `origin` names what is imported in errors. `fd` stays the caller's.
  static Allocation import_fd(const Device& device, int fd, const std::string& origin);
  static Allocation import_fabric(const Device& device, const FabricHandle& handle,
                                  const std::string& origin);

  Allocation(Allocation&& other) noexcept : handle_(other.handle_) { other.handle_ = 0; }
  Allocation& operator=(Allocation&& other) noexcept;
  Allocation(const Allocation&) = delete;
  Allocation& operator=(const Allocation&) = delete;
  ~Allocation() noexcept { reset(); }

  CUmemGenericAllocationHandle handle() const noexcept { return handle_; }
  bool valid() const noexcept { return handle_ != 0; }
  void reset() noexcept;

  UniqueFd export_fd(const Device& device) const;
  FabricHandle export_fabric(const Device& device) const;

 private:
  explicit Allocation(CUmemGenericAllocationHandle handle) noexcept : handle_(handle) {}

  CUmemGenericAllocationHandle handle_ = 0;
};

}  // namespace dwdp::cuda
