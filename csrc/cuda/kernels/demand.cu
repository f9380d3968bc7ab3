#include "cuda/kernels/demand.cuh"

extern "C" __global__ void __launch_bounds__(dwdp::cuda::kDemandThreads)
    dwdp_fetch_activated(const dwdp::cuda::DemandArguments arguments) {
  extern __shared__ std::uint32_t activated[];
  dwdp::cuda::demand_clear(arguments, activated, threadIdx.x);
  __syncthreads();
  dwdp::cuda::demand_mark(arguments, activated, threadIdx.x);
  __syncthreads();
  dwdp::cuda::demand_copy(arguments, activated, blockIdx.x, gridDim.x, threadIdx.x);
}
