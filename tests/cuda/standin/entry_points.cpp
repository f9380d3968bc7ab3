// cuGetProcAddress, and the table behind it.
#include <cudaTypedefs.h>

#include <cstring>
#include <sstream>

#include "core.hpp"

namespace standin {

CUresult memcpy_batch_v12080(CUdeviceptr*, CUdeviceptr*, size_t*, size_t, CUmemcpyAttributes*,
                             size_t*, size_t, size_t*, CUstream);
CUresult memcpy_batch_v13000(CUdeviceptr*, CUdeviceptr*, size_t*, size_t, CUmemcpyAttributes*,
                             size_t*, size_t, CUstream);

namespace {

// `version`: of the CUDA release that introduced this form of the function.
struct EntryPoint {
  const char* name;
  int version;
  void* address;
};

template <typename Expected, typename Actual>
void* checked(Actual* function) {
  static_assert(std::is_same_v<Expected, Actual*>, "not the signature that CUDA documents");
  return reinterpret_cast<void*>(function);
}

// The function `symbol` is what CUDA's headers call PFN_<name>_v<version>.
#define STANDIN_ENTRY_AS(name, version, symbol) \
  {#name, version, checked<PFN_##name##_v##version>(&(symbol))}
#define STANDIN_ENTRY(name, version) {#name, version, checked<PFN_##name##_v##version>(&(name))}

extern "C" {
CUresult cuStreamGetCaptureInfo_v2(CUstream, CUstreamCaptureStatus*, cuuint64_t*, CUgraph*,
                                   const CUgraphNode**, size_t*);
CUresult cuStreamGetCaptureInfo_v3(CUstream, CUstreamCaptureStatus*, cuuint64_t*, CUgraph*,
                                   const CUgraphNode**, const CUgraphEdgeData**, size_t*);
CUresult cuStreamUpdateCaptureDependencies_v2(CUstream, CUgraphNode*, const CUgraphEdgeData*,
                                              size_t, unsigned int);
#undef cuGetProcAddress
#undef cuStreamUpdateCaptureDependencies
#undef cuStreamGetCtx
#undef cuCtxSynchronize
#undef cuCtxGetDevice
CUresult cuStreamUpdateCaptureDependencies(CUstream, CUgraphNode*, size_t, unsigned int);
CUresult cuGetProcAddress(const char* symbol, void** pfn, int cudaVersion, cuuint64_t flags);
}

const EntryPoint kEntryPoints[] = {
    STANDIN_ENTRY_AS(cuGetProcAddress, 11030, cuGetProcAddress),
    STANDIN_ENTRY_AS(cuGetProcAddress, 12000, cuGetProcAddress_v2),
    STANDIN_ENTRY(cuInit, 2000),
    STANDIN_ENTRY(cuDriverGetVersion, 2020),
    STANDIN_ENTRY(cuGetErrorName, 6000),
    STANDIN_ENTRY(cuGetErrorString, 6000),
    STANDIN_ENTRY(cuDeviceGetCount, 2000),
    STANDIN_ENTRY(cuDeviceGet, 2000),
    STANDIN_ENTRY(cuDeviceGetName, 2000),
    STANDIN_ENTRY_AS(cuDeviceGetUuid, 9020, cuDeviceGetUuid_v2),
    STANDIN_ENTRY_AS(cuDeviceGetUuid, 11040, cuDeviceGetUuid_v2),
    STANDIN_ENTRY(cuDeviceGetPCIBusId, 4010),
    STANDIN_ENTRY(cuDeviceTotalMem, 3020),
    STANDIN_ENTRY(cuDeviceGetAttribute, 2000),
    STANDIN_ENTRY(cuDeviceCanAccessPeer, 4000),
    STANDIN_ENTRY(cuDevicePrimaryCtxRetain, 7000),
    STANDIN_ENTRY(cuDevicePrimaryCtxRelease, 11000),
    STANDIN_ENTRY(cuDevicePrimaryCtxGetState, 7000),
    STANDIN_ENTRY(cuCtxGetCurrent, 4000),
    STANDIN_ENTRY(cuCtxSetCurrent, 4000),
    STANDIN_ENTRY(cuCtxPushCurrent, 4000),
    STANDIN_ENTRY(cuCtxPopCurrent, 4000),
    STANDIN_ENTRY(cuCtxGetDevice, 2000),
    STANDIN_ENTRY(cuCtxSynchronize, 2000),
    STANDIN_ENTRY(cuCtxGetStreamPriorityRange, 5050),
    STANDIN_ENTRY(cuMemGetInfo, 3020),
    STANDIN_ENTRY(cuMemAlloc, 3020),
    STANDIN_ENTRY(cuMemFree, 3020),
    STANDIN_ENTRY(cuMemAllocHost, 3020),
    STANDIN_ENTRY(cuMemHostAlloc, 2020),
    STANDIN_ENTRY(cuMemHostGetDevicePointer, 3020),
    STANDIN_ENTRY(cuMemFreeHost, 2000),
    STANDIN_ENTRY(cuMemGetAllocationGranularity, 10020),
    STANDIN_ENTRY(cuMemCreate, 10020),
    STANDIN_ENTRY(cuMemRelease, 10020),
    STANDIN_ENTRY(cuMemRetainAllocationHandle, 11000),
    STANDIN_ENTRY(cuMemGetAllocationPropertiesFromHandle, 10020),
    STANDIN_ENTRY(cuMemExportToShareableHandle, 10020),
    STANDIN_ENTRY(cuMemImportFromShareableHandle, 10020),
    STANDIN_ENTRY(cuMemAddressReserve, 10020),
    STANDIN_ENTRY(cuMemAddressFree, 10020),
    STANDIN_ENTRY(cuMemMap, 10020),
    STANDIN_ENTRY(cuMemUnmap, 10020),
    STANDIN_ENTRY(cuMemSetAccess, 10020),
    STANDIN_ENTRY(cuMemGetAccess, 10020),
    STANDIN_ENTRY(cuMemcpy, 4000),
    STANDIN_ENTRY(cuMemcpyAsync, 4000),
    STANDIN_ENTRY(cuMemcpyHtoD, 3020),
    STANDIN_ENTRY(cuMemcpyDtoH, 3020),
    STANDIN_ENTRY(cuMemcpyDtoD, 3020),
    STANDIN_ENTRY(cuMemcpyHtoDAsync, 3020),
    STANDIN_ENTRY(cuMemcpyDtoHAsync, 3020),
    STANDIN_ENTRY(cuMemcpyDtoDAsync, 3020),
    STANDIN_ENTRY(cuMemsetD8, 3020),
    STANDIN_ENTRY(cuMemsetD32, 3020),
    STANDIN_ENTRY(cuMemsetD8Async, 3020),
    STANDIN_ENTRY(cuMemsetD32Async, 3020),
    STANDIN_ENTRY_AS(cuMemcpyBatchAsync, 12080, memcpy_batch_v12080),
#if CUDA_VERSION >= 13000
    STANDIN_ENTRY_AS(cuMemcpyBatchAsync, 13000, memcpy_batch_v13000),
#endif
    STANDIN_ENTRY(cuStreamCreate, 2000),
    STANDIN_ENTRY(cuStreamCreateWithPriority, 5050),
    STANDIN_ENTRY(cuStreamDestroy, 4000),
    STANDIN_ENTRY(cuStreamQuery, 2000),
    STANDIN_ENTRY(cuStreamSynchronize, 2000),
    STANDIN_ENTRY(cuStreamWaitEvent, 3020),
    STANDIN_ENTRY(cuStreamGetCtx, 9020),
    STANDIN_ENTRY(cuStreamGetFlags, 5050),
    STANDIN_ENTRY(cuStreamGetPriority, 5050),
    STANDIN_ENTRY(cuStreamGetId, 12000),
    STANDIN_ENTRY(cuLaunchHostFunc, 10000),
    STANDIN_ENTRY(cuStreamBeginCapture, 10010),
    STANDIN_ENTRY(cuStreamEndCapture, 10000),
    STANDIN_ENTRY(cuStreamIsCapturing, 10000),
    STANDIN_ENTRY_AS(cuStreamGetCaptureInfo, 11030, cuStreamGetCaptureInfo_v2),
    STANDIN_ENTRY_AS(cuStreamGetCaptureInfo, 12030, cuStreamGetCaptureInfo_v3),
    STANDIN_ENTRY_AS(cuStreamUpdateCaptureDependencies, 11030, cuStreamUpdateCaptureDependencies),
    STANDIN_ENTRY_AS(cuStreamUpdateCaptureDependencies, 12030,
                     cuStreamUpdateCaptureDependencies_v2),
    STANDIN_ENTRY(cuThreadExchangeStreamCaptureMode, 10010),
    STANDIN_ENTRY(cuEventCreate, 2000),
    STANDIN_ENTRY(cuEventRecord, 2000),
    STANDIN_ENTRY(cuEventRecordWithFlags, 11010),
    STANDIN_ENTRY(cuEventQuery, 2000),
    STANDIN_ENTRY(cuEventSynchronize, 2000),
    STANDIN_ENTRY(cuEventDestroy, 4000),
    STANDIN_ENTRY_AS(cuEventElapsedTime, 2000, cuEventElapsedTime_v2),
    STANDIN_ENTRY_AS(cuEventElapsedTime, 12080, cuEventElapsedTime_v2),
    STANDIN_ENTRY(cuGraphCreate, 10000),
    STANDIN_ENTRY(cuGraphDestroy, 10000),
    STANDIN_ENTRY(cuGraphInstantiateWithFlags, 11040),
    {"cuGraphInstantiate", 12000, reinterpret_cast<void*>(&cuGraphInstantiateWithFlags)},
    STANDIN_ENTRY(cuGraphExecDestroy, 10000),
    STANDIN_ENTRY(cuGraphUpload, 11010),
    STANDIN_ENTRY(cuGraphLaunch, 10000),
    STANDIN_ENTRY(cuGraphAddMemcpyNode, 10000),
    STANDIN_ENTRY(cuGraphAddEmptyNode, 10000),
    STANDIN_ENTRY(cuGraphAddHostNode, 10000),
    STANDIN_ENTRY(cuGraphAddEventRecordNode, 11010),
    STANDIN_ENTRY(cuGraphAddEventWaitNode, 11010),
    STANDIN_ENTRY(cuGraphGetNodes, 10000),
    STANDIN_ENTRY(cuGraphNodeGetType, 10000),
    STANDIN_ENTRY(cuModuleLoadData, 2000),
    STANDIN_ENTRY(cuModuleUnload, 2000),
    STANDIN_ENTRY(cuModuleGetFunction, 2000),
    STANDIN_ENTRY(cuLibraryLoadData, 12000),
    STANDIN_ENTRY(cuLibraryUnload, 12000),
    STANDIN_ENTRY(cuLibraryGetKernel, 12000),
    STANDIN_ENTRY(cuKernelGetFunction, 12000),
    STANDIN_ENTRY(cuLaunchKernel, 4000),
    STANDIN_ENTRY(cuLaunchKernelEx, 11060),
};

#undef STANDIN_ENTRY
#undef STANDIN_ENTRY_AS

// Names in STANDIN_HIDE, separated by commas, are not there.
bool hidden(const char* symbol) {
  std::stringstream names(text_setting("STANDIN_HIDE"));
  std::string name;
  while (std::getline(names, name, ',')) {
    if (name == symbol) return true;
  }
  return false;
}

CUresult find_entry(const char* symbol, int version, void** address,
                    CUdriverProcAddressQueryResult* status) {
  *address = nullptr;
  *status = CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND;
  if (version > driver_version()) {
    count_misuse("unknown version");
    return CUDA_ERROR_INVALID_VALUE;
  }
  if (hidden(symbol)) return CUDA_SUCCESS;
  for (const EntryPoint& entry : kEntryPoints) {
    if (std::strcmp(entry.name, symbol) != 0 || entry.version > driver_version()) continue;
    if (entry.version <= version) {
      *address = entry.address;  // the last one is the newest
      *status = CU_GET_PROC_ADDRESS_SUCCESS;
    } else if (*address == nullptr) {
      *status = CU_GET_PROC_ADDRESS_VERSION_NOT_SUFFICIENT;
    }
  }
  return CUDA_SUCCESS;
}

}  // namespace
}  // namespace standin

CUresult cuGetProcAddress_v2(const char* symbol, void** pfn, int cudaVersion, cuuint64_t flags,
                             CUdriverProcAddressQueryResult* symbolStatus) {
  if (const CUresult fault = standin::enter_uninitialized(__func__); fault != CUDA_SUCCESS) {
    return fault;
  }
  (void)flags;
  CUdriverProcAddressQueryResult status;
  const CUresult result = standin::find_entry(symbol, cudaVersion, pfn, &status);
  if (symbolStatus != nullptr) *symbolStatus = status;
  return result;
}

// The older form answers NOT_FOUND where the newer one sets a status.
extern "C" CUresult cuGetProcAddress(const char* symbol, void** pfn, int cudaVersion,
                                     cuuint64_t flags) {
  CUdriverProcAddressQueryResult status;
  const CUresult result = cuGetProcAddress_v2(symbol, pfn, cudaVersion, flags, &status);
  if (result == CUDA_SUCCESS && *pfn == nullptr) return CUDA_ERROR_NOT_FOUND;
  return result;
}
