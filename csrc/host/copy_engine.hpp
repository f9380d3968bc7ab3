#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "common/slices.hpp"
#include "host/demand.hpp"
#include "host/event.hpp"
#include "host/span_ring.hpp"

namespace dwdp::host {

// Slices laid out per lane, in the order in which they are copied. Immutable, so that one fetch can
// be submitted any number of times.
class Fetch {
 public:
  // `keep_mapped`: what the slices' addresses belong to, held as long as the fetch. `layer`: what
  // its spans are marked with.
  explicit Fetch(std::vector<std::vector<Copy>> lanes,
                 std::vector<std::shared_ptr<const void>> keep_mapped = {}, std::size_t layer = 0);

  const std::vector<std::vector<Copy>>& lanes() const noexcept { return slices_.lists(); }
  std::size_t num_slices() const noexcept { return slices_.num_slices(); }
  std::size_t num_bytes() const noexcept { return slices_.num_bytes(); }
  std::size_t layer() const noexcept { return layer_; }

 private:
  Slices slices_;
  std::vector<std::shared_ptr<const void>> keep_mapped_;
  std::size_t layer_;
};

// Copies fetches in the background. Each lane has a queue and `lane_depth` threads that take its
// slices in order, so that many slices of a lane are in flight and all lanes run at once.
//
// On each lane, fetches run in the order of submission: the slices of one start when those of the
// fetch before have all been taken (not copied: the events order what must be ordered).
class CopyEngine {
 public:
  CopyEngine(std::size_t num_lanes, std::size_t lane_depth);
  CopyEngine(const CopyEngine&) = delete;
  CopyEngine& operator=(const CopyEngine&) = delete;
  ~CopyEngine() noexcept;

  std::size_t num_lanes() const noexcept { return num_lanes_; }
  std::size_t lane_depth() const noexcept { return lane_depth_; }

  // `lanes`: at most num_lanes of them. Addresses that `keep_mapped` does not hold must stay mapped
  // until the fetch is done.
  std::shared_ptr<const Fetch> prepare(std::vector<std::vector<Copy>> lanes,
                                       std::vector<std::shared_ptr<const void>> keep_mapped = {},
                                       std::size_t layer = 0) const;

  // Starts `fetch` once the generation of `after` (may be null) issued last has completed, and
  // issues one of `done` that completes with the last slice. Returns at once. Throws FabricError
  // after close() and in a forked child, where the threads do not exist.
  void submit(std::shared_ptr<const Fetch> fetch, std::shared_ptr<Event> after,
              std::shared_ptr<Event> done);

  // Copies the experts that the router's choice names (see Demand::fetch) before it returns, and
  // returns the bytes copied. Throws FabricError after close().
  std::size_t fetch_activated(const Demand& demand, const void* indices, std::size_t count,
                              std::size_t index_bytes);

  // When each lane copied since the last call, and after the lanes fetch_activated(). A lane has
  // one span for its part of a fetch, from the first slice to the end of the last, which is there
  // when the fetch is done. The spans of a lane never overlap: where lane_depth lets it begin a
  // fetch before it has ended another, the one that ends last starts when the other ended. Only the
  // last SpanRing::kCapacity of each are kept. Empty in a forked child.
  std::vector<std::vector<Span>> drain_spans();

  // Finishes what was submitted and ends the threads. Idempotent.
  void close() noexcept;

 private:
  class State;

  std::size_t num_lanes_;
  std::size_t lane_depth_;
  std::unique_ptr<State> state_;
};

}  // namespace dwdp::host
