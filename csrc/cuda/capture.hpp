#pragma once

#include <mutex>
#include <vector>

#include "cuda/driver.hpp"

namespace dwdp::cuda {

// Whether and where a stream is being captured. `dependencies` is the driver's own array, valid
// until the next call that operates on the stream.
struct CaptureInfo {
  bool active = false;
  cuuint64_t id = 0;  // no two captures of a process have the same
  CUgraph graph = nullptr;
  const CUgraphNode* dependencies = nullptr;
  std::size_t num_dependencies = 0;
};

// A place in a graph that is being captured: what comes after it depends on `nodes`.
struct CapturedGeneration {
  CUstream stream = nullptr;  // that is captured
  cuuint64_t id = 0;
  CUgraph graph = nullptr;
  std::vector<CUgraphNode> nodes;

  bool still_capturing() const noexcept;
};

// The captures that were met on one device. There is no waiting for a GPU while a stream of its
// context is being captured: it breaks the capture, and the driver does not tell of any in advance.
class Captures {
 public:
  // Of `stream`; remembers it if it is being captured. The stream must exist for as long.
  CaptureInfo query(CUstream stream);

  // Whether one of those that were met goes on.
  bool ongoing() noexcept;

 private:
  std::mutex mutex_;
  std::vector<CapturedGeneration> met_;  // without nodes
};

// The driver takes a dependency once.
void add_dependency(std::vector<CUgraphNode>& dependencies, CUgraphNode node);

}  // namespace dwdp::cuda
