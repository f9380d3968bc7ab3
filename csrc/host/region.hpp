#pragma once

#include <cstddef>
#include <string>

#include "common/exportable_region.hpp"
#include "common/unique_fd.hpp"

namespace dwdp::host {

// Bytes; sizes and offsets of every mapping are multiples of it.
std::size_t granularity();

// Physical memory behind a file descriptor, of a size that nobody can change any more.
class Region final : public ExportableRegion {
 public:
  // `num_bytes` (a positive multiple of the granularity) of zeroed memory, all of it there: a later
  // access cannot fail for want of memory. Throws FabricError when it is not available.
  static Region allocate(std::size_t num_bytes);

  // Takes over a descriptor received from a peer; mapped read-only. Throws FabricError unless it is
  // `num_bytes` long and sealed, so that the peer cannot truncate it under a mapping (SIGBUS).
  // `origin` names it in errors.
  static Region import(UniqueFd fd, std::size_t num_bytes, const std::string& origin);

  std::size_t num_bytes() const noexcept override { return num_bytes_; }
  bool imported() const noexcept { return imported_; }
  bool closed() const noexcept { return !fd_.valid(); }

  // Throws FabricError when closed.
  int fd() const;

  // It cannot be mapped writable.
  UniqueFd export_descriptor() const override;

  // Mappings, here and in peers, stay valid. Idempotent.
  void close() noexcept { fd_.reset(); }

 private:
  Region(UniqueFd fd, std::size_t num_bytes, bool imported) noexcept
      : fd_(std::move(fd)), num_bytes_(num_bytes), imported_(imported) {}

  UniqueFd fd_;
  std::size_t num_bytes_;
  bool imported_;
};

}  // namespace dwdp::host
