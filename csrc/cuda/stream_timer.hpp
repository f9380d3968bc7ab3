#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

#include "cuda/handle.hpp"

namespace dwdp::cuda {

// Measures how long streams take for what is submitted between start() and stop(), without ever
// waiting for them: pairs of timed events are read when they have completed. When all pairs are
// under way, what comes next is not measured. Needs a lock around it.
class StreamTimer {
 public:
  // Shorter times are taken for none.
  StreamTimer(Context context, double threshold_s) noexcept
      : context_(std::move(context)), threshold_s_(threshold_s) {}

  // In pairs, on the same stream, under a ContextGuard. Without a stop, the start does not count.
  void start(CUstream stream);
  void stop(CUstream stream);

  // Reads the pairs that have completed. Under a ContextGuard.
  void poll();

  std::uint64_t num_times() const noexcept { return num_times_; }
  double total_s() const noexcept { return total_s_; }

 private:
  static constexpr std::size_t kNumPairs = 64;

  struct Pair {
    EventHandle start;
    EventHandle stop;
  };

  const Context context_;
  const double threshold_s_;
  std::array<Pair, kNumPairs> pairs_;  // events are made when they are first used
  std::size_t first_ = 0;              // of those under way
  std::size_t num_under_way_ = 0;
  bool started_ = false;
  std::uint64_t num_times_ = 0;
  double total_s_ = 0.0;
};

}  // namespace dwdp::cuda
