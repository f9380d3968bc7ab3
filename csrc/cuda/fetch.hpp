#pragma once

#include <cstddef>
#include <memory>
#include <vector>

#include "common/slices.hpp"

namespace dwdp::cuda {

using DeviceAddress = unsigned long long;  // CUdeviceptr, for those who do without CUDA's headers

// What one stream copies, as the driver takes it.
struct Batch {
  std::vector<DeviceAddress> dsts;
  std::vector<DeviceAddress> srcs;
  std::vector<std::size_t> sizes;
};

// Slices laid out per lane, in the order in which they are copied, for streams and for graphs.
// Immutable, so that one fetch can be submitted, or captured, any number of times.
class Fetch {
 public:
  // `keep_mapped`: what the slices' addresses belong to, held as long as the fetch.
  Fetch(std::vector<std::vector<Copy>> lanes, std::size_t lane_depth,
        std::vector<std::shared_ptr<const void>> keep_mapped = {});

  std::size_t num_slices() const noexcept { return slices_.num_slices(); }
  std::size_t num_bytes() const noexcept { return slices_.num_bytes(); }

  // Of stream `lane * lane_depth + i`, which has every `lane_depth`-th slice of its lane.
  const std::vector<Batch>& batches() const noexcept { return batches_; }

  // Per lane, slices that follow each other in both memories made one: a node of a graph has no use
  // for small ones.
  const std::vector<std::vector<Copy>>& chains() const noexcept { return chains_; }

 private:
  Slices slices_;
  std::vector<std::shared_ptr<const void>> keep_mapped_;
  std::vector<Batch> batches_;
  std::vector<std::vector<Copy>> chains_;
};

}  // namespace dwdp::cuda
