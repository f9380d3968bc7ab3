#include "common/slices.hpp"

#include <algorithm>
#include <cstdint>
#include <utility>

#include "common/error.hpp"

namespace dwdp {

Slices::Slices(std::vector<std::vector<Copy>> lists, const char* owner) : lists_(std::move(lists)) {
  for (std::size_t i = 0; i < lists_.size(); ++i) {
    for (const Copy& copy : lists_[i]) {
      const auto dst = reinterpret_cast<std::uintptr_t>(copy.dst);
      const auto src = reinterpret_cast<std::uintptr_t>(copy.src);
      DWDP_CHECK(copy.num_bytes > 0 && dst != 0 && src != 0, owner, " ", i,
                 " of a fetch has a slice of ", copy.num_bytes, " bytes from ", copy.src, " to ",
                 copy.dst, "; sizes and addresses must not be zero");
      DWDP_CHECK(std::max(dst, src) - std::min(dst, src) >= copy.num_bytes, owner, " ", i,
                 " of a fetch has a slice of ", copy.num_bytes, " bytes from ", copy.src, " to ",
                 copy.dst, ", which overlap");
      num_bytes_ += copy.num_bytes;
      ++num_slices_;
    }
  }
}

void check_indices(const void* indices, std::size_t count, std::size_t index_bytes) {
  DWDP_CHECK(index_bytes == 4 || index_bytes == 8,
             "indices of experts have 4 or 8 bytes each, not ", index_bytes);
  DWDP_CHECK(indices != nullptr || count == 0, count, " indices of experts are at address 0");
}

}  // namespace dwdp
