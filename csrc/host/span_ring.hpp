#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <vector>

namespace dwdp::host {

// When something was copied, in nanoseconds of the steady clock.
struct Span {
  std::int64_t start_ns;
  std::int64_t end_ns;
  std::size_t layer;
  std::size_t num_bytes;
};

std::int64_t now_ns() noexcept;

// The last spans of one lane. One thread at a time records, without waiting for whoever reads; what
// nobody reads in time is overwritten.
class SpanRing {
 public:
  static constexpr std::size_t kCapacity = 1024;

  SpanRing() = default;
  SpanRing(const SpanRing&) = delete;
  SpanRing& operator=(const SpanRing&) = delete;

  void record(const Span& span) noexcept;

  // What was recorded since the last call and not yet overwritten, in the order of recording.
  std::vector<Span> drain();

 private:
  // `version` is 2n + 1 while the n-th span is being written and 2n + 2 when it is there. Whoever
  // reads a value that was written after that sees a later version as well.
  struct Slot {
    std::atomic<std::uint64_t> version{0};
    std::atomic<std::int64_t> start_ns{0};
    std::atomic<std::int64_t> end_ns{0};
    std::atomic<std::size_t> layer{0};
    std::atomic<std::size_t> num_bytes{0};
  };

  std::array<Slot, kCapacity> slots_;
  std::atomic<std::uint64_t> num_recorded_{0};

  std::mutex drain_mutex_;  // of readers among themselves
  std::uint64_t num_drained_ = 0;
};

}  // namespace dwdp::host
