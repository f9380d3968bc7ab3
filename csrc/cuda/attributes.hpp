#pragma once

#include <string>

#include "cuda/context.hpp"

namespace dwdp::cuda {

// What the driver says of one GPU.
struct DeviceAttributes {
  std::string name;
  std::string uuid;  // as nvidia-smi prints it, without "GPU-"
  bool supports_virtual_memory;
  bool supports_posix_handles;
  bool supports_fabric_handles;  // whether they really work shows when one is exported
  int num_copy_engines;
  int num_multiprocessors;
  int compute_capability_major;
  int compute_capability_minor;
};

DeviceAttributes query_attributes(const PrimaryContext& context);

}  // namespace dwdp::cuda
