#include "cuda/fetch.hpp"

#include <cstdint>
#include <utility>

namespace dwdp::cuda {
namespace {

// Far from 2^31 - 1 bytes, which are the most that some copies of the driver take as a width.
constexpr std::size_t kMaxNodeBytes = std::size_t{1} << 30;

DeviceAddress device_address(const void* pointer) {
  return static_cast<DeviceAddress>(reinterpret_cast<std::uintptr_t>(pointer));
}

std::vector<Batch> make_batches(const std::vector<std::vector<Copy>>& lanes,
                                std::size_t lane_depth) {
  std::vector<Batch> batches(lanes.size() * lane_depth);
  for (std::size_t lane = 0; lane < lanes.size(); ++lane) {
    for (std::size_t i = 0; i < lanes[lane].size(); ++i) {
      const Copy& copy = lanes[lane][i];
      Batch& batch = batches[lane * lane_depth + i % lane_depth];
      batch.dsts.push_back(device_address(copy.dst));
      batch.srcs.push_back(device_address(copy.src));
      batch.sizes.push_back(copy.num_bytes);
    }
  }
  return batches;
}

std::vector<Copy> merge_neighbours(const std::vector<Copy>& slices) {
  std::vector<Copy> merged;
  for (const Copy& copy : slices) {
    if (!merged.empty()) {
      Copy& last = merged.back();
      const bool follows = static_cast<char*>(last.dst) + last.num_bytes == copy.dst &&
                           static_cast<const char*>(last.src) + last.num_bytes == copy.src;
      if (follows && last.num_bytes + copy.num_bytes <= kMaxNodeBytes) {
        last.num_bytes += copy.num_bytes;
        continue;
      }
    }
    merged.push_back(copy);
  }
  return merged;
}

}  // namespace

Fetch::Fetch(std::vector<std::vector<Copy>> lanes, std::size_t lane_depth,
             std::vector<std::shared_ptr<const void>> keep_mapped)
    : slices_(std::move(lanes), "lane"),
      keep_mapped_(std::move(keep_mapped)),
      batches_(make_batches(slices_.lists(), lane_depth)) {
  for (const std::vector<Copy>& lane : slices_.lists()) chains_.push_back(merge_neighbours(lane));
}

}  // namespace dwdp::cuda
