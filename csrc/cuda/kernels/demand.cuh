// The kernel that fetches activated experts, as what each of its threads does between two barriers.
// Plain C++ as well as CUDA, so that it can be run, and tested, where there is no GPU:
//
//   per block:  demand_clear by every thread;  barrier;
//               demand_mark by every thread;   barrier;
//               demand_copy by every thread
//
// The blocks share out tiles of the activated experts' slices and never wait for each other. A tile
// is loaded whole before any of it is stored: what counts over a link is how many bytes are asked
// for at a time. 16 blocks of 64 KiB each are 1 MiB on the way, enough for 450 GB/s at 2 us.
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef __CUDACC__
#define DWDP_HOST_DEVICE __host__ __device__ __forceinline__
#else
#include <cstring>
#define DWDP_HOST_DEVICE inline
#endif

namespace dwdp::cuda {

inline constexpr const char* kDemandKernel = "dwdp_fetch_activated";
inline constexpr unsigned int kDemandThreads = 512;
inline constexpr unsigned int kVectorsPerThread = 8;
inline constexpr std::size_t kVectorBytes = 16;
inline constexpr std::uint64_t kTileVectors = std::uint64_t{kDemandThreads} * kVectorsPerThread;

// One slice of one expert. `dst` and `src` have the same remainder modulo 16.
struct DemandSlice {
  unsigned char* dst;
  const unsigned char* src;
  std::uint64_t num_bytes;
};

struct DemandArguments {
  const DemandSlice* slices;  // of all experts, one after the other
  const std::uint32_t*
      first_slice;      // [num_experts + 1]: expert e has [first_slice[e], first_slice[e + 1])
  const void* indices;  // [num_indices], int32 or int64: the router's choice
  std::uint64_t num_indices;
  unsigned long long* num_bytes_fetched;  // added to; may be null
  std::uint32_t num_experts;
  std::uint32_t index_bytes;  // 4 or 8
};

// A block's shared memory: one bit per expert.
DWDP_HOST_DEVICE constexpr std::uint32_t demand_words(std::uint32_t num_experts) {
  return (num_experts + 31) / 32;
}

struct alignas(kVectorBytes) DemandVector {
  std::uint32_t words[4];
};

DWDP_HOST_DEVICE DemandVector load_vector(const unsigned char* address) {
#ifdef __CUDA_ARCH__
  // Read once: it shall not displace what compute will read again.
  const uint4 loaded = __ldcs(reinterpret_cast<const uint4*>(address));
  return {{loaded.x, loaded.y, loaded.z, loaded.w}};
#else
  return *reinterpret_cast<const DemandVector*>(address);
#endif
}

DWDP_HOST_DEVICE void store_vector(unsigned char* address, const DemandVector& vector) {
  *reinterpret_cast<DemandVector*>(address) = vector;
}

DWDP_HOST_DEVICE void demand_clear(const DemandArguments& arguments, std::uint32_t* activated,
                                   unsigned int thread) {
  const std::uint32_t num_words = demand_words(arguments.num_experts);
  for (std::uint32_t word = thread; word < num_words; word += kDemandThreads) activated[word] = 0;
}

// Sets the bit of every expert that the router chose. Ids that are no expert's are ignored:
// engines mark padding so.
DWDP_HOST_DEVICE void demand_mark(const DemandArguments& arguments, std::uint32_t* activated,
                                  unsigned int thread) {
  for (std::uint64_t i = thread; i < arguments.num_indices; i += kDemandThreads) {
    const std::int64_t expert = arguments.index_bytes == 8
                                    ? static_cast<const std::int64_t*>(arguments.indices)[i]
                                    : static_cast<const std::int32_t*>(arguments.indices)[i];
    if (expert < 0 || expert >= static_cast<std::int64_t>(arguments.num_experts)) continue;
    const std::uint32_t bit = std::uint32_t{1} << (expert % 32);
#ifdef __CUDA_ARCH__
    atomicOr(&activated[expert / 32], bit);
#else
    activated[expert / 32] |= bit;
#endif
  }
}

// This thread's part of the tile that starts at vector `first` of `num_vectors`.
DWDP_HOST_DEVICE void copy_tile(unsigned char* dst, const unsigned char* src, std::uint64_t first,
                                std::uint64_t num_vectors, unsigned int thread) {
  DemandVector vectors[kVectorsPerThread];
#ifdef __CUDA_ARCH__
#pragma unroll
#endif
  for (unsigned int i = 0; i < kVectorsPerThread; ++i) {
    const std::uint64_t vector = first + std::uint64_t{i} * kDemandThreads + thread;
    if (vector < num_vectors) vectors[i] = load_vector(src + vector * kVectorBytes);
  }
#ifdef __CUDA_ARCH__
#pragma unroll
#endif
  for (unsigned int i = 0; i < kVectorsPerThread; ++i) {
    const std::uint64_t vector = first + std::uint64_t{i} * kDemandThreads + thread;
    if (vector < num_vectors) store_vector(dst + vector * kVectorBytes, vectors[i]);
  }
}

// The bytes before the first whole vector and behind the last one: fewer than 16 each.
DWDP_HOST_DEVICE void copy_ends(const DemandSlice& slice, std::uint64_t head, std::uint64_t body,
                                unsigned int thread) {
  if (thread < head) slice.dst[thread] = slice.src[thread];
  const std::uint64_t last = head + body + thread;
  if (thread < kVectorBytes && last < slice.num_bytes) slice.dst[last] = slice.src[last];
}

// Tiles of all activated slices are counted through; this block takes every `num_blocks`-th.
DWDP_HOST_DEVICE void demand_copy(const DemandArguments& arguments, const std::uint32_t* activated,
                                  unsigned int block, unsigned int num_blocks,
                                  unsigned int thread) {
  std::uint64_t num_bytes = 0;
  unsigned int next = block;  // tiles to pass over until this block's turn
  for (std::uint32_t expert = 0; expert < arguments.num_experts; ++expert) {
    if ((activated[expert / 32] >> (expert % 32) & 1) == 0) continue;
    const std::uint32_t stop = arguments.first_slice[expert + 1];
    for (std::uint32_t i = arguments.first_slice[expert]; i < stop; ++i) {
      const DemandSlice slice = arguments.slices[i];
      num_bytes += slice.num_bytes;
      const std::uint64_t to_aligned = -reinterpret_cast<std::uintptr_t>(slice.dst) % kVectorBytes;
      const std::uint64_t head = to_aligned < slice.num_bytes ? to_aligned : slice.num_bytes;
      const std::uint64_t num_vectors = (slice.num_bytes - head) / kVectorBytes;
      // The ends go with the first tile, which is there even if it has no vectors.
      const std::uint64_t full = (num_vectors + kTileVectors - 1) / kTileVectors;
      const std::uint64_t num_tiles = full > 0 ? full : 1;
      if (next == 0) copy_ends(slice, head, num_vectors * kVectorBytes, thread);
      std::uint64_t tile = next;
      for (; tile < num_tiles; tile += num_blocks) {
        copy_tile(slice.dst + head, slice.src + head, tile * kTileVectors, num_vectors, thread);
      }
      next = static_cast<unsigned int>(tile - num_tiles);
    }
  }
  if (block != 0 || thread != 0 || arguments.num_bytes_fetched == nullptr) return;
#ifdef __CUDA_ARCH__
  atomicAdd(arguments.num_bytes_fetched, static_cast<unsigned long long>(num_bytes));
#else
  *arguments.num_bytes_fetched += num_bytes;
#endif
}

}  // namespace dwdp::cuda
