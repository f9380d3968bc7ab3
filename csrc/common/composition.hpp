#pragma once

#include <cstddef>
#include <vector>

namespace dwdp {

// What an address range is composed of: which bytes have a region mapped, and whose.
class Composition {
 public:
  struct Piece {
    std::size_t offset;
    std::size_t num_bytes;
    bool imported;  // from a peer
  };

  // Bytes that hang together, of one or more pieces.
  struct Run {
    std::size_t offset;
    std::size_t num_bytes;
  };

  // Both are multiples of `granularity`, or FabricError.
  Composition(std::size_t num_bytes, std::size_t granularity);

  std::size_t num_bytes() const noexcept { return num_bytes_; }

  // By offset.
  const std::vector<Piece>& pieces() const noexcept { return pieces_; }

  // Throws FabricError unless a region of `num_bytes` fits at `offset`, aligned, and nothing is
  // there yet. Makes room, so that the add() that follows cannot fail.
  void check(std::size_t offset, std::size_t num_bytes);
  void add(const Piece& piece) noexcept;

  // Where access is to be granted. Throws FabricError when `writable` and a piece is imported.
  std::vector<Run> runs(bool writable) const;

  // Throws FabricError when the bytes reach past the end.
  void check_view(std::size_t offset, std::size_t num_bytes) const;

 private:
  std::size_t num_bytes_;
  std::size_t granularity_;
  std::vector<Piece> pieces_;
};

}  // namespace dwdp
