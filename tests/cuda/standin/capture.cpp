// Stream capture: which streams take part, what their next work depends on, and how it ends.
#include <algorithm>
#include <set>

#include "graph.hpp"

namespace standin {
namespace {

// Captures in progress. Guarded by api_mutex.
std::vector<std::shared_ptr<Capture>>& active() {
  static auto& instance = *new std::vector<std::shared_ptr<Capture>>;
  return instance;
}

CUstreamCaptureMode& thread_mode() {
  thread_local CUstreamCaptureMode mode = CU_STREAM_CAPTURE_MODE_GLOBAL;
  return mode;
}

void leave(Stream& stream) {
  stream.capture = nullptr;
  stream.dependencies.clear();
  stream.dependency_handles.clear();
}

// Every stream leaves, and the graph has to be taken or forgotten by the caller.
void finish(const std::shared_ptr<Capture>& capture) {
  for (const auto& weak : capture->streams) {
    if (const auto stream = weak.lock(); stream != nullptr && stream->capture == capture) {
      leave(*stream);
    }
  }
  active().erase(std::remove(active().begin(), active().end(), capture), active().end());
}

// Whether everything that other streams captured is something the origin waits for in the end.
bool joined(const Capture& capture, const Stream& origin) {
  std::set<const Node*> reached;
  std::vector<const Node*> pending;
  for (const auto& node : origin.dependencies) pending.push_back(node.get());
  while (!pending.empty()) {
    const Node* const node = pending.back();
    pending.pop_back();
    if (!reached.insert(node).second) continue;
    for (const auto& dependency : node->dependencies) pending.push_back(dependency.get());
  }
  for (const auto& weak : capture.streams) {
    const auto stream = weak.lock();
    if (stream == nullptr) continue;
    for (const auto& node : stream->dependencies) {
      if (reached.count(node.get()) == 0) return false;
    }
  }
  return true;
}

bool blocking_capture_in(Context& context) {
  const auto streams_of_context = live_streams(context);
  return std::any_of(streams_of_context.begin(), streams_of_context.end(), [](const auto& stream) {
    return stream->blocking() && stream->capture != nullptr;
  });
}

CUresult capture_status(CUstream handle, std::shared_ptr<Stream>* stream,
                        CUstreamCaptureStatus* status) {
  STANDIN_TRY(find_stream(handle, stream));
  if ((*stream)->legacy() && blocking_capture_in(*(*stream)->context())) {
    return CUDA_ERROR_STREAM_CAPTURE_IMPLICIT;
  }
  const auto& capture = (*stream)->capture;
  *status = capture == nullptr     ? CU_STREAM_CAPTURE_STATUS_NONE
            : capture->invalidated ? CU_STREAM_CAPTURE_STATUS_INVALIDATED
                                   : CU_STREAM_CAPTURE_STATUS_ACTIVE;
  return CUDA_SUCCESS;
}

CUresult capture_info(CUstream hStream, CUstreamCaptureStatus* status, cuuint64_t* id,
                      CUgraph* graph, const CUgraphNode** dependencies, size_t* count) {
  const std::lock_guard<std::mutex> lock(api_mutex());
  std::shared_ptr<Stream> stream;
  STANDIN_TRY(capture_status(hStream, &stream, status));
  if (*status != CU_STREAM_CAPTURE_STATUS_ACTIVE) return CUDA_SUCCESS;
  auto& handles = stream->dependency_handles;
  handles.clear();
  for (const auto& node : stream->dependencies) handles.push_back(node->handle);
  if (id != nullptr) *id = stream->capture->id;
  if (graph != nullptr) *graph = stream->capture->graph->handle;
  if (dependencies != nullptr) *dependencies = handles.data();
  if (count != nullptr) *count = handles.size();
  return CUDA_SUCCESS;
}

CUresult update_dependencies(CUstream hStream, const CUgraphNode* dependencies, size_t count,
                             unsigned int flags) {
  const std::lock_guard<std::mutex> lock(api_mutex());
  std::shared_ptr<Stream> stream;
  STANDIN_TRY(find_stream(hStream, &stream));
  if (stream->capture == nullptr) return CUDA_ERROR_ILLEGAL_STATE;
  if (stream->capture->invalidated) return CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
  Nodes found;
  if (!find_nodes(*stream->capture->graph, dependencies, count, &found)) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  if (flags == CU_STREAM_SET_CAPTURE_DEPENDENCIES) {
    stream->dependencies = std::move(found);
  } else if (flags == CU_STREAM_ADD_CAPTURE_DEPENDENCIES) {
    stream->dependencies.insert(stream->dependencies.end(), found.begin(), found.end());
  } else {
    return CUDA_ERROR_INVALID_VALUE;
  }
  return CUDA_SUCCESS;
}

}  // namespace

CUresult capture_node(Stream& stream, CUgraphNodeType type, Action action,
                      std::shared_ptr<Event> event) {
  if (stream.capture->invalidated) return CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
  auto node = add_node(*stream.capture->graph, type, std::move(action), stream.dependencies,
                       std::move(event));
  stream.dependencies = {std::move(node)};
  return CUDA_SUCCESS;
}

CUresult join_capture(Stream& stream, Event& event) {
  const auto capture = event.capture.lock();
  if (capture == nullptr ||
      std::find(active().begin(), active().end(), capture) == active().end()) {
    return CUDA_ERROR_CAPTURED_EVENT;
  }
  if (capture->invalidated) return CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
  if (stream.legacy()) {
    capture->invalidated = true;
    return CUDA_ERROR_STREAM_CAPTURE_IMPLICIT;
  }
  if (stream.capture == nullptr) {
    stream.capture = capture;
    capture->streams.push_back(stream.weak_from_this());
  } else if (stream.capture != capture) {
    stream.capture->invalidated = true;
    capture->invalidated = true;
    return CUDA_ERROR_STREAM_CAPTURE_MERGE;
  }
  for (const auto& node : event.captured_nodes) {
    auto& dependencies = stream.dependencies;
    if (std::find(dependencies.begin(), dependencies.end(), node) == dependencies.end()) {
      dependencies.push_back(node);
    }
  }
  return CUDA_SUCCESS;
}

CUresult check_legacy_use(Stream& stream) {
  if (!stream.legacy() || !blocking_capture_in(*stream.context())) return CUDA_SUCCESS;
  for (const auto& other : live_streams(*stream.context())) {
    if (other->blocking() && other->capture != nullptr) other->capture->invalidated = true;
  }
  return CUDA_ERROR_STREAM_CAPTURE_IMPLICIT;
}

CUresult check_capture_allows() {
  const std::lock_guard<std::mutex> lock(api_mutex());
  if (thread_mode() == CU_STREAM_CAPTURE_MODE_RELAXED) return CUDA_SUCCESS;
  CUresult result = CUDA_SUCCESS;
  for (const auto& capture : active()) {
    const bool local = capture->thread == std::this_thread::get_id();
    const bool forbids = local ? capture->mode != CU_STREAM_CAPTURE_MODE_RELAXED
                               : capture->mode == CU_STREAM_CAPTURE_MODE_GLOBAL &&
                                     thread_mode() == CU_STREAM_CAPTURE_MODE_GLOBAL;
    if (!forbids) continue;
    capture->invalidated = true;
    result = CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
  }
  return result;
}

void abandon_capture(Stream& stream) {
  const auto capture = stream.capture;
  capture->invalidated = true;
  if (capture->origin.lock().get() != &stream) {
    leave(stream);
    return;
  }
  finish(capture);
  drop_nodes(*capture->graph);
  graphs().remove(capture->graph->handle);
}

}  // namespace standin

