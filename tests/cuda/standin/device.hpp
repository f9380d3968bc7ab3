// Devices and their primary contexts.
#pragma once

#include <cuda.h>

#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

namespace standin {

class Stream;

struct Context {
  explicit Context(CUdevice which) : device(which) {}

  // The first error stays, as in CUDA: from then on every call answers with it.
  void fail(CUresult code) {
    CUresult none = CUDA_SUCCESS;
    error.compare_exchange_strong(none, code);
  }

  const CUdevice device;
  CUcontext handle = nullptr;
  std::int64_t num_references = 0;
  std::atomic<CUresult> error{CUDA_SUCCESS};
  std::shared_ptr<Stream> legacy_stream;
  std::vector<std::weak_ptr<Stream>> streams;  // with the legacy one; guarded by api_mutex
};

int num_devices();
bool valid_device(CUdevice device);
bool can_access_peer(CUdevice device, CUdevice peer);

// How fabric handles fail: "" not at all, otherwise at which step ("create", "export"), or
// "unsupported".
const char* fabric_obstacle();
bool posix_supported();

// The context current in this thread. INVALID_CONTEXT, CONTEXT_IS_DESTROYED or its sticky error.
CUresult current_context(std::shared_ptr<Context>* context);

// "contexts", "current" or "orphans"; -1 for others.
std::int64_t live_contexts(const char* kind);

}  // namespace standin
