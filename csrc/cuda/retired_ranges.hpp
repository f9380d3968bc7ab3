#pragma once

#include <cstddef>
#include <mutex>
#include <vector>

#include "common/composition.hpp"
#include "cuda/capture.hpp"
#include "cuda/handle.hpp"

namespace dwdp::cuda {

// Addresses that nothing of ours refers to any more, and what is mapped there.
struct RetiredRange {
  CUdeviceptr start;
  std::size_t num_bytes;
  std::vector<Composition::Piece> pieces;
};

// Gives addresses back when the GPU has finished all it was given, since kernels and copies that
// use them may still run when their last owner goes.
class RetiredRanges {
 public:
  RetiredRanges(Context context, Captures& captures) noexcept
      : context_(std::move(context)), captures_(captures) {}
  RetiredRanges(const RetiredRanges&) = delete;
  RetiredRanges& operator=(const RetiredRanges&) = delete;
  ~RetiredRanges() noexcept;

  // Waits for the GPU and unmaps the range. While a graph is being captured there is no waiting:
  // the range is then unmapped with the next one, or at the end. Nobody can tell of a capture in
  // which the fabric took no part yet: that one breaks, so Python's garbage is to be collected
  // before a capture begins.
  void add(RetiredRange range) noexcept;

 private:
  bool wait() noexcept;
  void release() noexcept;

  const Context context_;
  Captures& captures_;
  std::mutex mutex_;
  std::vector<RetiredRange> ranges_;
};

}  // namespace dwdp::cuda
