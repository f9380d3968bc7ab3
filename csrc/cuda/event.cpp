#include "cuda/event.hpp"

#include <algorithm>
#include <utility>

namespace dwdp::cuda {
namespace {

constexpr double kShortestWait = 5e-6;

}  // namespace

Event::Event(std::shared_ptr<Device> device)
    : device_(std::move(device)),
      event_(make_event(device_->context())),
      timer_(device_->context(), kShortestWait) {}

void Event::record(CUstream stream) {
  const ContextGuard guard(*device_->context());
  const std::lock_guard<std::mutex> lock(mutex_);
  const CaptureInfo info = device_->captures().query(stream);
  if (info.active) {
    captured_ = CapturedGeneration{info.id, info.graph, info.dependencies};
    return;
  }
  // On another stream the new generation could complete before the last one.
  if (recorded_ && recorded_on_ != stream) {
    DWDP_CUDA(StreamWaitEvent, (stream, event_.get(), CU_EVENT_WAIT_DEFAULT),
              "recording an event on a second stream");
  }
  DWDP_CUDA(EventRecord, (event_.get(), stream), "on ", device_->described());
  recorded_ = true;
  recorded_on_ = stream;
  captured_.reset();
}

void Event::wait(CUstream stream) {
  const ContextGuard guard(*device_->context());
  const std::lock_guard<std::mutex> lock(mutex_);
  const CaptureInfo info = device_->captures().query(stream);
  if (info.active && captured_ && captured_->id == info.id) {
    std::vector<CUgraphNode> added;
    for (const CUgraphNode node : captured_->nodes) {
      const auto stop = info.dependencies.end();
      if (std::find(info.dependencies.begin(), stop, node) == stop) added.push_back(node);
    }
    if (added.empty()) return;
    DWDP_CUDA(StreamUpdateCaptureDependencies,
              (stream, added.data(), added.size(), CU_STREAM_ADD_CAPTURE_DEPENDENCIES),
              "waiting for ", added.size(), " nodes of a graph");
    return;
  }
  if (info.active) {
    if (!recorded_) return;
    DWDP_CUDA(StreamWaitEvent, (stream, event_.get(), CU_EVENT_WAIT_EXTERNAL),
              "waiting in a graph for an event outside, on ", device_->described());
    return;
  }
  if (completed()) return;
  timer_.start(stream);
  DWDP_CUDA(StreamWaitEvent, (stream, event_.get(), CU_EVENT_WAIT_DEFAULT), "on ",
            device_->described());
  timer_.stop(stream);
}

bool Event::completed() const {
  if (!recorded_) return true;
  const CUresult state = driver().EventQuery(event_.get());
  if (state == CUDA_ERROR_NOT_READY) return false;
  if (state != CUDA_SUCCESS) throw driver_error("cuEventQuery", state, device_->described());
  return true;
}

bool Event::query() {
  const ContextGuard guard(*device_->context());
  const std::lock_guard<std::mutex> lock(mutex_);
  return completed();
}

void Event::synchronize() {
  const ContextGuard guard(*device_->context());
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!recorded_) return;
  }
  DWDP_CUDA(EventSynchronize, (event_.get()), "on ", device_->described());
}

std::uint64_t Event::num_waits() {
  const ContextGuard guard(*device_->context());
  const std::lock_guard<std::mutex> lock(mutex_);
  timer_.poll();
  return timer_.num_times();
}

double Event::waited_s() {
  const ContextGuard guard(*device_->context());
  const std::lock_guard<std::mutex> lock(mutex_);
  timer_.poll();
  return timer_.total_s();
}

Event::Dependency Event::dependency() {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (captured_ && device_->captures().goes_on(captured_->id)) return {captured_, nullptr};
  return {std::nullopt, completed() ? nullptr : event_.get()};
}

void Event::record_captured(CapturedGeneration generation) {
  const std::lock_guard<std::mutex> lock(mutex_);
  captured_ = std::move(generation);
}

}  // namespace dwdp::cuda
