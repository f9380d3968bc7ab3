// Names and texts of errors.
#include <cuda.h>

#include "core.hpp"

namespace standin {
namespace {

struct ErrorText {
  CUresult code;
  const char* name;
  const char* text;
};

#define STANDIN_ERROR(code, text) {code, #code, text}

constexpr ErrorText kErrors[] = {
    STANDIN_ERROR(CUDA_SUCCESS, "no error"),
    STANDIN_ERROR(CUDA_ERROR_INVALID_VALUE, "invalid argument"),
    STANDIN_ERROR(CUDA_ERROR_OUT_OF_MEMORY, "out of memory"),
    STANDIN_ERROR(CUDA_ERROR_NOT_INITIALIZED, "initialization error"),
    STANDIN_ERROR(CUDA_ERROR_DEINITIALIZED, "driver shutting down"),
    STANDIN_ERROR(CUDA_ERROR_NO_DEVICE, "no CUDA-capable device is detected"),
    STANDIN_ERROR(CUDA_ERROR_INVALID_DEVICE, "invalid device ordinal"),
    STANDIN_ERROR(CUDA_ERROR_INVALID_IMAGE, "device kernel image is invalid"),
    STANDIN_ERROR(CUDA_ERROR_INVALID_CONTEXT, "invalid device context"),
    STANDIN_ERROR(CUDA_ERROR_NO_BINARY_FOR_GPU, "no kernel image is available for this device"),
    STANDIN_ERROR(CUDA_ERROR_OPERATING_SYSTEM, "OS call failed or operation not supported"),
    STANDIN_ERROR(CUDA_ERROR_INVALID_HANDLE, "invalid resource handle"),
    STANDIN_ERROR(CUDA_ERROR_ILLEGAL_STATE, "the operation is not permitted in this state"),
    STANDIN_ERROR(CUDA_ERROR_NOT_FOUND, "named symbol not found"),
    STANDIN_ERROR(CUDA_ERROR_NOT_READY, "device not ready"),
    STANDIN_ERROR(CUDA_ERROR_ILLEGAL_ADDRESS, "an illegal memory access was encountered"),
    STANDIN_ERROR(CUDA_ERROR_CONTEXT_IS_DESTROYED, "context is destroyed"),
    STANDIN_ERROR(CUDA_ERROR_LAUNCH_FAILED, "unspecified launch failure"),
    STANDIN_ERROR(CUDA_ERROR_NOT_PERMITTED, "operation not permitted"),
    STANDIN_ERROR(CUDA_ERROR_NOT_SUPPORTED, "operation not supported"),
    STANDIN_ERROR(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED,
                  "operation not permitted when stream is capturing"),
    STANDIN_ERROR(CUDA_ERROR_STREAM_CAPTURE_INVALIDATED,
                  "operation failed due to a previous error during capture"),
    STANDIN_ERROR(CUDA_ERROR_STREAM_CAPTURE_MERGE,
                  "operation would result in a merge of separate capture sequences"),
    STANDIN_ERROR(CUDA_ERROR_STREAM_CAPTURE_UNMATCHED,
                  "capture was not ended in the same stream as it began"),
    STANDIN_ERROR(CUDA_ERROR_STREAM_CAPTURE_UNJOINED, "capturing stream has unjoined work"),
    STANDIN_ERROR(CUDA_ERROR_STREAM_CAPTURE_ISOLATION,
                  "dependency created on uncaptured work in another stream"),
    STANDIN_ERROR(CUDA_ERROR_STREAM_CAPTURE_IMPLICIT,
                  "operation would make the legacy stream depend on a capturing blocking stream"),
    STANDIN_ERROR(CUDA_ERROR_CAPTURED_EVENT,
                  "operation not permitted on an event last recorded in a capturing stream"),
    STANDIN_ERROR(CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD,
                  "attempt to terminate a thread-local capture sequence from another thread"),
    STANDIN_ERROR(CUDA_ERROR_UNKNOWN, "unknown error"),
};

#undef STANDIN_ERROR

const ErrorText* find_error(CUresult code) {
  for (const ErrorText& entry : kErrors) {
    if (entry.code == code) return &entry;
  }
  return nullptr;
}

}  // namespace
}  // namespace standin

CUresult cuGetErrorName(CUresult error, const char** pStr) {
  const auto* const found = standin::find_error(error);
  *pStr = found == nullptr ? nullptr : found->name;
  return found == nullptr ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}

CUresult cuGetErrorString(CUresult error, const char** pStr) {
  const auto* const found = standin::find_error(error);
  *pStr = found == nullptr ? nullptr : found->text;
  return found == nullptr ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}
