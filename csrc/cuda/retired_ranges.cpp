#include "cuda/retired_ranges.hpp"

#include <utility>

namespace dwdp::cuda {

RetiredRanges::~RetiredRanges() noexcept {
  if (ranges_.empty()) return;
  const ContextGuard guard(*context_, std::nothrow);
  if (guard.active()) driver().CtxSynchronize();
  release();
}

void RetiredRanges::add(RetiredRange range) noexcept {
  const ContextGuard guard(*context_, std::nothrow);
  const std::lock_guard<std::mutex> lock(mutex_);
  ranges_.push_back(std::move(range));
  if (guard.active() && wait()) release();
}

// Returns whether nothing runs any more, be it for an error.
bool RetiredRanges::wait() noexcept {
  if (captures_.ongoing()) return false;
  const CUresult result = driver().CtxSynchronize();
  return result < CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED ||
         result > CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD;
}

void RetiredRanges::release() noexcept {
  for (const RetiredRange& range : ranges_) {
    for (auto piece = range.pieces.rbegin(); piece != range.pieces.rend(); ++piece) {
      driver().MemUnmap(range.start + piece->offset, piece->num_bytes);
    }
    driver().MemAddressFree(range.start, range.num_bytes);
  }
  ranges_.clear();
}

}  // namespace dwdp::cuda
