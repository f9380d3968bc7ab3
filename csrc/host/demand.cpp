#include "host/demand.hpp"

#include <cstdint>
#include <cstring>
#include <utility>

namespace dwdp::host {

Demand::Demand(std::vector<std::vector<Copy>> experts,
               std::vector<std::shared_ptr<const void>> keep_mapped, std::size_t layer)
    : experts_(std::move(experts), "expert"),
      keep_mapped_(std::move(keep_mapped)),
      layer_(layer),
      activated_(experts_.lists().size()) {}

std::size_t Demand::fetch(const void* indices, std::size_t count, std::size_t index_bytes) const {
  check_indices(indices, count, index_bytes);
  const std::lock_guard<std::mutex> lock(mutex_);
  activated_.assign(num_experts(), false);
  const auto num_experts = static_cast<std::int64_t>(this->num_experts());
  for (std::size_t i = 0; i < count; ++i) {
    const std::int64_t expert = index_bytes == 8 ? static_cast<const std::int64_t*>(indices)[i]
                                                 : static_cast<const std::int32_t*>(indices)[i];
    if (expert >= 0 && expert < num_experts) activated_[static_cast<std::size_t>(expert)] = true;
  }
  std::size_t num_bytes = 0;
  for (std::size_t expert = 0; expert < activated_.size(); ++expert) {
    if (!activated_[expert]) continue;
    for (const Copy& copy : experts_.lists()[expert]) {
      std::memcpy(copy.dst, copy.src, copy.num_bytes);
      num_bytes += copy.num_bytes;
    }
  }
  return num_bytes;
}

}  // namespace dwdp::host