using standin::Capture;
using standin::Stream;

CUresult cuStreamBeginCapture(CUstream hStream, CUstreamCaptureMode mode) {
  STANDIN_ENTER();
  std::shared_ptr<Stream> stream;
  STANDIN_TRY(standin::find_stream(hStream, &stream));
  if (stream->legacy()) return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
  const std::lock_guard<std::mutex> lock(standin::api_mutex());
  if (stream->capture != nullptr) return CUDA_ERROR_ILLEGAL_STATE;
  auto capture = std::make_shared<Capture>();
  capture->id = standin::new_handle();
  capture->mode = mode;
  capture->thread = std::this_thread::get_id();
  capture->origin = stream;
  capture->streams = {stream};
  capture->graph = std::make_shared<standin::Graph>();
  capture->graph->handle = standin::graphs().add(capture->graph);
  stream->capture = capture;
  standin::active().push_back(std::move(capture));
  return CUDA_SUCCESS;
}

CUresult cuStreamEndCapture(CUstream hStream, CUgraph* phGraph) {
  STANDIN_ENTER();
  *phGraph = nullptr;
  std::shared_ptr<Stream> stream;
  STANDIN_TRY(standin::find_stream(hStream, &stream));
  const std::lock_guard<std::mutex> lock(standin::api_mutex());
  const auto capture = stream->capture;
  if (capture == nullptr) return CUDA_ERROR_ILLEGAL_STATE;
  if (capture->origin.lock() != stream) {
    capture->invalidated = true;
    return CUDA_ERROR_STREAM_CAPTURE_UNMATCHED;
  }
  if (capture->mode != CU_STREAM_CAPTURE_MODE_RELAXED &&
      capture->thread != std::this_thread::get_id()) {
    return CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD;
  }
  const CUresult result = capture->invalidated ? CUDA_ERROR_STREAM_CAPTURE_INVALIDATED
                          : !standin::joined(*capture, *stream) ? CUDA_ERROR_STREAM_CAPTURE_UNJOINED
                                                                : CUDA_SUCCESS;
  standin::finish(capture);
  if (result == CUDA_SUCCESS) {
    *phGraph = capture->graph->handle;
  } else {
    standin::drop_nodes(*capture->graph);
    standin::graphs().remove(capture->graph->handle);
  }
  return result;
}

