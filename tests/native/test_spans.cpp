#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "check.hpp"
#include "host/copy_engine.hpp"
#include "host/span_ring.hpp"

namespace dwdp::host {
namespace {

using Bytes = std::vector<unsigned char>;
using Lanes = std::vector<std::vector<Copy>>;

Span numbered(std::int64_t n) {
  const auto count = static_cast<std::size_t>(n);
  return {3 * n, 3 * n + 1, count, 2 * count};
}

bool is_whole(const Span& span) {
  const Span expected = numbered(static_cast<std::int64_t>(span.layer));
  return span.start_ns == expected.start_ns && span.end_ns == expected.end_ns &&
         span.num_bytes == expected.num_bytes;
}

TEST(span_ring_gives_each_span_once_and_keeps_the_last) {
  SpanRing ring;
  CHECK(ring.drain().empty());
  for (std::int64_t n = 0; n < 10; ++n) ring.record(numbered(n));
  const std::vector<Span> first = ring.drain();
  CHECK_EQUAL(first.size(), 10u);
  for (std::size_t i = 0; i < first.size(); ++i) {
    CHECK(is_whole(first[i]));
    CHECK_EQUAL(first[i].layer, i);
  }
  CHECK(ring.drain().empty());
  const auto capacity = static_cast<std::int64_t>(SpanRing::kCapacity);
  for (std::int64_t n = 10; n < 15 + capacity; ++n) ring.record(numbered(n));
  const std::vector<Span> rest = ring.drain();
  CHECK_EQUAL(rest.size(), SpanRing::kCapacity);
  CHECK_EQUAL(rest.front().layer, 15u);
  CHECK_EQUAL(rest.back().layer, 14u + SpanRing::kCapacity);
  CHECK(ring.drain().empty());
}

TEST(span_ring_is_read_while_it_is_written) {
  constexpr std::int64_t kNumSpans = 300000;
  SpanRing ring;
  std::thread writer([&ring] {
    for (std::int64_t n = 0; n < kNumSpans; ++n) ring.record(numbered(n));
  });
  std::size_t next = 0;
  while (next < static_cast<std::size_t>(kNumSpans)) {
    for (const Span& span : ring.drain()) {
      CHECK(is_whole(span));
      CHECK(span.layer >= next);
      next = span.layer + 1;
    }
  }
  writer.join();
}

// Fetches of random slices on random lanes, followed by one thread that collects the spans.
TEST(copy_engine_spans_hold_every_byte_and_never_overlap) {
  constexpr std::size_t kNumBytes = 20000;
  constexpr std::size_t kNumFetches = 300;
  for (const std::size_t lane_depth : {1u, 3u}) {
    std::mt19937 random(7);
    Bytes source(kNumBytes);
    Bytes target(kNumBytes);
    CopyEngine engine(3, lane_depth);
    std::vector<std::vector<Span>> collected(4);
    const auto collect = [&] {
      const auto drained = engine.drain_spans();
      CHECK_EQUAL(drained.size(), collected.size());
      for (std::size_t lane = 0; lane < drained.size(); ++lane) {
        collected[lane].insert(collected[lane].end(), drained[lane].begin(), drained[lane].end());
      }
    };
    std::atomic<bool> stop{false};
    std::thread reader([&] {
      while (!stop) collect();
    });
    std::vector<std::vector<std::size_t>> expected(3, std::vector<std::size_t>(kNumFetches));
    const auto done = std::make_shared<Event>();
    const std::int64_t start_ns = now_ns();
    for (std::size_t layer = 0; layer < kNumFetches; ++layer) {
      Lanes lanes(3);
      std::size_t start = 0;
      while (start < kNumBytes) {
        const std::size_t length = std::min<std::size_t>(kNumBytes - start, 1 + random() % 4096);
        const std::size_t lane = random() % 3;
        lanes[lane].push_back({&target[start], &source[start], length});
        expected[lane][layer] += length;
        start += length;
      }
      engine.submit(engine.prepare(std::move(lanes), {}, layer), done, done);
    }
    done->wait(done->issued());
    const std::int64_t end_ns = now_ns();
    stop = true;
    reader.join();
    collect();  // what a fetch did is there when it is done
    CHECK(collected[3].empty());
    for (std::size_t lane = 0; lane < 3; ++lane) {
      std::int64_t last_ns = start_ns;
      for (const Span& span : collected[lane]) {
        CHECK(last_ns <= span.start_ns);
        CHECK(span.start_ns <= span.end_ns);
        last_ns = span.end_ns;
        CHECK(span.num_bytes > 0);
        CHECK_EQUAL(span.num_bytes, expected[lane][span.layer]);
        expected[lane][span.layer] = 0;
      }
      CHECK(last_ns <= end_ns);
      for (const std::size_t missing : expected[lane]) CHECK_EQUAL(missing, 0u);
    }
  }
}

// Two fetches in flight on one lane, on threads that take turns in ending first.
TEST(copy_engine_spans_of_a_deep_lane_never_overlap) {
  constexpr std::size_t kLarge = 1 << 18;
  Bytes source(kLarge);
  std::vector<Bytes> targets(3, Bytes(kLarge));
  CopyEngine engine(1, 3);
  const auto done = std::make_shared<Event>();
  for (std::size_t round = 0; round < 200; ++round) {
    for (std::size_t i = 0; i < targets.size(); ++i) {
      const std::size_t num_bytes = i == 0 ? kLarge : 1;
      engine.submit(engine.prepare({{{targets[i].data(), source.data(), num_bytes}}}), nullptr,
                    done);
    }
    done->wait(done->issued());
  }
  const std::vector<Span> spans = engine.drain_spans()[0];
  CHECK_EQUAL(spans.size(), 600u);
  for (std::size_t i = 1; i < spans.size(); ++i) CHECK(spans[i - 1].end_ns <= spans[i].start_ns);
}

TEST(copy_engine_spans_hold_what_is_fetched_on_demand) {
  const Bytes source(64, 1);
  Bytes target(64);
  CopyEngine engine(2, 1);
  const Demand demand({{{target.data(), source.data(), 24}}, {}}, {}, 5);
  const std::vector<std::int32_t> both{0, 1};
  const std::vector<std::int32_t> resident{1};
  CHECK_EQUAL(engine.fetch_activated(demand, both.data(), both.size(), 4), 24u);
  CHECK_EQUAL(engine.fetch_activated(demand, resident.data(), resident.size(), 4), 0u);
  const auto spans = engine.drain_spans();
  CHECK_EQUAL(spans.size(), 3u);
  CHECK(spans[0].empty() && spans[1].empty());
  CHECK_EQUAL(spans[2].size(), 1u);
  CHECK_EQUAL(spans[2][0].num_bytes, 24u);
  CHECK_EQUAL(spans[2][0].layer, 5u);
  CHECK(spans[2][0].start_ns <= spans[2][0].end_ns);
}

}  // namespace
}  // namespace dwdp::host
