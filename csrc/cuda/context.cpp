#include "cuda/context.hpp"

namespace dwdp::cuda {

PrimaryContext::PrimaryContext(int ordinal) {
  int count = 0;
  DWDP_CUDA(DeviceGetCount, (&count), "counting GPUs");
  DWDP_CHECK(ordinal >= 0 && ordinal < count, "there is no GPU ", ordinal, ": this process sees ",
             count, " (check CUDA_VISIBLE_DEVICES)");
  DWDP_CUDA(DeviceGet, (&device_, ordinal), "GPU ", ordinal);
  DWDP_CUDA(DevicePrimaryCtxRetain, (&handle_, device_), "making the context of GPU ", ordinal);
}

PrimaryContext::~PrimaryContext() noexcept { driver().DevicePrimaryCtxRelease(device_); }

CUresult ContextGuard::enter(const PrimaryContext& context) noexcept {
  call_ = "cuCtxPushCurrent";
  CUresult result = driver().CtxPushCurrent(context.handle());
  if (result != CUDA_SUCCESS) return result;
  call_ = "cuThreadExchangeStreamCaptureMode";
  result = driver().ThreadExchangeStreamCaptureMode(&mode_);
  if (result != CUDA_SUCCESS) {
    CUcontext popped;
    driver().CtxPopCurrent(&popped);
    return result;
  }
  active_ = true;
  return CUDA_SUCCESS;
}

ContextGuard::ContextGuard(const PrimaryContext& context) {
  const CUresult result = enter(context);
  if (result != CUDA_SUCCESS) {
    throw driver_error(call_, result, concat("entering the context of GPU ", context.device()));
  }
}

ContextGuard::ContextGuard(const PrimaryContext& context, std::nothrow_t) noexcept {
  enter(context);
}

ContextGuard::~ContextGuard() noexcept {
  if (!active_) return;
  driver().ThreadExchangeStreamCaptureMode(&mode_);
  CUcontext popped;
  driver().CtxPopCurrent(&popped);
}

}  // namespace dwdp::cuda
