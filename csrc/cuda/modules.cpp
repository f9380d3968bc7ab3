#include "cuda/modules.hpp"

namespace dwdp::cuda {

CUfunction Modules::kernel(const unsigned char* image, const char* name) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto found = kernels_.find(name);
  if (found != kernels_.end()) return found->second;
  const ContextGuard guard(*context_);
  ModuleHandle& module = modules_[image];
  if (!module) {
    CUmodule loaded = nullptr;
    DWDP_CUDA(ModuleLoadData, (&loaded, image), "loading kernel ", name, " on GPU ",
              context_->device(), "; this build has code for architectures ", DWDP_CUDA_ARCHS,
              " (set DWDP_CUDA_ARCHS and build again for another)");
    module = ModuleHandle(context_, loaded);
  }
  CUfunction function = nullptr;
  DWDP_CUDA(ModuleGetFunction, (&function, module.get(), name), "on GPU ", context_->device());
  kernels_.emplace(name, function);
  return function;
}

}  // namespace dwdp::cuda
