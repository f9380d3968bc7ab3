#include "cuda/stream_timer.hpp"

namespace dwdp::cuda {

void StreamTimer::start(CUstream stream) {
  started_ = false;
  poll();
  if (num_under_way_ == kNumPairs) return;
  Pair& pair = pairs_[(first_ + num_under_way_) % kNumPairs];
  if (!pair.start) pair.start = make_timing_event(context_);
  if (!pair.stop) pair.stop = make_timing_event(context_);
  DWDP_CUDA(EventRecord, (pair.start.get(), stream), "timing a stream");
  started_ = true;
}

void StreamTimer::stop(CUstream stream) {
  if (!started_) return;
  started_ = false;
  const Pair& pair = pairs_[(first_ + num_under_way_) % kNumPairs];
  DWDP_CUDA(EventRecord, (pair.stop.get(), stream), "timing a stream");
  ++num_under_way_;
}

void StreamTimer::poll() {
  while (num_under_way_ > 0) {
    const Pair& pair = pairs_[first_];
    const CUresult state = driver().EventQuery(pair.stop.get());
    if (state == CUDA_ERROR_NOT_READY) return;
    if (state != CUDA_SUCCESS) throw driver_error("cuEventQuery", state, "timing a stream");
    float milliseconds = 0.0F;
    DWDP_CUDA(EventElapsedTime, (&milliseconds, pair.start.get(), pair.stop.get()),
              "timing a stream");
    first_ = (first_ + 1) % kNumPairs;
    --num_under_way_;
    const double seconds = static_cast<double>(milliseconds) * 1e-3;
    if (seconds < threshold_s_) continue;
    ++num_times_;
    total_s_ += seconds;
  }
}

}  // namespace dwdp::cuda
