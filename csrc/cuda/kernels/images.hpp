// The kernels as nvcc compiled them: fat binaries that the build embeds in the module.
#pragma once

namespace dwdp::cuda {

extern const unsigned char kDemandImage[];
extern const unsigned char kSpinImage[];

}  // namespace dwdp::cuda
