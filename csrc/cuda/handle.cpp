#include "cuda/handle.hpp"

namespace dwdp::cuda {
namespace {

EventHandle make_event(const Context& context, unsigned int flags) {
  const ContextGuard guard(*context);
  CUevent event = nullptr;
  DWDP_CUDA(EventCreate, (&event, flags), "on GPU ", context->device());
  return {context, event};
}

}  // namespace

StreamHandle make_stream(const Context& context) {
  const ContextGuard guard(*context);
  CUstream stream = nullptr;
  DWDP_CUDA(StreamCreate, (&stream, CU_STREAM_NON_BLOCKING), "on GPU ", context->device());
  return {context, stream};
}

EventHandle make_event(const Context& context) {
  return make_event(context, CU_EVENT_DISABLE_TIMING);
}

EventHandle make_timing_event(const Context& context) {
  return make_event(context, CU_EVENT_DEFAULT);
}

DeviceMemory allocate_device_memory(const Context& context, std::size_t num_bytes) {
  const ContextGuard guard(*context);
  CUdeviceptr address = 0;
  DWDP_CUDA(MemAlloc, (&address, num_bytes), num_bytes, " bytes on GPU ", context->device());
  return {context, address};
}

}  // namespace dwdp::cuda
