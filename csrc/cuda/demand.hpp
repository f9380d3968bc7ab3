#pragma once

#include <cstddef>
#include <memory>
#include <vector>

#include "common/slices.hpp"
#include "cuda/device.hpp"
#include "cuda/kernels/demand.cuh"

namespace dwdp::cuda {

// What each expert of a layer takes to fetch (nothing for a resident one), as a table in the memory
// of the GPU whose kernel reads it.
class Demand {
 public:
  // `keep_mapped`: what the slices' addresses belong to, held as long as this. Throws FabricError
  // for a slice whose addresses differ modulo 16 bytes, which are copied at a time.
  Demand(std::shared_ptr<Device> device, std::vector<std::vector<Copy>> experts,
         std::vector<std::shared_ptr<const void>> keep_mapped = {});

  std::size_t num_experts() const noexcept { return num_experts_; }
  std::size_t num_bytes() const noexcept { return num_bytes_; }

  // For the kernel; its indices and counter are still to be set.
  DemandArguments arguments() const noexcept;

  // What the kernel needs of a block's shared memory.
  unsigned int shared_bytes() const noexcept;

 private:
  const std::shared_ptr<Device> device_;
  const std::vector<std::shared_ptr<const void>> keep_mapped_;
  const std::size_t num_experts_;
  std::size_t num_slices_ = 0;
  std::size_t num_bytes_ = 0;
  DeviceMemory table_;  // slices, then where each expert's begin
};

}  // namespace dwdp::cuda
