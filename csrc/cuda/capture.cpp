#include "cuda/capture.hpp"

#include <algorithm>

namespace dwdp::cuda {
namespace {

CaptureInfo capture_info(CUstream stream) {
  CaptureInfo info;
  // The legacy default stream cannot be captured, and asking it may disturb those that are.
  if (stream == nullptr || stream == CU_STREAM_LEGACY) return info;
  CUstreamCaptureStatus status = CU_STREAM_CAPTURE_STATUS_NONE;
  CUresult result;
  if (driver().stream_get_capture_info_12_3 != nullptr) {
    // Where a kernel may start before the one ahead of it ends, the edge says so, and the driver
    // insists on telling. A plain edge, which waits for all of it, is what is wanted here.
    const CUgraphEdgeData* edges = nullptr;
    result = driver().stream_get_capture_info_12_3(
        stream, &status, &info.id, &info.graph, &info.dependencies, &edges, &info.num_dependencies);
  } else {
    result = driver().stream_get_capture_info_11_3(stream, &status, &info.id, &info.graph,
                                                   &info.dependencies, &info.num_dependencies);
  }
  if (result != CUDA_SUCCESS) {
    throw driver_error("cuStreamGetCaptureInfo", result,
                       "asking whether a stream is being captured");
  }
  info.active = status == CU_STREAM_CAPTURE_STATUS_ACTIVE;
  return info;
}

}  // namespace

bool CapturedGeneration::still_capturing() const noexcept {
  try {
    const CaptureInfo info = capture_info(stream);
    return info.active && info.id == id;
  } catch (const FabricError&) {
    return false;  // the stream is gone
  }
}

CaptureInfo Captures::query(CUstream stream) {
  const CaptureInfo info = capture_info(stream);
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto is_over = [&](const CapturedGeneration& met) {
    return met.stream == stream && (!info.active || met.id != info.id);
  };
  met_.erase(std::remove_if(met_.begin(), met_.end(), is_over), met_.end());
  const auto is_this = [&](const CapturedGeneration& met) { return met.id == info.id; };
  if (info.active && std::none_of(met_.begin(), met_.end(), is_this)) {
    met_.push_back({stream, info.id, info.graph, {}});
  }
  return info;
}

bool Captures::ongoing() noexcept {
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto is_over = [](const CapturedGeneration& met) { return !met.still_capturing(); };
  met_.erase(std::remove_if(met_.begin(), met_.end(), is_over), met_.end());
  return !met_.empty();
}

void add_dependency(std::vector<CUgraphNode>& dependencies, CUgraphNode node) {
  if (std::find(dependencies.begin(), dependencies.end(), node) == dependencies.end()) {
    dependencies.push_back(node);
  }
}

}  // namespace dwdp::cuda
