#pragma once

#include <cstddef>
#include <vector>

namespace dwdp {

// One slice of a fetch.
struct Copy {
  void* dst;
  const void* src;
  std::size_t num_bytes;
};

// What is to be copied for each lane, or each expert, in order. Immutable.
class Slices {
 public:
  // `owner` names what has one of the lists: "lane" or "expert". Throws FabricError for a slice
  // that is empty, overlaps itself or has a null address.
  Slices(std::vector<std::vector<Copy>> lists, const char* owner);

  const std::vector<std::vector<Copy>>& lists() const noexcept { return lists_; }
  std::size_t num_slices() const noexcept { return num_slices_; }
  std::size_t num_bytes() const noexcept { return num_bytes_; }

 private:
  std::vector<std::vector<Copy>> lists_;
  std::size_t num_slices_ = 0;
  std::size_t num_bytes_ = 0;
};

// The router's choice of experts: `count` integers of `index_bytes` (4 or 8) each. Throws
// FabricError for anything else.
void check_indices(const void* indices, std::size_t count, std::size_t index_bytes);

}  // namespace dwdp
