#include "host/event.hpp"

#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <climits>

namespace dwdp::host {
namespace {

static_assert(sizeof(std::atomic<std::uint32_t>) == 4 &&
                  std::atomic<std::uint32_t>::is_always_lock_free,
              "a futex is a plain 32-bit word");

// Sleeps while `word` is `expected`. Returns false when a signal handler ran.
bool futex_wait(std::atomic<std::uint32_t>& word, std::uint32_t expected) noexcept {
  const long result = syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, expected, nullptr, nullptr, 0);
  return result == 0 || errno != EINTR;
}

void futex_wake_all(std::atomic<std::uint32_t>& word) noexcept {
  syscall(SYS_futex, &word, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
}

}  // namespace

Event::Event() { early_.reserve(16); }

void Event::complete(std::uint64_t generation) {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    std::uint64_t completed = completed_.load(std::memory_order_relaxed);
    if (generation != completed + 1) {
      early_.push_back(generation);
      return;
    }
    ++completed;
    for (auto next = early_.begin(); next != early_.end();) {
      if (*next == completed + 1) {
        ++completed;
        *next = early_.back();
        early_.pop_back();
        next = early_.begin();
      } else {
        ++next;
      }
    }
    completed_.store(completed, std::memory_order_release);
  }
  // Sequentially consistent together with the waiter's increment: either the waiter is seen here,
  // or the waiter's futex_wait sees the change and does not sleep.
  changes_.fetch_add(1, std::memory_order_seq_cst);
  if (num_waiters_.load(std::memory_order_seq_cst) > 0) futex_wake_all(changes_);
}

bool Event::wait_interruptible(std::uint64_t generation) const noexcept {
  if (completed(generation)) return true;
  bool interrupted = false;
  num_waiters_.fetch_add(1, std::memory_order_seq_cst);
  while (!interrupted) {
    const std::uint32_t seen = changes_.load(std::memory_order_seq_cst);
    if (completed(generation)) break;
    interrupted = !futex_wait(changes_, seen);
  }
  num_waiters_.fetch_sub(1, std::memory_order_relaxed);
  return completed(generation);
}

}  // namespace dwdp::host
