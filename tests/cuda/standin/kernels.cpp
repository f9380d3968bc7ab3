// The project's kernels. Fetching on demand runs the source that nvcc compiles, phase by phase; a
// spin is a sleep.
#include <algorithm>
#include <chrono>
#include <numeric>
#include <random>
#include <thread>

#include "cuda/kernels/demand.cuh"
#include "cuda/kernels/spin.cuh"
#include "kernel.hpp"
#include "memory.hpp"

namespace standin {
namespace {

using dwdp::cuda::DemandArguments;
using dwdp::cuda::DemandSlice;

bool readable(const void* address, std::size_t num_bytes) {
  return num_bytes == 0 || AddressSpace::instance().accessible(
                               reinterpret_cast<CUdeviceptr>(address), num_bytes, /*write=*/false);
}

bool writable(const void* address, std::size_t num_bytes) {
  return AddressSpace::instance().accessible(reinterpret_cast<CUdeviceptr>(address), num_bytes,
                                             /*write=*/true);
}

bool marked(const std::vector<std::uint32_t>& activated, std::uint32_t expert) {
  return (activated[expert / 32] >> (expert % 32) & 1) != 0;
}

// What a GPU would find while it runs.
CUresult check_tables(const DemandArguments& arguments) {
  const std::size_t num_firsts = arguments.num_experts + std::size_t{1};
  const bool all = readable(arguments.first_slice, num_firsts * sizeof(std::uint32_t)) &&
                   readable(arguments.slices,
                            arguments.first_slice[arguments.num_experts] * sizeof(DemandSlice)) &&
                   readable(arguments.indices, arguments.num_indices * arguments.index_bytes) &&
                   (arguments.num_bytes_fetched == nullptr ||
                    writable(arguments.num_bytes_fetched, sizeof(unsigned long long)));
  return all ? CUDA_SUCCESS : CUDA_ERROR_ILLEGAL_ADDRESS;
}

CUresult check_slices(const DemandArguments& arguments,
                      const std::vector<std::uint32_t>& activated) {
  for (std::uint32_t expert = 0; expert < arguments.num_experts; ++expert) {
    if (!marked(activated, expert)) continue;
    for (std::uint32_t i = arguments.first_slice[expert]; i < arguments.first_slice[expert + 1];
         ++i) {
      const DemandSlice& slice = arguments.slices[i];
      if (!readable(slice.src, slice.num_bytes) || !writable(slice.dst, slice.num_bytes)) {
        return CUDA_ERROR_ILLEGAL_ADDRESS;
      }
      if ((reinterpret_cast<std::uintptr_t>(slice.src) -
           reinterpret_cast<std::uintptr_t>(slice.dst)) %
              dwdp::cuda::kVectorBytes !=
          0) {
        return CUDA_ERROR_MISALIGNED_ADDRESS;
      }
    }
  }
  return CUDA_SUCCESS;
}

CUresult fetch_activated(const Dimensions& dimensions, DemandArguments arguments) {
  const std::uint32_t num_words = dwdp::cuda::demand_words(arguments.num_experts);
  if (dimensions.block[0] != dwdp::cuda::kDemandThreads ||
      dimensions.shared_bytes < num_words * sizeof(std::uint32_t)) {
    return CUDA_ERROR_LAUNCH_FAILED;
  }
  STANDIN_TRY(check_tables(arguments));
  std::vector<unsigned int> blocks(dimensions.grid[0]);
  std::iota(blocks.begin(), blocks.end(), 0U);
  std::shuffle(blocks.begin(), blocks.end(), std::mt19937_64(new_handle()));
  for (const unsigned int block : blocks) {
    // Shared memory holds anything at first.
    std::vector<std::uint32_t> activated(num_words, 0xA5A5A5A5);
    const auto each_thread = [](const auto& body) {
      for (unsigned int thread = 0; thread < dwdp::cuda::kDemandThreads; ++thread) body(thread);
    };
    each_thread([&](unsigned int thread) {
      dwdp::cuda::demand_clear(arguments, activated.data(), thread);
    });
    each_thread(
        [&](unsigned int thread) { dwdp::cuda::demand_mark(arguments, activated.data(), thread); });
    STANDIN_TRY(check_slices(arguments, activated));
    each_thread([&](unsigned int thread) {
      dwdp::cuda::demand_copy(arguments, activated.data(), block, dimensions.grid[0], thread);
    });
  }
  return CUDA_SUCCESS;
}

CUresult spin(const Dimensions& /*dimensions*/, unsigned long long nanoseconds) {
  std::this_thread::sleep_for(std::chrono::nanoseconds(nanoseconds));
  return CUDA_SUCCESS;
}

}  // namespace

std::vector<Kernel> project_kernels() {
  return {make_kernel(dwdp::cuda::kDemandKernel, &fetch_activated),
          make_kernel(dwdp::cuda::kSpinKernel, &spin)};
}

}  // namespace standin