CUresult cuStreamIsCapturing(CUstream hStream, CUstreamCaptureStatus* captureStatus) {
  STANDIN_ENTER();
  const std::lock_guard<std::mutex> lock(standin::api_mutex());
  std::shared_ptr<Stream> stream;
  return standin::capture_status(hStream, &stream, captureStatus);
}

CUresult cuThreadExchangeStreamCaptureMode(CUstreamCaptureMode* mode) {
  STANDIN_ENTER();
  std::swap(*mode, standin::thread_mode());
  return CUDA_SUCCESS;
}

extern "C" {

CUresult cuStreamGetCaptureInfo_v2(CUstream hStream, CUstreamCaptureStatus* captureStatus_out,
                                   cuuint64_t* id_out, CUgraph* graph_out,
                                   const CUgraphNode** dependencies_out,
                                   size_t* numDependencies_out) {
  STANDIN_ENTER();
  return standin::capture_info(hStream, captureStatus_out, id_out, graph_out, dependencies_out,
                               numDependencies_out);
}

CUresult cuStreamGetCaptureInfo_v3(CUstream hStream, CUstreamCaptureStatus* captureStatus_out,
                                   cuuint64_t* id_out, CUgraph* graph_out,
                                   const CUgraphNode** dependencies_out,
                                   const CUgraphEdgeData** edgeData_out,
                                   size_t* numDependencies_out) {
  STANDIN_ENTER();
  if (edgeData_out != nullptr) *edgeData_out = nullptr;
  return standin::capture_info(hStream, captureStatus_out, id_out, graph_out, dependencies_out,
                               numDependencies_out);
}

#undef cuStreamUpdateCaptureDependencies
CUresult cuStreamUpdateCaptureDependencies(CUstream hStream, CUgraphNode* dependencies,
                                           size_t numDependencies, unsigned int flags) {
  STANDIN_ENTER();
  return standin::update_dependencies(hStream, dependencies, numDependencies, flags);
}

CUresult cuStreamUpdateCaptureDependencies_v2(CUstream hStream, CUgraphNode* dependencies,
                                              const CUgraphEdgeData* dependencyData,
                                              size_t numDependencies, unsigned int flags) {
  STANDIN_ENTER();
  (void)dependencyData;
  return standin::update_dependencies(hStream, dependencies, numDependencies, flags);
}
}
