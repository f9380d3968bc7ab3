// Devices and contexts.
#include "device.hpp"

#include <algorithm>
#include <cstdio>
#include <cstring>

#include "control.hpp"
#include "core.hpp"
#include "memory.hpp"
#include "stream.hpp"

namespace standin {
namespace {

constexpr int kMaxDevices = 8;
constexpr int kNumProcessors = 8;

struct Contexts {
  std::mutex mutex;
  std::shared_ptr<Context> primary[kMaxDevices];
  std::int64_t num_orphans = 0;
};

Contexts& contexts() {
  static Contexts& instance = *new Contexts;
  return instance;
}

Registry<CUcontext, Context>& registry() {
  static auto& instance = *new Registry<CUcontext, Context>;
  return instance;
}

std::vector<CUcontext>& stack() {
  thread_local std::vector<CUcontext> contexts_of_thread;
  return contexts_of_thread;
}

int attribute(CUdevice_attribute name) {
  switch (name) {
    case CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED:
      return static_cast<int>(setting("STANDIN_VMM", 1));
    case CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED:
      return posix_supported() ? 1 : 0;
    case CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_FABRIC_SUPPORTED:
      return std::strcmp(fabric_obstacle(), "unsupported") == 0 ? 0 : 1;
    case CU_DEVICE_ATTRIBUTE_ASYNC_ENGINE_COUNT:
      return 3;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR:
      return 9;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT:
      return kNumProcessors;
    case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK:
      return 1024;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE:
      return 32;
    case CU_DEVICE_ATTRIBUTE_UNIFIED_ADDRESSING:
    case CU_DEVICE_ATTRIBUTE_CAN_MAP_HOST_MEMORY:
    case CU_DEVICE_ATTRIBUTE_CONCURRENT_KERNELS:
    case CU_DEVICE_ATTRIBUTE_CAN_USE_STREAM_WAIT_VALUE_NOR_V1:
      return 1;
    default:
      return 0;
  }
}

void destroy(Context& context) {
  std::vector<SignalPtr> tails;
  {
    const std::lock_guard<std::mutex> lock(api_mutex());
    for (const auto& stream : live_streams(context)) tails.push_back(stream->tail());
  }
  for (const SignalPtr& tail : tails) {
    if (tail != nullptr) tail->wait();
  }
  contexts().num_orphans += static_cast<std::int64_t>(drop_streams_and_events(context));
  context.legacy_stream->close();
  free_allocations(context.device);
  registry().remove(context.handle);
}

}  // namespace

int num_devices() {
  return static_cast<int>(std::clamp<std::int64_t>(setting("STANDIN_DEVICES", 1), 0, kMaxDevices));
}

bool valid_device(CUdevice device) { return device >= 0 && device < num_devices(); }

bool can_access_peer(CUdevice device, CUdevice peer) {
  return device == peer || setting("STANDIN_PEER_ACCESS", 1) != 0;
}

bool posix_supported() { return setting("STANDIN_POSIX", 1) != 0; }

const char* fabric_obstacle() {
  const std::string text = text_setting("STANDIN_FABRIC");
  if (text == "1") return "";
  if (text == "deny-create") return "create";
  if (text == "deny-export") return "export";
  return "unsupported";
}

CUresult current_context(std::shared_ptr<Context>* context) {
  if (stack().empty() || stack().back() == nullptr) return CUDA_ERROR_INVALID_CONTEXT;
  *context = registry().find(stack().back());
  if (*context == nullptr) return CUDA_ERROR_CONTEXT_IS_DESTROYED;
  return (*context)->error;
}

std::int64_t live_contexts(const char* kind) {
  const std::string name(kind);
  if (name == "current") {
    return std::count_if(stack().begin(), stack().end(),
                         [](CUcontext context) { return context != nullptr; });
  }
  Contexts& state = contexts();
  const std::lock_guard<std::mutex> lock(state.mutex);
  if (name == "orphans") return state.num_orphans;
  if (name != "contexts") return -1;
  std::int64_t count = 0;
  for (const auto& context : state.primary) {
    if (context != nullptr) count += context->num_references;
  }
  return count;
}

}  // namespace standin

using standin::Context;
using standin::contexts;
using standin::valid_device;

int standin_context_error(int device) {
  const std::lock_guard<std::mutex> lock(contexts().mutex);
  const auto& context = contexts().primary[device];
  return context == nullptr ? 0 : context->error.load();
}

CUresult cuInit(unsigned int Flags) {
  if (const CUresult fault = standin::enter_uninitialized(__func__); fault != CUDA_SUCCESS) {
    return fault;
  }
  if (Flags != 0) return CUDA_ERROR_INVALID_VALUE;
  if (standin::num_devices() == 0) return CUDA_ERROR_NO_DEVICE;
  return standin::mark_initialized() ? CUDA_SUCCESS : CUDA_ERROR_NOT_INITIALIZED;
}

