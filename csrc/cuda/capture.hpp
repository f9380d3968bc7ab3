#pragma once

#include <mutex>
#include <vector>

#include "cuda/driver.hpp"

namespace dwdp::cuda {

// Whether and where a stream is being captured.
struct CaptureInfo {
  bool active = false;
  cuuint64_t id = 0;  // no two captures of a process have the same
  CUgraph graph = nullptr;
  std::vector<CUgraphNode> dependencies;
};

// A place in a graph that is being captured: what comes after it depends on `nodes`.
struct CapturedGeneration {
  cuuint64_t id = 0;
  CUgraph graph = nullptr;
  std::vector<CUgraphNode> nodes;
};

// The captures that were met on one device. There is no waiting for a GPU while a stream of its
// context is being captured: it breaks the capture, and the driver does not tell of any in advance.
//
// A stream that was met in a capture is asked about by every function here until it is seen that
// the capture has ended, and then never again. The driver does not check handles: the stream must
// exist until then.
class Captures {
 public:
  // Of `stream`; remembers it if it is being captured.
  CaptureInfo query(CUstream stream);

  // Whether one of those that were met goes on.
  bool ongoing() noexcept;

  // Whether the capture `id`, which was met, goes on.
  bool goes_on(cuuint64_t id) noexcept;

  // From here on the streams of captures that have ended may be destroyed.
  void forget_ended() noexcept;

 private:
  struct Met {
    CUstream stream;
    cuuint64_t id;
  };

  // With mutex_ held.
  void prune() noexcept;
  bool has_met(cuuint64_t id) const noexcept;

  std::mutex mutex_;
  std::vector<Met> met_;
};

// The driver takes a dependency once.
void add_dependency(std::vector<CUgraphNode>& dependencies, CUgraphNode node);

}  // namespace dwdp::cuda
