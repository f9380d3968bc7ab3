// Modules, libraries, and launching their kernels.
#include <cstring>

#include "device.hpp"
#include "kernel.hpp"
#include "stream.hpp"

namespace standin {
namespace {

// Stands for a module and for a library; of either, the image is only checked for being one.
struct Module {
  std::shared_ptr<Context> context;  // null for a library
};

Registry<CUmodule, Module>& modules() {
  static auto& instance = *new Registry<CUmodule, Module>;
  return instance;
}

Registry<CUlibrary, Module>& libraries() {
  static auto& instance = *new Registry<CUlibrary, Module>;
  return instance;
}

// Stands for CUfunction and CUkernel alike. Never freed, as there are few.
struct Function {
  Kernel kernel;
  std::weak_ptr<Module> module;
};

Registry<CUfunction, Function>& functions() {
  static auto& instance = *new Registry<CUfunction, Function>;
  return instance;
}

bool is_fat_binary(const void* image) {
  constexpr std::uint32_t kMagic = 0xBA55ED50;
  std::uint32_t magic = 0;
  if (image != nullptr) std::memcpy(&magic, image, sizeof magic);
  return magic == kMagic;
}

CUresult find_kernel(CUfunction* function, const std::shared_ptr<Module>& module,
                     const char* name) {
  if (module == nullptr) return CUDA_ERROR_INVALID_HANDLE;
  for (Kernel& kernel : project_kernels()) {
    if (kernel.name != name) continue;
    *function = functions().add(std::make_shared<Function>(Function{std::move(kernel), module}));
    return CUDA_SUCCESS;
  }
  return CUDA_ERROR_NOT_FOUND;
}

CUresult launch(CUfunction handle, const Dimensions& dimensions, CUstream stream,
                void** arguments) {
  std::shared_ptr<Context> context;
  STANDIN_TRY(current_context(&context));
  const auto function = functions().find(handle);
  if (function == nullptr || function->module.expired()) return CUDA_ERROR_INVALID_HANDLE;
  const unsigned int threads = dimensions.block[0] * dimensions.block[1] * dimensions.block[2];
  const unsigned int blocks = dimensions.grid[0] * dimensions.grid[1] * dimensions.grid[2];
  if (threads == 0 || threads > 1024 || blocks == 0 || arguments == nullptr) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  auto run = function->kernel.bind(arguments);
  return submit(stream, CU_GRAPH_NODE_TYPE_KERNEL,
                [dimensions, run = std::move(run)] { return run(dimensions); });
}

}  // namespace

std::int64_t live_modules() {
  return static_cast<std::int64_t>(modules().size() + libraries().size());
}

}  // namespace standin

using standin::Dimensions;
using standin::Module;

CUresult cuModuleLoadData(CUmodule* module, const void* image) {
  STANDIN_ENTER();
  std::shared_ptr<standin::Context> context;
  STANDIN_TRY(standin::current_context(&context));
  STANDIN_TRY(standin::check_capture_allows());
  if (!standin::is_fat_binary(image)) return CUDA_ERROR_INVALID_IMAGE;
  *module = standin::modules().add(std::make_shared<Module>(Module{context}));
  return CUDA_SUCCESS;
}

CUresult cuModuleUnload(CUmodule hmod) {
  STANDIN_ENTER();
  return standin::modules().remove(hmod) == nullptr ? CUDA_ERROR_INVALID_HANDLE : CUDA_SUCCESS;
}

CUresult cuModuleGetFunction(CUfunction* hfunc, CUmodule hmod, const char* name) {
  STANDIN_ENTER();
  return standin::find_kernel(hfunc, standin::modules().find(hmod), name);
}

CUresult cuLibraryLoadData(CUlibrary* library, const void* code, CUjit_option* jitOptions,
                           void** jitOptionsValues, unsigned int numJitOptions,
                           CUlibraryOption* libraryOptions, void** libraryOptionValues,
                           unsigned int numLibraryOptions) {
  STANDIN_ENTER();
  (void)jitOptions, (void)jitOptionsValues, (void)numJitOptions;
  (void)libraryOptions, (void)libraryOptionValues, (void)numLibraryOptions;
  if (!standin::is_fat_binary(code)) return CUDA_ERROR_INVALID_IMAGE;
  *library = standin::libraries().add(std::make_shared<Module>());
  return CUDA_SUCCESS;
}

CUresult cuLibraryUnload(CUlibrary library) {
  STANDIN_ENTER();
  return standin::libraries().remove(library) == nullptr ? CUDA_ERROR_INVALID_HANDLE : CUDA_SUCCESS;
}

CUresult cuLibraryGetKernel(CUkernel* pKernel, CUlibrary library, const char* name) {
  STANDIN_ENTER();
  // A CUkernel can be launched where a CUfunction can.
  return standin::find_kernel(reinterpret_cast<CUfunction*>(pKernel),
                              standin::libraries().find(library), name);
}

CUresult cuKernelGetFunction(CUfunction* pFunc, CUkernel kernel) {
  STANDIN_ENTER();
  *pFunc = reinterpret_cast<CUfunction>(kernel);
  return CUDA_SUCCESS;
}

CUresult cuLaunchKernel(CUfunction f, unsigned int gridDimX, unsigned int gridDimY,
                        unsigned int gridDimZ, unsigned int blockDimX, unsigned int blockDimY,
                        unsigned int blockDimZ, unsigned int sharedMemBytes, CUstream hStream,
                        void** kernelParams, void** extra) {
  STANDIN_ENTER();
  if (extra != nullptr) return CUDA_ERROR_NOT_SUPPORTED;
  return standin::launch(
      f,
      Dimensions{{gridDimX, gridDimY, gridDimZ}, {blockDimX, blockDimY, blockDimZ}, sharedMemBytes},
      hStream, kernelParams);
}

CUresult cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction f, void** kernelParams,
                          void** extra) {
  STANDIN_ENTER();
  if (extra != nullptr) return CUDA_ERROR_NOT_SUPPORTED;
  return standin::launch(f,
                         Dimensions{{config->gridDimX, config->gridDimY, config->gridDimZ},
                                    {config->blockDimX, config->blockDimY, config->blockDimZ},
                                    config->sharedMemBytes},
                         config->hStream, kernelParams);
}
