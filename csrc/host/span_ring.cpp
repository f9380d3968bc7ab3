#include "host/span_ring.hpp"

#include <algorithm>
#include <chrono>

namespace dwdp::host {

std::int64_t now_ns() noexcept {
  const auto since_start = std::chrono::steady_clock::now().time_since_epoch();
  return std::chrono::duration_cast<std::chrono::nanoseconds>(since_start).count();
}

void SpanRing::record(const Span& span) noexcept {
  const std::uint64_t n = num_recorded_.load(std::memory_order_relaxed);
  Slot& slot = slots_[n % kCapacity];
  slot.version.store(2 * n + 1, std::memory_order_relaxed);
  slot.start_ns.store(span.start_ns, std::memory_order_release);
  slot.end_ns.store(span.end_ns, std::memory_order_release);
  slot.layer.store(span.layer, std::memory_order_release);
  slot.num_bytes.store(span.num_bytes, std::memory_order_release);
  slot.version.store(2 * n + 2, std::memory_order_release);
  num_recorded_.store(n + 1, std::memory_order_release);
}

std::vector<Span> SpanRing::drain() {
  const std::lock_guard<std::mutex> lock(drain_mutex_);
  const std::uint64_t num_recorded = num_recorded_.load(std::memory_order_acquire);
  const std::uint64_t oldest = num_recorded > kCapacity ? num_recorded - kCapacity : 0;
  std::vector<Span> spans;
  spans.reserve(num_recorded - std::max(oldest, num_drained_));
  for (std::uint64_t n = std::max(oldest, num_drained_); n < num_recorded; ++n) {
    const Slot& slot = slots_[n % kCapacity];
    if (slot.version.load(std::memory_order_acquire) != 2 * n + 2) continue;
    const Span span{
        slot.start_ns.load(std::memory_order_acquire),
        slot.end_ns.load(std::memory_order_acquire),
        slot.layer.load(std::memory_order_acquire),
        slot.num_bytes.load(std::memory_order_acquire),
    };
    if (slot.version.load(std::memory_order_relaxed) == 2 * n + 2) spans.push_back(span);
  }
  num_drained_ = num_recorded;
  return spans;
}

}  // namespace dwdp::host
