#include <dirent.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <fstream>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "check.hpp"
#include "common/error.hpp"
#include "host/copy_engine.hpp"

namespace dwdp::host {
namespace {

using Bytes = std::vector<unsigned char>;
using Lanes = std::vector<std::vector<Copy>>;

Bytes random_bytes(std::size_t count, std::mt19937& random) {
  Bytes bytes(count);
  for (auto& byte : bytes) byte = static_cast<unsigned char>(random());
  return bytes;
}

// Cuts a copy into slices of random sizes on random lanes.
void scatter(Lanes& lanes, unsigned char* dst, const unsigned char* src, std::size_t num_bytes,
             std::mt19937& random) {
  std::size_t start = 0;
  while (start < num_bytes) {
    const std::size_t length = std::min<std::size_t>(num_bytes - start, 1 + random() % 4096);
    lanes[random() % lanes.size()].push_back({dst + start, src + start, length});
    start += length;
  }
}

int count_lane_threads() {
  int count = 0;
  DIR* const tasks = opendir("/proc/self/task");
  while (const dirent* const task = readdir(tasks)) {
    std::ifstream comm(std::string("/proc/self/task/") + task->d_name + "/comm");
    std::string name;
    if (std::getline(comm, name) && name.rfind("dwdp-lane-", 0) == 0) ++count;
  }
  closedir(tasks);
  return count;
}

TEST(copy_engine_copies_a_fetch_and_counts_it) {
  std::mt19937 random(1);
  const Bytes source = random_bytes(100000, random);
  Bytes target(source.size());
  CopyEngine engine(3, 2);
  Lanes lanes(3);
  scatter(lanes, target.data(), source.data(), source.size(), random);
  const auto fetch = engine.prepare(lanes);
  CHECK_EQUAL(fetch->num_bytes(), source.size());
  const auto done = std::make_shared<Event>();
  for (int i = 0; i < 3; ++i) engine.submit(fetch, done, done);
  done->wait(done->issued());
  CHECK(target == source);
  std::size_t num_bytes = 0;
  for (const auto& spans : engine.drain_spans()) {
    for (const Span& span : spans) num_bytes += span.num_bytes;
  }
  CHECK_EQUAL(num_bytes, 3 * source.size());
}

TEST(copy_engine_completes_empty_fetches_in_their_turn) {
  std::mt19937 random(2);
  const Bytes source = random_bytes(1 << 20, random);
  Bytes target(source.size());
  CopyEngine engine(2, 1);
  const auto copied = std::make_shared<Event>();
  const auto done = std::make_shared<Event>();
  engine.submit(engine.prepare({{}, {{target.data(), source.data(), source.size()}}}), nullptr,
                copied);
  engine.submit(engine.prepare({}), copied, done);
  done->wait(done->issued());
  CHECK(copied->query());
  CHECK(target == source);
  engine.submit(engine.prepare({{}, {}}), nullptr, done);
  done->wait(done->issued());
}

TEST(copy_engine_close_finishes_what_was_submitted) {
  std::mt19937 random(3);
  const Bytes source = random_bytes(1 << 16, random);
  std::vector<Bytes> targets(200, Bytes(source.size()));
  const auto done = std::make_shared<Event>();
  // A thread names itself, and leaves /proc a little after it was joined.
  CHECK(test::eventually([] { return count_lane_threads() == 0; }));
  CopyEngine engine(2, 2);
  CHECK(test::eventually([] { return count_lane_threads() == 4; }));
  for (Bytes& target : targets) {
    Lanes lanes(2);
    scatter(lanes, target.data(), source.data(), source.size(), random);
    engine.submit(engine.prepare(std::move(lanes)), done, done);
  }
  engine.close();
  engine.close();
  CHECK(done->query());
  for (const Bytes& target : targets) CHECK(target == source);
  CHECK_ERROR(engine.submit(engine.prepare({}), nullptr, done), "closed copy engine");
  CHECK(done->query());
  CHECK(test::eventually([] { return count_lane_threads() == 0; }));
}

TEST(copy_engine_refuses_bad_fetches) {
  Bytes bytes(64);
  CopyEngine engine(1, 1);
  CHECK_ERROR(CopyEngine(0, 1), "at least one lane");
  CHECK_ERROR(CopyEngine(1, 0), "at least one lane");
  CHECK_ERROR(engine.prepare({{}, {}}), "2 lanes does not fit");
  CHECK_ERROR(engine.prepare({{{bytes.data(), nullptr, 8}}}), "must not be zero");
  CHECK_ERROR(engine.prepare({{{bytes.data(), bytes.data() + 32, 0}}}), "must not be zero");
  CHECK_ERROR(engine.prepare({{{bytes.data(), bytes.data() + 7, 8}}}), "which overlap");
  CopyEngine wide(2, 1);
  const auto done = std::make_shared<Event>();
  CHECK_ERROR(engine.submit(wide.prepare({{}, {}}), nullptr, done), "2 lanes does not fit");
  CHECK(done->query());
}

// More submissions than the pool starts with, all held back by one event.
TEST(copy_engine_grows_its_queues) {
  std::mt19937 random(4);
  const Bytes source = random_bytes(1000, random);
  std::vector<Bytes> targets(1000, Bytes(source.size()));
  CopyEngine engine(2, 1);
  const auto gate = std::make_shared<Event>();
  const auto open = gate->issue();
  const auto done = std::make_shared<Event>();
  for (Bytes& target : targets) {
    Lanes lanes(2);
    scatter(lanes, target.data(), source.data(), source.size(), random);
    engine.submit(engine.prepare(std::move(lanes)), gate, done);
  }
  CHECK(!done->query());
  for (const Bytes& target : targets) CHECK(target == Bytes(source.size()));
  gate->complete(open);
  done->wait(done->issued());
  for (const Bytes& target : targets) CHECK(target == source);
}

// Two fetches share `done`, and the one submitted last is over first.
TEST(copy_engine_done_covers_all_earlier_generations) {
  std::mt19937 random(5);
  const Bytes source = random_bytes(4096, random);
  Bytes slow(source.size());
  Bytes fast(source.size());
  CopyEngine slow_engine(1, 1);
  CopyEngine fast_engine(1, 1);
  const auto gate = std::make_shared<Event>();
  const auto open = gate->issue();
  const auto done = std::make_shared<Event>();
  slow_engine.submit(slow_engine.prepare({{{slow.data(), source.data(), slow.size()}}}), gate,
                     done);
  const auto first = done->issued();
  fast_engine.submit(fast_engine.prepare({{{fast.data(), source.data(), fast.size()}}}), nullptr,
                     done);
  fast_engine.close();
  CHECK(fast == source);
  CHECK(!done->completed(first));
  CHECK(!done->query());
  gate->complete(open);
  done->wait(done->issued());
  CHECK(slow == source);
}

// A ring of slots: fetches overwrite a slot after its reader is done (WAR), and the reader looks
// after the fetch is done (RAW).
TEST(copy_engine_ring_of_slots_has_no_hazard) {
  constexpr int kLayers = 5;
  constexpr int kSteps = 60;
  std::mt19937 random(6);
  for (const std::size_t num_slots : {2u, 3u}) {
    std::vector<Bytes> layers;
    for (int i = 0; i < kLayers; ++i) layers.push_back(random_bytes(20000, random));
    std::vector<Bytes> slots(num_slots, Bytes(20000));
    std::vector<std::shared_ptr<Event>> ready;
    std::vector<std::shared_ptr<Event>> free;
    for (std::size_t i = 0; i < num_slots; ++i) {
      ready.push_back(std::make_shared<Event>());
      free.push_back(std::make_shared<Event>());
    }
    CopyEngine engine(3, 2);
    const auto fetch = [&](int step) {
      const std::size_t slot = step % num_slots;
      const Bytes& layer = layers[step % kLayers];
      Lanes lanes(3);
      scatter(lanes, slots[slot].data(), layer.data(), layer.size(), random);
      engine.submit(engine.prepare(std::move(lanes)), free[slot], ready[slot]);
    };
    for (std::size_t step = 0; step < num_slots; ++step) fetch(static_cast<int>(step));
    for (int step = 0; step < kSteps; ++step) {
      const std::size_t slot = step % num_slots;
      ready[slot]->wait(ready[slot]->issued());
      CHECK(slots[slot] == layers[step % kLayers]);
      free[slot]->record();
      if (step + static_cast<int>(num_slots) < kSteps) fetch(step + static_cast<int>(num_slots));
    }
  }
}

// Random fetches from buffer to buffer, each after whatever touched its buffers last, against the
// same copies made one after another.
TEST(copy_engine_random_programs_match_a_plain_reference) {
  constexpr std::size_t kBuffers = 5;
  for (unsigned int seed = 0; seed < 12; ++seed) {
    std::mt19937 random(seed);
    const std::size_t num_lanes = 1 + random() % 4;
    std::vector<std::unique_ptr<CopyEngine>> engines;
    for (int i = 0; i < 2; ++i) {
      engines.push_back(std::make_unique<CopyEngine>(num_lanes, 1 + random() % 3));
    }
    std::vector<Bytes> buffers;
    for (std::size_t i = 0; i < kBuffers; ++i) buffers.push_back(random_bytes(9000, random));
    std::vector<Bytes> expected = buffers;
    std::vector<std::shared_ptr<Event>> events;
    for (std::size_t i = 0; i < kBuffers; ++i) events.push_back(std::make_shared<Event>());
    std::vector<std::shared_ptr<Event>> last(kBuffers, events[0]);
    for (int step = 0; step < 80; ++step) {
      const std::size_t src = random() % kBuffers;
      const std::size_t dst = (src + 1 + random() % (kBuffers - 1)) % kBuffers;
      const std::size_t start = random() % 8999;
      const std::size_t length = 1 + random() % (9000 - start);
      std::memcpy(&expected[dst][start], &expected[src][start], length);
      // An engine waits for one event; the host waits for the other.
      last[src]->wait(last[src]->issued());
      Lanes lanes(num_lanes);
      scatter(lanes, &buffers[dst][start], &buffers[src][start], length, random);
      CopyEngine& engine = *engines[random() % engines.size()];
      const auto& done = events[random() % events.size()];
      engine.submit(engine.prepare(std::move(lanes)), last[dst], done);
      last[src] = done;
      last[dst] = done;
    }
    for (const auto& engine : engines) engine->close();
    for (std::size_t i = 0; i < kBuffers; ++i) CHECK(buffers[i] == expected[i]);
  }
}

TEST(copy_engine_takes_fetches_from_several_threads) {
  constexpr int kThreads = 4;
  constexpr int kRounds = 100;
  CopyEngine engine(3, 2);
  std::vector<std::thread> threads;
  std::atomic<int> num_wrong{0};
  for (int t = 0; t < kThreads; ++t) {
    threads.emplace_back([&engine, &num_wrong, t] {
      std::mt19937 random(100 + t);
      const Bytes source = random_bytes(5000, random);
      const auto done = std::make_shared<Event>();
      for (int round = 0; round < kRounds; ++round) {
        Bytes target(source.size());
        Lanes lanes(3);
        scatter(lanes, target.data(), source.data(), source.size(), random);
        engine.submit(engine.prepare(std::move(lanes)), done, done);
        done->wait(done->issued());
        if (target != source) ++num_wrong;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  CHECK_EQUAL(num_wrong.load(), 0);
}

}  // namespace
}  // namespace dwdp::host