CUresult cuDriverGetVersion(int* driverVersion) {
  if (const CUresult fault = standin::enter_uninitialized(__func__); fault != CUDA_SUCCESS) {
    return fault;
  }
  *driverVersion = standin::driver_version();
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetCount(int* count) {
  STANDIN_ENTER();
  *count = standin::num_devices();
  return CUDA_SUCCESS;
}

CUresult cuDeviceGet(CUdevice* device, int ordinal) {
  STANDIN_ENTER();
  if (!valid_device(ordinal)) return CUDA_ERROR_INVALID_DEVICE;
  *device = ordinal;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetName(char* name, int len, CUdevice dev) {
  STANDIN_ENTER();
  if (!valid_device(dev)) return CUDA_ERROR_INVALID_DEVICE;
  std::snprintf(name, static_cast<std::size_t>(len), "CUDA stand-in");
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetUuid_v2(CUuuid* uuid, CUdevice dev) {
  STANDIN_ENTER();
  if (!valid_device(dev)) return CUDA_ERROR_INVALID_DEVICE;
  std::memset(uuid->bytes, 0, sizeof uuid->bytes);
  std::snprintf(uuid->bytes, sizeof uuid->bytes, "standin-%d", dev);
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetPCIBusId(char* pciBusId, int len, CUdevice dev) {
  STANDIN_ENTER();
  if (!valid_device(dev)) return CUDA_ERROR_INVALID_DEVICE;
  std::snprintf(pciBusId, static_cast<std::size_t>(len), "0000:%02x:00.0", dev + 1);
  return CUDA_SUCCESS;
}

CUresult cuDeviceTotalMem(size_t* bytes, CUdevice dev) {
  STANDIN_ENTER();
  if (!valid_device(dev)) return CUDA_ERROR_INVALID_DEVICE;
  *bytes = standin::limit_bytes();
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int* pi, CUdevice_attribute attrib, CUdevice dev) {
  STANDIN_ENTER();
  if (!valid_device(dev)) return CUDA_ERROR_INVALID_DEVICE;
  if (attrib <= 0 || attrib >= CU_DEVICE_ATTRIBUTE_MAX) return CUDA_ERROR_INVALID_VALUE;
  *pi = standin::attribute(attrib);
  return CUDA_SUCCESS;
}

CUresult cuDeviceCanAccessPeer(int* canAccessPeer, CUdevice dev, CUdevice peerDev) {
  STANDIN_ENTER();
  if (!valid_device(dev) || !valid_device(peerDev)) return CUDA_ERROR_INVALID_DEVICE;
  *canAccessPeer = dev != peerDev && standin::can_access_peer(dev, peerDev) ? 1 : 0;
  return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxRetain(CUcontext* pctx, CUdevice dev) {
  STANDIN_ENTER();
  if (!valid_device(dev)) return CUDA_ERROR_INVALID_DEVICE;
  const std::lock_guard<std::mutex> lock(contexts().mutex);
  auto& primary = contexts().primary[dev];
  if (primary == nullptr) {
    primary = std::make_shared<Context>(dev);
    primary->handle = standin::registry().add(primary);
    primary->legacy_stream = standin::make_legacy_stream(primary);
  }
  ++primary->num_references;
  *pctx = primary->handle;
  return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxRelease(CUdevice dev) {
  STANDIN_ENTER();
  if (!valid_device(dev)) return CUDA_ERROR_INVALID_DEVICE;
  const std::lock_guard<std::mutex> lock(contexts().mutex);
  auto& primary = contexts().primary[dev];
  if (primary == nullptr) return CUDA_ERROR_INVALID_CONTEXT;
  if (--primary->num_references == 0) {
    standin::destroy(*primary);
    primary = nullptr;
  }
  return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxGetState(CUdevice dev, unsigned int* flags, int* active) {
  STANDIN_ENTER();
  if (!valid_device(dev)) return CUDA_ERROR_INVALID_DEVICE;
  const std::lock_guard<std::mutex> lock(contexts().mutex);
  *flags = 0;
  *active = contexts().primary[dev] == nullptr ? 0 : 1;
  return CUDA_SUCCESS;
}

CUresult cuCtxGetCurrent(CUcontext* pctx) {
  STANDIN_ENTER();
  *pctx = standin::stack().empty() ? nullptr : standin::stack().back();
  return CUDA_SUCCESS;
}

CUresult cuCtxSetCurrent(CUcontext ctx) {
  STANDIN_ENTER();
  if (ctx != nullptr && standin::registry().find(ctx) == nullptr) return CUDA_ERROR_INVALID_CONTEXT;
  auto& stack = standin::stack();
  if (!stack.empty()) stack.pop_back();
  if (ctx != nullptr) stack.push_back(ctx);
  return CUDA_SUCCESS;
}

CUresult cuCtxPushCurrent(CUcontext ctx) {
  STANDIN_ENTER();
  if (standin::registry().find(ctx) == nullptr) return CUDA_ERROR_INVALID_CONTEXT;
  standin::stack().push_back(ctx);
  return CUDA_SUCCESS;
}

CUresult cuCtxPopCurrent(CUcontext* pctx) {
  STANDIN_ENTER();
  auto& stack = standin::stack();
  if (stack.empty()) return CUDA_ERROR_INVALID_CONTEXT;
  if (pctx != nullptr) *pctx = stack.back();
  stack.pop_back();
  return CUDA_SUCCESS;
}

#undef cuCtxGetDevice
CUresult cuCtxGetDevice(CUdevice* device) {
  STANDIN_ENTER();
  std::shared_ptr<Context> context;
  STANDIN_TRY(standin::current_context(&context));
  *device = context->device;
  return CUDA_SUCCESS;
}

CUresult cuCtxGetStreamPriorityRange(int* leastPriority, int* greatestPriority) {
  STANDIN_ENTER();
  std::shared_ptr<Context> context;
  STANDIN_TRY(standin::current_context(&context));
  if (leastPriority != nullptr) *leastPriority = 0;
  if (greatestPriority != nullptr) *greatestPriority = -5;
  return CUDA_SUCCESS;
}

CUresult cuMemGetInfo(size_t* free, size_t* total) {
  STANDIN_ENTER();
  std::shared_ptr<Context> context;
  STANDIN_TRY(standin::current_context(&context));
  *total = standin::limit_bytes();
  *free = *total - std::min(*total, standin::used_bytes(context->device));
  return CUDA_SUCCESS;
}
