#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>

#include "cuda/capture.hpp"
#include "cuda/device.hpp"
#include "cuda/stream_timer.hpp"

namespace dwdp::cuda {

// Orders streams by generations, as dwdp::host::Event orders threads: a generation completes when
// what was submitted to its stream so far has finished, and after all before it. Whoever waits does
// so for the generation issued last at that time.
//
// While its stream is being captured into a graph, a generation is a place in that graph instead:
// waits and fetches of the same capture depend on it, and it means nothing outside. There, and for
// streams that are not captured, the last generation that was not captured counts; a captured
// stream waits for it by a node of the graph, at every replay, so that the event must outlive the
// graph.
//
// A stream in whose capture an event took part must exist until the device's fabric is used once
// more after the capture has ended: an event recorded or waited for, an engine or a range closed.
class Event {
 public:
  explicit Event(std::shared_ptr<Device> device);
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;

  // Issues a generation.
  void record(CUstream stream);

  // Makes what is submitted to `stream` from now on wait. Never blocks the host.
  void wait(CUstream stream);

  // Whether the last generation, captured ones aside, has completed (true if there is none).
  bool query();

  // Blocks the host until it has.
  void synchronize();

  // How often, and how long, streams stood still in wait(), as far as known by now. Waits shorter
  // than 5 us count as none; those in a graph are not measured.
  std::uint64_t num_waits();
  double waited_s();

  // What a copy engine makes its streams, or nodes of a graph, depend on. Under a ContextGuard.
  struct Dependency {
    std::optional<CapturedGeneration> captured;  // the last generation, if its capture goes on
    CUevent event = nullptr;  // else the last that was not captured, if it is not complete
  };
  Dependency dependency();

  // Issues a generation at a place in a graph.
  void record_captured(CapturedGeneration generation);

 private:
  // Of what event_ holds. With mutex_ held, under a ContextGuard.
  bool completed() const;

  const std::shared_ptr<Device> device_;
  const EventHandle event_;
  std::mutex mutex_;
  bool recorded_ = false;
  CUstream recorded_on_ = nullptr;
  std::optional<CapturedGeneration> captured_;  // when issued after what event_ holds
  StreamTimer timer_;
};

}  // namespace dwdp::cuda
