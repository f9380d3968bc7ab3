#pragma once

#include <atomic>
#include <cstdint>
#include <mutex>
#include <vector>

namespace dwdp::host {

// Numbered generations that are issued and later completed, as with a CUDA event: who waits names
// the generation issued last at that time, and later ones do not concern him.
//
// A generation counts as completed once it and all before it are, so that completing them out of
// order never releases a waiter early.
class Event {
 public:
  Event();
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;

  // Returns the new generation. The first is 1; 0 stands for "none" and is always completed.
  std::uint64_t issue() noexcept { return issued_.fetch_add(1, std::memory_order_relaxed) + 1; }
  std::uint64_t issued() const noexcept { return issued_.load(std::memory_order_relaxed); }

  // Each issued generation is completed once. What the caller wrote before is visible to whoever
  // sees the generation completed.
  void complete(std::uint64_t generation);

  // Compute on the host is done when it returns, so there is nothing to wait for.
  void record() { complete(issue()); }

  bool completed(std::uint64_t generation) const noexcept {
    return completed_.load(std::memory_order_acquire) >= generation;
  }
  bool query() const noexcept { return completed(issued()); }

  void wait(std::uint64_t generation) const noexcept {
    while (!wait_interruptible(generation)) {
    }
  }

  // Returns false when a signal handler ran in this thread before the generation completed.
  bool wait_interruptible(std::uint64_t generation) const noexcept;

 private:
  std::atomic<std::uint64_t> issued_{0};
  std::atomic<std::uint64_t> completed_{0};

  // What waiters sleep on: changes with every completion. A futex has 32 bits, hence not the
  // counter itself.
  mutable std::atomic<std::uint32_t> changes_{0};
  mutable std::atomic<std::uint32_t> num_waiters_{0};

  std::mutex mutex_;
  std::vector<std::uint64_t> early_;  // completed before one issued earlier
};

}  // namespace dwdp::host
