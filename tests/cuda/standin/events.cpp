// Events: what a record captures, queries, timing.
#include "graph.hpp"
#include "stream.hpp"

namespace standin {

Registry<CUevent, Event>& events() {
  static auto& instance = *new Registry<CUevent, Event>;
  return instance;
}

CUresult find_event(CUevent handle, std::shared_ptr<Event>* event) {
  *event = events().find(handle);
  return *event == nullptr ? CUDA_ERROR_INVALID_HANDLE : CUDA_SUCCESS;
}

namespace {

CUresult record(CUevent hEvent, CUstream hStream, unsigned int flags) {
  std::shared_ptr<Context> context;
  STANDIN_TRY(current_context(&context));
  std::shared_ptr<Stream> stream;
  std::shared_ptr<Event> event;
  STANDIN_TRY(find_stream(hStream, &stream));
  STANDIN_TRY(find_event(hEvent, &event));
  if (event->context != stream->context()) return CUDA_ERROR_INVALID_HANDLE;
  if ((flags & ~static_cast<unsigned int>(CU_EVENT_RECORD_EXTERNAL)) != 0) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  const std::lock_guard<std::mutex> lock(api_mutex());
  STANDIN_TRY(check_legacy_use(*stream));
  if (flags == CU_EVENT_RECORD_EXTERNAL) {
    if (stream->capture == nullptr) return CUDA_ERROR_INVALID_VALUE;
    return capture_node(*stream, CU_GRAPH_NODE_TYPE_EVENT_RECORD, nullptr, event);
  }
  if (stream->capture != nullptr) {
    if (stream->capture->invalidated) return CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
    event->captured = true;
    event->capture = stream->capture;
    event->captured_nodes = stream->dependencies;
    return CUDA_SUCCESS;
  }
  event->captured = false;
  event->captured_nodes.clear();
  event->latest = stream->enqueue([] { return CUDA_SUCCESS; });
  return CUDA_SUCCESS;
}

// What the host may ask an event about: the work that it was recorded after last, or null.
CUresult look(CUevent handle, std::shared_ptr<Event>* event, SignalPtr* latest) {
  STANDIN_TRY(find_event(handle, event));
  {
    const std::lock_guard<std::mutex> lock(api_mutex());
    if ((*event)->captured) return CUDA_ERROR_CAPTURED_EVENT;
    *latest = (*event)->latest;
  }
  return check_capture_allows();
}

}  // namespace
}  // namespace standin

using standin::Event;
using standin::SignalPtr;

CUresult cuEventCreate(CUevent* phEvent, unsigned int Flags) {
  STANDIN_ENTER();
  std::shared_ptr<standin::Context> context;
  STANDIN_TRY(standin::current_context(&context));
  constexpr unsigned int kKnown =
      CU_EVENT_BLOCKING_SYNC | CU_EVENT_DISABLE_TIMING | CU_EVENT_INTERPROCESS;
  if ((Flags & ~kKnown) != 0) return CUDA_ERROR_INVALID_VALUE;
  auto event = std::make_shared<Event>();
  event->context = std::move(context);
  event->flags = Flags;
  *phEvent = standin::events().add(std::move(event));
  return CUDA_SUCCESS;
}

CUresult cuEventRecord(CUevent hEvent, CUstream hStream) {
  STANDIN_ENTER();
  return standin::record(hEvent, hStream, CU_EVENT_RECORD_DEFAULT);
}

CUresult cuEventRecordWithFlags(CUevent hEvent, CUstream hStream, unsigned int flags) {
  STANDIN_ENTER();
  return standin::record(hEvent, hStream, flags);
}

CUresult cuEventQuery(CUevent hEvent) {
  STANDIN_ENTER();
  std::shared_ptr<Event> event;
  SignalPtr latest;
  STANDIN_TRY(standin::look(hEvent, &event, &latest));
  if (latest != nullptr && !latest->done()) return CUDA_ERROR_NOT_READY;
  return event->context->error;
}

CUresult cuEventSynchronize(CUevent hEvent) {
  STANDIN_ENTER();
  std::shared_ptr<Event> event;
  SignalPtr latest;
  STANDIN_TRY(standin::look(hEvent, &event, &latest));
  if (latest != nullptr) latest->wait();
  return event->context->error;
}

CUresult cuEventDestroy(CUevent hEvent) {
  STANDIN_ENTER();
  return standin::events().remove(hEvent) == nullptr ? CUDA_ERROR_INVALID_HANDLE : CUDA_SUCCESS;
}

CUresult cuEventElapsedTime_v2(float* pMilliseconds, CUevent hStart, CUevent hEnd) {
  STANDIN_ENTER();
  SignalPtr signals[2];
  const CUevent handles[2] = {hStart, hEnd};
  for (int i = 0; i < 2; ++i) {
    std::shared_ptr<Event> event;
    STANDIN_TRY(standin::look(handles[i], &event, &signals[i]));
    if ((event->flags & CU_EVENT_DISABLE_TIMING) != 0 || signals[i] == nullptr) {
      return CUDA_ERROR_INVALID_HANDLE;
    }
    if (!signals[i]->done()) return CUDA_ERROR_NOT_READY;
  }
  *pMilliseconds =
      std::chrono::duration<float, std::milli>(signals[1]->time() - signals[0]->time()).count();
  return CUDA_SUCCESS;
}
