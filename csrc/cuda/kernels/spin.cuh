// The name that spin.cu and its launcher agree on.
#pragma once

namespace dwdp::cuda {

// One parameter: unsigned long long, the nanoseconds to spin.
inline constexpr const char* kSpinKernel = "dwdp_spin";

}  // namespace dwdp::cuda
