#include <atomic>
#include <thread>
#include <vector>

#include "check.hpp"
#include "common/error.hpp"
#include "host/event.hpp"

namespace dwdp::host {
namespace {

TEST(event_without_generation_is_complete) {
  const Event event;
  CHECK(event.query());
  CHECK(event.wait_interruptible(0));
}

TEST(event_refers_to_the_generation_issued_last) {
  Event event;
  const auto first = event.issue();
  CHECK(!event.query());
  event.complete(first);
  CHECK(event.query());
  const auto second = event.issue();
  CHECK(event.completed(first));
  CHECK(!event.query());
  event.complete(second);
  CHECK(event.query());
  event.record();
  CHECK_EQUAL(event.issued(), 3u);
  CHECK(event.query());
}

TEST(event_completed_out_of_order_releases_nobody_early) {
  Event event;
  for (int i = 0; i < 40; ++i) event.issue();
  for (std::uint64_t generation = 40; generation > 1; --generation) {
    event.complete(generation);
    CHECK(!event.completed(1));
    CHECK(!event.query());
  }
  event.complete(1);
  CHECK(event.completed(40));
  CHECK(event.query());
}

// Each waiter must find what was written before its generation was completed.
TEST(event_wakes_many_waiters_and_publishes_what_was_written) {
  constexpr int kRounds = 300;
  constexpr int kWaiters = 4;
  Event event;
  std::vector<int> written(kRounds, 0);
  std::vector<std::uint64_t> generations(kRounds);
  for (auto& generation : generations) generation = event.issue();
  std::atomic<int> num_wrong{0};
  std::vector<std::thread> waiters;
  for (int w = 0; w < kWaiters; ++w) {
    waiters.emplace_back([&] {
      for (int round = 0; round < kRounds; ++round) {
        event.wait(generations[round]);
        if (written[round] != round + 1) ++num_wrong;
      }
    });
  }
  for (int round = 0; round < kRounds; ++round) {
    if (round % 7 == 0) std::this_thread::yield();
    written[round] = round + 1;
    event.complete(generations[round]);
  }
  for (std::thread& waiter : waiters) waiter.join();
  CHECK_EQUAL(num_wrong.load(), 0);
}

// Two threads hand a number to and fro, so that every wait is a real one.
TEST(event_ping_pong) {
  constexpr std::uint64_t kRounds = 2000;
  Event ping;
  Event pong;
  for (std::uint64_t i = 0; i < kRounds; ++i) {
    ping.issue();
    pong.issue();
  }
  std::uint64_t value = 0;
  std::thread other([&] {
    for (std::uint64_t i = 1; i <= kRounds; ++i) {
      ping.wait(i);
      ++value;
      pong.complete(i);
    }
  });
  for (std::uint64_t i = 1; i <= kRounds; ++i) {
    ++value;
    ping.complete(i);
    pong.wait(i);
  }
  other.join();
  CHECK_EQUAL(value, 2 * kRounds);
}

}  // namespace
}  // namespace dwdp::host
