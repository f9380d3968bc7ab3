#include "cuda/kernels/demand.cuh"

extern "C" __global__ void __launch_bounds__(dwdp::cuda::kDemandThreads)
    dwdp_fetch_activated(const dwdp::cuda::DemandArguments arguments) {
  extern __shared__ std::uint32_t activated[];
  dwdp::cuda::demand_clear(arguments, activated, threadIdx.x);
  __syncthreads();
  dwdp::cuda::demand_mark(arguments, activated, threadIdx.x);
  __syncthreads();
  dwdp::cuda::demand_copy(arguments, activated, blockIdx.x, gridDim.x, threadIdx.x);
  // A kernel that is launched with programmatic stream serialization starts when the last block
  // exits, and may load weights before it waits for this kernel's memory to be flushed: by TMA too,
  // which reads through a proxy of its own (CUDA programming guide, programmatic dependent launch;
  // PTX ISA, fence.proxy).
  __threadfence();
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.proxy.async.global;" ::: "memory");
#endif
}
