// Owners of what the driver hands out within a context.
#pragma once

#include <cstddef>
#include <memory>
#include <utility>

#include "cuda/context.hpp"

namespace dwdp::cuda {

using Context = std::shared_ptr<const PrimaryContext>;

// Destroys `value` in its context when it goes.
template <typename Traits>
class Handle {
 public:
  using Type = typename Traits::Type;

  Handle() noexcept = default;
  Handle(Context context, Type value) noexcept : context_(std::move(context)), value_(value) {}
  Handle(Handle&& other) noexcept
      : context_(std::move(other.context_)), value_(std::exchange(other.value_, Type{})) {}
  Handle& operator=(Handle&& other) noexcept {
    Handle moved(std::move(other));
    std::swap(context_, moved.context_);
    std::swap(value_, moved.value_);
    return *this;
  }
  Handle(const Handle&) = delete;
  Handle& operator=(const Handle&) = delete;
  ~Handle() noexcept {
    if (value_ == Type{}) return;
    // Tried without the context too: the driver knows what the value belongs to, and refuses
    // politely when it has shut down.
    const ContextGuard guard(*context_, std::nothrow);
    Traits::destroy(value_);
  }

  Type get() const noexcept { return value_; }
  explicit operator bool() const noexcept { return value_ != Type{}; }

 private:
  Context context_;
  Type value_{};
};

struct StreamTraits {
  using Type = CUstream;
  static void destroy(CUstream stream) noexcept { driver().StreamDestroy(stream); }
};

struct EventTraits {
  using Type = CUevent;
  static void destroy(CUevent event) noexcept { driver().EventDestroy(event); }
};

struct DeviceMemoryTraits {
  using Type = CUdeviceptr;
  static void destroy(CUdeviceptr address) noexcept { driver().MemFree(address); }
};

using StreamHandle = Handle<StreamTraits>;
using EventHandle = Handle<EventTraits>;
using DeviceMemory = Handle<DeviceMemoryTraits>;

// A stream that does not order itself with the legacy default stream.
StreamHandle make_stream(const Context& context);

// An event that orders streams, and is not timed.
EventHandle make_event(const Context& context);

// An event that is timed.
EventHandle make_timing_event(const Context& context);

DeviceMemory allocate_device_memory(const Context& context, std::size_t num_bytes);

}  // namespace dwdp::cuda
