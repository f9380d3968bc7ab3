#pragma once

#include <map>
#include <mutex>
#include <string>

#include "cuda/handle.hpp"

namespace dwdp::cuda {

// The embedded kernels of one device, each image loaded when a kernel of it is first wanted.
class Modules {
 public:
  explicit Modules(Context context) noexcept : context_(std::move(context)) {}
  Modules(const Modules&) = delete;
  Modules& operator=(const Modules&) = delete;

  // Throws FabricError when the image holds no code for the device.
  CUfunction kernel(const unsigned char* image, const char* name);

 private:
  struct ModuleTraits {
    using Type = CUmodule;
    static void destroy(CUmodule module) noexcept { driver().ModuleUnload(module); }
  };
  using ModuleHandle = Handle<ModuleTraits>;

  const Context context_;
  std::mutex mutex_;
  std::map<const unsigned char*, ModuleHandle> modules_;
  std::map<std::string, CUfunction> kernels_;
};

}  // namespace dwdp::cuda
