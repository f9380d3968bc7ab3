#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <set>
#include <vector>

#include "cuda/demand.hpp"
#include "cuda/event.hpp"
#include "cuda/fetch.hpp"

namespace dwdp::cuda {

// Copies fetches on streams of its own. Each lane has `lane_depth` streams, over which its slices
// alternate; all run at once. On each stream, fetches run in the order of submission.
//
// A fetch whose `after` is being captured becomes copy nodes of that graph, a chain for each lane,
// without the engine's streams taking part: what depends on nothing at the end of the graph, as a
// fetch for the next forward does, needs not be joined. Such a fetch, its memory included, is kept
// until close(), after which the graphs it is in must not be launched any more.
class CopyEngine {
 public:
  // `overlap`: prefer copy engines, which leave the multiprocessors to compute, to faster copies
  // that take some of them. `demand_blocks`: how many of them fetching on demand may take.
  CopyEngine(std::shared_ptr<Device> device, std::size_t num_lanes, std::size_t lane_depth,
             bool overlap, std::size_t demand_blocks);
  CopyEngine(const CopyEngine&) = delete;
  CopyEngine& operator=(const CopyEngine&) = delete;
  ~CopyEngine() noexcept;

  std::size_t num_lanes() const noexcept { return num_lanes_; }
  std::size_t lane_depth() const noexcept { return lane_depth_; }

  // Whether the driver takes many slices in one call.
  bool uses_batch_copies() const noexcept;

  // `lanes`: at most num_lanes of them. Addresses that `keep_mapped` does not hold must stay mapped
  // until the fetch is done.
  std::shared_ptr<const Fetch> prepare(
      std::vector<std::vector<Copy>> lanes,
      std::vector<std::shared_ptr<const void>> keep_mapped = {}) const;

  // Starts `fetch` once the generation of `after` (may be null) issued last has completed, and
  // issues one of `done` that completes with the last slice. Returns at once. Throws FabricError
  // after close().
  void submit(const std::shared_ptr<const Fetch>& fetch, Event* after, Event& done);

  // What each expert of a layer takes to fetch. `keep_mapped` as in prepare().
  std::shared_ptr<const Demand> prepare_demand(
      std::vector<std::vector<Copy>> experts,
      std::vector<std::shared_ptr<const void>> keep_mapped = {});

  // Lets `stream` copy the experts that `count` indices on the GPU name (4 or 8 bytes each), each
  // once; ids that are no expert's are ignored. In a capture, `demand` is kept as a fetch is.
  void fetch_activated(const std::shared_ptr<const Demand>& demand, const void* indices,
                       std::size_t count, std::size_t index_bytes, CUstream stream);

  // Bytes that fetch_activated() has copied, replays of graphs aside. Waits for the GPU.
  std::uint64_t demanded_bytes();

  // How long streams took for it, as far as known by now; captured ones are not measured.
  double demand_waited_s();

  // Waits for what was submitted. Idempotent.
  void close() noexcept;

 private:
  CUstream join_stream() const noexcept;
  void submit_to_streams(const Fetch& fetch, CUevent after, Event& done);
  void copy_batch(const Batch& batch, CUstream stream) const;
  void submit_to_graph(const std::shared_ptr<const Fetch>& fetch, CapturedGeneration generation,
                       Event& done);
  CUgraphNode add_node(CUgraph graph, const std::vector<CUgraphNode>& dependencies,
                       const Copy& copy) const;

  const std::shared_ptr<Device> device_;
  const std::size_t num_lanes_;
  const std::size_t lane_depth_;
  const unsigned int demand_blocks_;
  CUmemcpyAttributes attributes_{};

  std::mutex mutex_;
  bool closed_ = false;
  std::vector<StreamHandle> streams_;       // [num_lanes * lane_depth], and one to join them
  std::vector<EventHandle> stream_events_;  // [num_lanes * lane_depth]

  cuuint64_t capture_id_ = 0;
  std::vector<CUgraphNode> last_nodes_;  // per lane, of capture_id_
  std::set<std::shared_ptr<const void>> captured_;

  DeviceMemory demanded_;  // a counter, from the first demand on
  EventHandle demand_event_;
  StreamTimer demand_timer_;
};

}  // namespace dwdp::cuda
