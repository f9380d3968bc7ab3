#include "cuda/driver.hpp"

#include <dlfcn.h>

#include <string>

namespace dwdp::cuda {
namespace {

constexpr const char* kLibrary = "libcuda.so.1";

class Loader {
 public:
  // Streams of 0 are the legacy default stream, as in torch.
  template <typename Function>
  bool find(const char* name, int version, Function* function) const {
    void* found = nullptr;
    CUdriverProcAddressQueryResult status;
    const CUresult result =
        get_proc_address_(name, &found, version, CU_GET_PROC_ADDRESS_LEGACY_STREAM, &status);
    *function = result == CUDA_SUCCESS ? reinterpret_cast<Function>(found) : nullptr;
    return *function != nullptr;
  }

  Loader() {
    // Never closed: what was loaded from it lives as long as the process.
    void* const library = dlopen(kLibrary, RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) {
      const char* const reason = dlerror();
      throw FabricError(
          concat("the NVIDIA driver is not installed, or not visible in this container: ",
                 reason != nullptr ? reason : kLibrary));
    }
    get_proc_address_ =
        reinterpret_cast<PFN_cuGetProcAddress_v12000>(dlsym(library, "cuGetProcAddress_v2"));
    DWDP_CHECK(get_proc_address_ != nullptr,
               "the NVIDIA driver is older than CUDA 12.0; install one of CUDA 12.0 or newer");
  }

 private:
  PFN_cuGetProcAddress_v12000 get_proc_address_;
};

std::string or_unknown(const char* text) {
  return text != nullptr ? text : "unknown to the driver";
}

FabricError describe(const Driver& driver, const char* call, CUresult result,
                     const std::string& detail) {
  const char* name = nullptr;
  const char* text = nullptr;
  if (driver.GetErrorName(result, &name) != CUDA_SUCCESS) name = nullptr;
  if (driver.GetErrorString(result, &text) != CUDA_SUCCESS) text = nullptr;
  return FabricError(call, {or_unknown(name), static_cast<int>(result), or_unknown(text)}, detail);
}

Driver load() {
  const Loader loader;
  Driver driver;
#define DWDP_LOAD(name, version)                                                                  \
  DWDP_CHECK(loader.find("cu" #name, version, &driver.name), "the NVIDIA driver lacks cu", #name, \
             "; install one of CUDA 12.0 or newer");
  DWDP_DRIVER_ENTRY_POINTS(DWDP_LOAD)
#undef DWDP_LOAD
  const CUresult version_result = driver.DriverGetVersion(&driver.version);
  if (version_result != CUDA_SUCCESS) {
    throw describe(driver, "cuDriverGetVersion", version_result, "asking for the driver's version");
  }
  // Nothing is asked for that the driver is too old for: checkers report such calls as errors.
  const auto find_since = [&](int version, const char* name, auto* function) {
    return driver.version >= version && loader.find(name, version, function);
  };
  if (!find_since(13000, "cuMemcpyBatchAsync", &driver.memcpy_batch_async_13)) {
    find_since(12080, "cuMemcpyBatchAsync", &driver.memcpy_batch_async_12);
  }
  if (!find_since(12030, "cuStreamGetCaptureInfo", &driver.stream_get_capture_info_12_3)) {
    DWDP_CHECK(loader.find("cuStreamGetCaptureInfo", 11030, &driver.stream_get_capture_info_11_3),
               "the NVIDIA driver lacks cuStreamGetCaptureInfo; install one of CUDA 12.0 or newer");
  }
  const CUresult result = driver.Init(0);
  if (result == CUDA_ERROR_NO_DEVICE) {
    throw describe(driver, "cuInit", result,
                   "the NVIDIA driver sees no GPU; check nvidia-smi and CUDA_VISIBLE_DEVICES");
  }
  if (result != CUDA_SUCCESS)
    throw describe(driver, "cuInit", result, "starting the NVIDIA driver");
  return driver;
}

}  // namespace

const Driver& driver() {
  static const Driver loaded = load();
  return loaded;
}

FabricError driver_error(const char* call, CUresult result, const std::string& detail) {
  return describe(driver(), call, result, detail);
}

}  // namespace dwdp::cuda
