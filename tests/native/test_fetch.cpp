// How a CUDA copy engine lays a fetch out for its streams, and for graphs.
#include <cstdint>
#include <map>
#include <random>
#include <string>
#include <vector>

#include "check.hpp"
#include "common/error.hpp"
#include "cuda/fetch.hpp"

namespace dwdp::cuda {
namespace {

char* const kSource = reinterpret_cast<char*>(std::uintptr_t{1} << 40);
char* const kTarget = reinterpret_cast<char*>(std::uintptr_t{1} << 44);

Copy slice(std::size_t dst, std::size_t src, std::size_t num_bytes) {
  return {kTarget + dst, kSource + src, num_bytes};
}

// Every byte that is written, and where it comes from, in order of writing.
using Bytes = std::map<std::uintptr_t, std::uintptr_t>;

void add_bytes(Bytes& bytes, std::uintptr_t dst, std::uintptr_t src, std::size_t num_bytes) {
  for (std::size_t i = 0; i < num_bytes; ++i) {
    CHECK(bytes.emplace(dst + i, src + i).second);
  }
}

TEST(fetch_alternates_a_lanes_slices_over_its_streams) {
  const Fetch fetch({{slice(0, 100, 7), slice(50, 200, 8), slice(60, 300, 9)}, {}}, 2);
  CHECK_EQUAL(fetch.num_slices(), std::size_t{3});
  CHECK_EQUAL(fetch.num_bytes(), std::size_t{24});
  const std::vector<Batch>& batches = fetch.batches();
  CHECK_EQUAL(batches.size(), std::size_t{4});
  CHECK(batches[0].sizes == (std::vector<std::size_t>{7, 9}));
  CHECK(batches[1].sizes == (std::vector<std::size_t>{8}));
  CHECK(batches[2].sizes.empty() && batches[3].sizes.empty());
  CHECK_EQUAL(batches[0].dsts[1], reinterpret_cast<std::uintptr_t>(kTarget + 60));
  CHECK_EQUAL(batches[0].srcs[1], reinterpret_cast<std::uintptr_t>(kSource + 300));
  CHECK(Fetch({}, 3).batches().empty());
}

TEST(fetch_merges_what_follows_in_both_memories) {
  const Fetch fetch(
      {{slice(0, 64, 8), slice(8, 72, 8), slice(16, 88, 8), slice(40, 96, 8), slice(48, 104, 16)},
       {slice(100, 200, 4)}},
      1);
  const auto& chains = fetch.chains();
  CHECK_EQUAL(chains.size(), std::size_t{2});
  CHECK_EQUAL(chains[0].size(), std::size_t{3});
  CHECK_EQUAL(chains[0][0].num_bytes, std::size_t{16});
  CHECK_EQUAL(chains[0][1].num_bytes, std::size_t{8});
  CHECK_EQUAL(chains[0][2].num_bytes, std::size_t{24});
  CHECK_EQUAL(chains[1].size(), std::size_t{1});
}

TEST(fetch_keeps_nodes_narrow) {
  constexpr std::size_t kMegabytes = std::size_t{1} << 20;
  std::vector<Copy> lane;
  for (std::size_t i = 0; i < 40; ++i) {
    lane.push_back(slice(i * 64 * kMegabytes, i * 64 * kMegabytes, 64 * kMegabytes));
  }
  const Fetch fetch({lane}, 1);
  CHECK_EQUAL(fetch.chains()[0].size(), std::size_t{3});
  for (const Copy& copy : fetch.chains()[0]) CHECK(copy.num_bytes <= std::size_t{1} << 30);
}

TEST(fetch_moves_every_byte_once_whichever_way) {
  std::mt19937 random(3);
  for (int round = 0; round < 50; ++round) {
    std::vector<std::vector<Copy>> lanes(1 + random() % 4);
    std::size_t dst = 0;
    std::size_t src = 0;
    Bytes expected;
    for (std::size_t i = random() % 30; i > 0; --i) {
      const std::size_t num_bytes = 1 + random() % 20;
      if (random() % 3 == 0) dst += random() % 5;
      if (random() % 3 == 0) src += random() % 5;
      const Copy copy = slice(dst, src, num_bytes);
      lanes[random() % lanes.size()].push_back(copy);
      add_bytes(expected, reinterpret_cast<std::uintptr_t>(copy.dst),
                reinterpret_cast<std::uintptr_t>(copy.src), num_bytes);
      dst += num_bytes;
      src += num_bytes;
    }
    const Fetch fetch(lanes, 1 + random() % 3);
    Bytes batched;
    for (const Batch& batch : fetch.batches()) {
      for (std::size_t i = 0; i < batch.sizes.size(); ++i) {
        add_bytes(batched, batch.dsts[i], batch.srcs[i], batch.sizes[i]);
      }
    }
    CHECK(batched == expected);
    Bytes chained;
    for (const auto& chain : fetch.chains()) {
      for (const Copy& copy : chain) {
        add_bytes(chained, reinterpret_cast<std::uintptr_t>(copy.dst),
                  reinterpret_cast<std::uintptr_t>(copy.src), copy.num_bytes);
      }
    }
    CHECK(chained == expected);
  }
}

}  // namespace
}  // namespace dwdp::cuda
