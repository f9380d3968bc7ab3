// The CUDA driver, loaded when it is first used: the module is not linked against it, so that one
// build imports on machines without a GPU and works with any driver since CUDA 12.0.
#pragma once

#include <cuda.h>
#include <cudaTypedefs.h>

#include <cstddef>

#include "common/error.hpp"

// Entry points that every driver has: name without "cu", and the version that introduced the
// signature. The types come from the toolkit's headers, so the two cannot disagree.
#define DWDP_DRIVER_ENTRY_POINTS(ENTRY)         \
  ENTRY(Init, 2000)                             \
  ENTRY(DriverGetVersion, 2020)                 \
  ENTRY(GetErrorName, 6000)                     \
  ENTRY(GetErrorString, 6000)                   \
  ENTRY(DeviceGetCount, 2000)                   \
  ENTRY(DeviceGet, 2000)                        \
  ENTRY(DeviceGetName, 2000)                    \
  ENTRY(DeviceGetUuid, 11040)                   \
  ENTRY(DeviceGetAttribute, 2000)               \
  ENTRY(DeviceCanAccessPeer, 4000)              \
  ENTRY(DevicePrimaryCtxRetain, 7000)           \
  ENTRY(DevicePrimaryCtxRelease, 11000)         \
  ENTRY(CtxPushCurrent, 4000)                   \
  ENTRY(CtxPopCurrent, 4000)                    \
  ENTRY(CtxSynchronize, 2000)                   \
  ENTRY(ThreadExchangeStreamCaptureMode, 10010) \
  ENTRY(MemGetInfo, 3020)                       \
  ENTRY(MemGetAllocationGranularity, 10020)     \
  ENTRY(MemCreate, 10020)                       \
  ENTRY(MemRelease, 10020)                      \
  ENTRY(MemExportToShareableHandle, 10020)      \
  ENTRY(MemImportFromShareableHandle, 10020)    \
  ENTRY(MemAddressReserve, 10020)               \
  ENTRY(MemAddressFree, 10020)                  \
  ENTRY(MemMap, 10020)                          \
  ENTRY(MemUnmap, 10020)                        \
  ENTRY(MemSetAccess, 10020)                    \
  ENTRY(MemAlloc, 3020)                         \
  ENTRY(MemFree, 3020)                          \
  ENTRY(MemcpyAsync, 4000)                      \
  ENTRY(MemsetD8Async, 3020)                    \
  ENTRY(StreamCreate, 2000)                     \
  ENTRY(StreamDestroy, 4000)                    \
  ENTRY(StreamSynchronize, 2000)                \
  ENTRY(StreamWaitEvent, 3020)                  \
  ENTRY(StreamUpdateCaptureDependencies, 11030) \
  ENTRY(EventCreate, 2000)                      \
  ENTRY(EventDestroy, 4000)                     \
  ENTRY(EventRecord, 2000)                      \
  ENTRY(EventQuery, 2000)                       \
  ENTRY(EventSynchronize, 2000)                 \
  ENTRY(EventElapsedTime, 2000)                 \
  ENTRY(GraphAddMemcpyNode, 10000)              \
  ENTRY(ModuleLoadData, 2000)                   \
  ENTRY(ModuleUnload, 2000)                     \
  ENTRY(ModuleGetFunction, 2000)                \
  ENTRY(LaunchKernel, 4000)

namespace dwdp::cuda {

struct Driver {
#define DWDP_DECLARE(name, version) PFN_cu##name##_v##version name = nullptr;
  DWDP_DRIVER_ENTRY_POINTS(DWDP_DECLARE)
#undef DWDP_DECLARE

  // Spelled out, because each toolkit's headers have only one of the two.
  using MemcpyBatchAsync13 = CUresult(CUDAAPI*)(CUdeviceptr* dsts, CUdeviceptr* srcs,
                                                std::size_t* sizes, std::size_t count,
                                                CUmemcpyAttributes* attributes,
                                                std::size_t* attribute_indices,
                                                std::size_t num_attributes, CUstream stream);
  using MemcpyBatchAsync12 = CUresult(CUDAAPI*)(CUdeviceptr* dsts, CUdeviceptr* srcs,
                                                std::size_t* sizes, std::size_t count,
                                                CUmemcpyAttributes* attributes,
                                                std::size_t* attribute_indices,
                                                std::size_t num_attributes,
                                                std::size_t* failed_index, CUstream stream);

  // At most one of them is there: since CUDA 13.0, and 12.8 to 12.9.
  MemcpyBatchAsync13 memcpy_batch_async_13 = nullptr;
  MemcpyBatchAsync12 memcpy_batch_async_12 = nullptr;

  // At most one of them is there: since CUDA 12.3, and before.
  PFN_cuStreamGetCaptureInfo_v12030 stream_get_capture_info_12_3 = nullptr;
  PFN_cuStreamGetCaptureInfo_v11030 stream_get_capture_info_11_3 = nullptr;

  // The newest CUDA version that it supports: 13000 for 13.0.
  int version = 0;
};

// Loads and initialises the driver at the first call. Throws FabricError when there is none, it is
// too old, or it refuses.
const Driver& driver();

// What `call` answered, with the driver's own words.
FabricError driver_error(const char* call, CUresult result, const std::string& detail);

}  // namespace dwdp::cuda

// Calls the driver's cu`name` with the `arguments`, which are in parentheses, and throws
// FabricError unless it succeeds; the rest says what was being done, with sizes.
#define DWDP_CUDA(name, arguments, ...)                                                       \
  do {                                                                                        \
    const CUresult dwdp_result = ::dwdp::cuda::driver().name arguments;                       \
    if (dwdp_result != CUDA_SUCCESS) {                                                        \
      throw ::dwdp::cuda::driver_error("cu" #name, dwdp_result, ::dwdp::concat(__VA_ARGS__)); \
    }                                                                                         \
  } while (false)
