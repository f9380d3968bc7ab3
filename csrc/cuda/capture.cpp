#include "cuda/capture.hpp"

#include <algorithm>

namespace dwdp::cuda {
namespace {

CaptureInfo capture_info(CUstream stream) {
  CaptureInfo info;
  // The legacy default stream cannot be captured, and asking it may disturb those that are.
  if (stream == nullptr || stream == CU_STREAM_LEGACY) return info;
  CUstreamCaptureStatus status = CU_STREAM_CAPTURE_STATUS_NONE;
  const CUgraphNode* dependencies = nullptr;
  std::size_t num_dependencies = 0;
  CUresult result;
  if (driver().stream_get_capture_info_12_3 != nullptr) {
    // Where a kernel may start before the one ahead of it ends, the edge says so, and the driver
    // insists on telling. A plain edge, which waits for all of it, is what is wanted here.
    const CUgraphEdgeData* edges = nullptr;
    result = driver().stream_get_capture_info_12_3(stream, &status, &info.id, &info.graph,
                                                   &dependencies, &edges, &num_dependencies);
  } else {
    result = driver().stream_get_capture_info_11_3(stream, &status, &info.id, &info.graph,
                                                   &dependencies, &num_dependencies);
  }
  if (result != CUDA_SUCCESS) {
    throw driver_error("cuStreamGetCaptureInfo", result,
                       "asking whether a stream is being captured");
  }
  info.active = status == CU_STREAM_CAPTURE_STATUS_ACTIVE;
  // The driver's own array lasts until the next call about the stream, from whichever thread.
  if (info.active) info.dependencies.assign(dependencies, dependencies + num_dependencies);
  return info;
}

bool is_captured_by(CUstream stream, cuuint64_t id) noexcept {
  try {
    const CaptureInfo info = capture_info(stream);
    return info.active && info.id == id;
  } catch (const FabricError&) {
    return false;
  }
}

}  // namespace

CaptureInfo Captures::query(CUstream stream) {
  const std::lock_guard<std::mutex> lock(mutex_);
  prune();
  CaptureInfo info = capture_info(stream);
  if (info.active && !has_met(info.id)) met_.push_back({stream, info.id});
  return info;
}

bool Captures::ongoing() noexcept {
  const std::lock_guard<std::mutex> lock(mutex_);
  prune();
  return !met_.empty();
}

bool Captures::goes_on(cuuint64_t id) noexcept {
  const std::lock_guard<std::mutex> lock(mutex_);
  prune();
  return has_met(id);
}

void Captures::forget_ended() noexcept {
  const std::lock_guard<std::mutex> lock(mutex_);
  prune();
}

void Captures::prune() noexcept {
  const auto is_over = [](const Met& met) { return !is_captured_by(met.stream, met.id); };
  met_.erase(std::remove_if(met_.begin(), met_.end(), is_over), met_.end());
}

bool Captures::has_met(cuuint64_t id) const noexcept {
  return std::any_of(met_.begin(), met_.end(), [id](const Met& met) { return met.id == id; });
}

void add_dependency(std::vector<CUgraphNode>& dependencies, CUgraphNode node) {
  if (std::find(dependencies.begin(), dependencies.end(), node) == dependencies.end()) {
    dependencies.push_back(node);
  }
}

}  // namespace dwdp::cuda
