// Fetching on demand: by the host, and by the kernel's own source run on the CPU.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "check.hpp"
#include "common/error.hpp"
#include "cuda/kernels/demand.cuh"
#include "host/copy_engine.hpp"
#include "host/demand.hpp"

namespace dwdp {
namespace {

// What a layer of random slices takes to fetch, and where it lies.
struct Layer {
  std::vector<unsigned char> source;
  std::vector<unsigned char> target;
  std::vector<std::vector<Copy>> experts;
};

std::size_t random_size(std::mt19937& random) {
  switch (random() % 4) {
    case 0:
      return 1 + random() % 40;
    case 1:
      return 16 * (1 + random() % 8);
    case 2:
      return 65536 - 8 + random() % 16;  // a tile, more or less
    default:
      return 1 + random() % 200000;
  }
}

Layer random_layer(std::mt19937& random, std::size_t num_experts) {
  std::vector<std::vector<std::pair<std::size_t, std::size_t>>> spans(num_experts);
  std::size_t end = 0;
  for (auto& expert : spans) {
    for (std::size_t i = random() % 4; i > 0; --i) {
      end += random() % 33;  // gaps, and any alignment
      const std::size_t num_bytes = random_size(random);
      expert.push_back({end, num_bytes});
      end += num_bytes;
    }
  }
  Layer layer;
  layer.source.resize(end + 64);
  // Neighbouring bytes differ, and so do the same bytes of different vectors and tiles.
  for (std::size_t i = 0; i < layer.source.size(); ++i) {
    layer.source[i] = static_cast<unsigned char>(1 + (i * 31 + i / 16 * 7 + i / 65536) % 255);
  }
  layer.target.assign(end + 64, 0);
  // The same remainder modulo 16 in both.
  const auto src = reinterpret_cast<std::uintptr_t>(layer.source.data());
  const auto dst = reinterpret_cast<std::uintptr_t>(layer.target.data());
  const std::size_t shift = (src - dst) % 16;
  layer.experts.resize(num_experts);
  for (std::size_t expert = 0; expert < num_experts; ++expert) {
    for (const auto& [start, num_bytes] : spans[expert]) {
      layer.experts[expert].push_back(
          {layer.target.data() + start + shift, layer.source.data() + start, num_bytes});
    }
  }
  return layer;
}

template <typename Index>
std::vector<Index> random_indices(std::mt19937& random, std::size_t num_experts,
                                  std::set<std::size_t>& activated) {
  std::vector<Index> indices(random() % 40);
  for (Index& index : indices) {
    index = static_cast<Index>(random() % (num_experts + 6)) - 3;
    if (index >= 0 && index < static_cast<Index>(num_experts)) {
      activated.insert(static_cast<std::size_t>(index));
    }
  }
  return indices;
}

// The bytes that the activated experts have, after checking that they and no others were copied.
std::size_t check_copied(const Layer& layer, const std::set<std::size_t>& activated) {
  std::vector<unsigned char> expected(layer.target.size(), 0);
  std::size_t num_bytes = 0;
  for (const std::size_t expert : activated) {
    for (const Copy& copy : layer.experts[expert]) {
      const auto* const dst = static_cast<const unsigned char*>(copy.dst);
      std::memcpy(expected.data() + (dst - layer.target.data()), copy.src, copy.num_bytes);
      num_bytes += copy.num_bytes;
    }
  }
  CHECK(layer.target == expected);
  return num_bytes;
}

template <typename Index>
void run_on_host(std::mt19937& random) {
  const std::size_t num_experts = 1 + random() % 70;
  const Layer layer = random_layer(random, num_experts);
  std::set<std::size_t> activated;
  const std::vector<Index> indices = random_indices<Index>(random, num_experts, activated);
  const host::Demand demand(layer.experts);
  CHECK_EQUAL(demand.num_experts(), num_experts);
  host::CopyEngine engine(1, 1);
  const std::size_t num_bytes =
      engine.fetch_activated(demand, indices.data(), indices.size(), sizeof(Index));
  CHECK_EQUAL(num_bytes, check_copied(layer, activated));
}

// Blocks one after the other, in random order; within a block, every thread up to each barrier.
void run_kernel(const cuda::DemandArguments& arguments, unsigned int num_blocks,
                std::mt19937& random) {
  std::vector<unsigned int> blocks(num_blocks);
  for (unsigned int block = 0; block < num_blocks; ++block) blocks[block] = block;
  std::shuffle(blocks.begin(), blocks.end(), random);
  for (const unsigned int block : blocks) {
    std::vector<std::uint32_t> shared(cuda::demand_words(arguments.num_experts), random());
    for (unsigned int t = 0; t < cuda::kDemandThreads; ++t) {
      cuda::demand_clear(arguments, shared.data(), t);
    }
    for (unsigned int t = 0; t < cuda::kDemandThreads; ++t) {
      cuda::demand_mark(arguments, shared.data(), t);
    }
    for (unsigned int t = 0; t < cuda::kDemandThreads; ++t) {
      cuda::demand_copy(arguments, shared.data(), block, num_blocks, t);
    }
  }
}

template <typename Index>
void run_as_kernel(std::mt19937& random) {
  const std::size_t num_experts = 1 + random() % 70;
  const Layer layer = random_layer(random, num_experts);
  std::set<std::size_t> activated;
  const std::vector<Index> indices = random_indices<Index>(random, num_experts, activated);
  std::vector<cuda::DemandSlice> slices;
  std::vector<std::uint32_t> first_slice{0};
  for (const auto& expert : layer.experts) {
    for (const Copy& copy : expert) {
      slices.push_back({static_cast<unsigned char*>(copy.dst),
                        static_cast<const unsigned char*>(copy.src), copy.num_bytes});
    }
    first_slice.push_back(static_cast<std::uint32_t>(slices.size()));
  }
  unsigned long long num_bytes = 5;
  cuda::DemandArguments arguments{};
  arguments.slices = slices.data();
  arguments.first_slice = first_slice.data();
  arguments.indices = indices.data();
  arguments.num_indices = indices.size();
  arguments.num_bytes_fetched = &num_bytes;
  arguments.num_experts = static_cast<std::uint32_t>(num_experts);
  arguments.index_bytes = sizeof(Index);
  run_kernel(arguments, 1 + random() % 20, random);
  CHECK_EQUAL(num_bytes, 5 + check_copied(layer, activated));
}

TEST(demand_on_the_host_copies_activated_experts_once) {
  std::mt19937 random(7);
  for (int round = 0; round < 12; ++round) {
    run_on_host<std::int32_t>(random);
    run_on_host<std::int64_t>(random);
  }
}

TEST(demand_kernel_copies_activated_experts_once) {
  std::mt19937 random(11);
  for (int round = 0; round < 12; ++round) {
    run_as_kernel<std::int32_t>(random);
    run_as_kernel<std::int64_t>(random);
  }
}

TEST(demand_kernel_blocks_share_the_work) {
  // 64 tiles of one expert on 16 blocks: each takes 4.
  constexpr std::size_t kNumBytes = 64 * cuda::kTileVectors * cuda::kVectorBytes;
  std::vector<unsigned char> source(kNumBytes + 16, 1);
  auto* const src = reinterpret_cast<unsigned char*>(
      (reinterpret_cast<std::uintptr_t>(source.data()) + 15) / 16 * 16);
  const std::uint32_t first_slice[] = {0, 1};
  const std::int32_t index = 0;
  for (unsigned int block = 0; block < 16; ++block) {
    std::vector<unsigned char> target(kNumBytes + 16, 0);
    auto* const dst = reinterpret_cast<unsigned char*>(
        (reinterpret_cast<std::uintptr_t>(target.data()) + 15) / 16 * 16);
    const cuda::DemandSlice slice{dst, src, kNumBytes};
    cuda::DemandArguments arguments{};
    arguments.slices = &slice;
    arguments.first_slice = first_slice;
    arguments.indices = &index;
    arguments.num_indices = 1;
    arguments.num_experts = 1;
    arguments.index_bytes = 4;
    const std::uint32_t activated = 1;
    for (unsigned int t = 0; t < cuda::kDemandThreads; ++t) {
      cuda::demand_copy(arguments, &activated, block, 16, t);
    }
    std::size_t num_copied = 0;
    for (const unsigned char byte : target) num_copied += byte;
    CHECK_EQUAL(num_copied, kNumBytes / 16);
  }
}

TEST(demand_refuses_bad_input) {
  std::vector<unsigned char> bytes(64);
  using Experts = std::vector<std::vector<Copy>>;
  const Experts empty_slice{{}, {{bytes.data(), bytes.data() + 32, 0}}};
  const Experts overlapping{{{bytes.data(), bytes.data() + 8, 9}}};
  const Experts good{{{bytes.data(), bytes.data() + 32, 8}}};
  CHECK_ERROR(host::Demand{empty_slice}, "expert 1 of a fetch has a slice of 0 bytes");
  CHECK_ERROR(host::Demand{overlapping}, "which overlap");
  const host::Demand demand(good);
  host::CopyEngine engine(1, 1);
  const std::int32_t index = 0;
  CHECK_ERROR(engine.fetch_activated(demand, &index, 1, 2), "4 or 8 bytes each, not 2");
  CHECK_ERROR(engine.fetch_activated(demand, nullptr, 1, 4), "at address 0");
  CHECK_EQUAL(engine.fetch_activated(demand, nullptr, 0, 8), std::size_t{0});
  engine.close();
  CHECK_ERROR(engine.fetch_activated(demand, &index, 1, 4), "closed copy engine");
}

}  // namespace
}  // namespace dwdp
