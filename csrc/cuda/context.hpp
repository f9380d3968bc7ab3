#pragma once

#include <new>

#include "cuda/driver.hpp"

namespace dwdp::cuda {

// A device's primary context, the one that torch works in, kept for as long as this object lives.
class PrimaryContext {
 public:
  explicit PrimaryContext(int ordinal);
  PrimaryContext(const PrimaryContext&) = delete;
  PrimaryContext& operator=(const PrimaryContext&) = delete;
  ~PrimaryContext() noexcept;

  CUdevice device() const noexcept { return device_; }
  CUcontext handle() const noexcept { return handle_; }

 private:
  CUdevice device_ = 0;
  CUcontext handle_ = nullptr;
};

// Makes a context the thread's current one, and lets the thread call the driver freely while others
// capture graphs: nothing that happens under a guard is meant to be captured by accident, and a
// query, say, would otherwise break a capture of any other thread. Puts both back at its end.
class ContextGuard {
 public:
  explicit ContextGuard(const PrimaryContext& context);
  // For destructors: stays inactive where the first form throws.
  ContextGuard(const PrimaryContext& context, std::nothrow_t) noexcept;
  ContextGuard(const ContextGuard&) = delete;
  ContextGuard& operator=(const ContextGuard&) = delete;
  ~ContextGuard() noexcept;

  bool active() const noexcept { return active_; }

 private:
  CUresult enter(const PrimaryContext& context) noexcept;

  const char* call_ = nullptr;  // that failed
  CUstreamCaptureMode mode_ = CU_STREAM_CAPTURE_MODE_RELAXED;
  bool active_ = false;
};

}  // namespace dwdp::cuda
