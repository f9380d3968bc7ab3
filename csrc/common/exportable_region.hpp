#pragma once

#include <cstddef>

#include "common/unique_fd.hpp"

namespace dwdp {

// Memory that other processes can import by a file descriptor.
class ExportableRegion {
 public:
  virtual ~ExportableRegion() = default;

  virtual std::size_t num_bytes() const noexcept = 0;

  // A new descriptor of the memory. Throws FabricError when closed, or not of that kind.
  virtual UniqueFd export_descriptor() const = 0;
};

}  // namespace dwdp
