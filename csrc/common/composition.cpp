#include "common/composition.hpp"

#include <algorithm>

#include "common/error.hpp"

namespace dwdp {
namespace {

bool starts_before(const Composition::Piece& piece, std::size_t offset) {
  return piece.offset < offset;
}

}  // namespace

Composition::Composition(std::size_t num_bytes, std::size_t granularity)
    : num_bytes_(num_bytes), granularity_(granularity) {
  DWDP_CHECK(num_bytes > 0 && num_bytes % granularity == 0,
             "an address range has a positive multiple of ", granularity, " bytes, not ",
             num_bytes);
}

void Composition::check(std::size_t offset, std::size_t num_bytes) {
  DWDP_CHECK(offset % granularity_ == 0, "offset ", offset, " is not a multiple of ", granularity_,
             ", the granularity of mappings");
  DWDP_CHECK(num_bytes <= num_bytes_ && offset <= num_bytes_ - num_bytes, "a region of ", num_bytes,
             " bytes at offset ", offset, " does not fit an address range of ", num_bytes_,
             " bytes");
  const auto next = std::lower_bound(pieces_.begin(), pieces_.end(), offset, starts_before);
  const bool overlaps_next = next != pieces_.end() && next->offset < offset + num_bytes;
  const bool overlaps_previous =
      next != pieces_.begin() && (next - 1)->offset + (next - 1)->num_bytes > offset;
  DWDP_CHECK(!overlaps_next && !overlaps_previous, "a region of ", num_bytes, " bytes at offset ",
             offset, " overlaps one that is mapped there already");
  if (pieces_.size() == pieces_.capacity()) pieces_.reserve(2 * pieces_.size() + 4);
}

void Composition::add(const Piece& piece) noexcept {
  pieces_.insert(std::lower_bound(pieces_.begin(), pieces_.end(), piece.offset, starts_before),
                 piece);
}

std::vector<Composition::Run> Composition::runs(bool writable) const {
  std::vector<Run> runs;
  for (const Piece& piece : pieces_) {
    DWDP_CHECK(!writable || !piece.imported, "the region of ", piece.num_bytes, " bytes at offset ",
               piece.offset, " was received from a peer: it is read-only, not writable");
    if (!runs.empty() && runs.back().offset + runs.back().num_bytes == piece.offset) {
      runs.back().num_bytes += piece.num_bytes;
    } else {
      runs.push_back({piece.offset, piece.num_bytes});
    }
  }
  return runs;
}

void Composition::check_view(std::size_t offset, std::size_t num_bytes) const {
  DWDP_CHECK(num_bytes <= num_bytes_ && offset <= num_bytes_ - num_bytes, "a view of ", num_bytes,
             " bytes at offset ", offset, " reaches past the end of an address range of ",
             num_bytes_, " bytes");
}

}  // namespace dwdp
