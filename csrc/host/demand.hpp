#pragma once

#include <cstddef>
#include <memory>
#include <mutex>
#include <vector>

#include "common/slices.hpp"

namespace dwdp::host {

// What each expert of a layer takes to fetch; nothing for a resident one.
class Demand {
 public:
  // `keep_mapped`: what the slices' addresses belong to, held as long as this. `layer`: what its
  // spans are marked with.
  explicit Demand(std::vector<std::vector<Copy>> experts,
                  std::vector<std::shared_ptr<const void>> keep_mapped = {}, std::size_t layer = 0);

  std::size_t num_experts() const noexcept { return experts_.lists().size(); }
  std::size_t num_bytes() const noexcept { return experts_.num_bytes(); }
  std::size_t layer() const noexcept { return layer_; }

  // Copies the experts that the `count` indices (of `index_bytes`, 4 or 8) name, each once, and
  // returns the bytes copied. Ids that are no expert's are ignored: engines mark padding so.
  std::size_t fetch(const void* indices, std::size_t count, std::size_t index_bytes) const;

 private:
  const Slices experts_;
  const std::vector<std::shared_ptr<const void>> keep_mapped_;
  const std::size_t layer_;
  mutable std::mutex mutex_;
  mutable std::vector<bool> activated_;  // kept, so that fetching allocates nothing
};

}  // namespace dwdp::host
