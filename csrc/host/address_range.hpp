#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#include "common/dlpack.hpp"
#include "host/region.hpp"

namespace dwdp::host {

// A reserved range of addresses into which regions are mapped. Touching a part into which nothing
// was mapped faults.
class AddressRange {
 public:
  // `num_bytes`: a positive multiple of the granularity.
  explicit AddressRange(std::size_t num_bytes);

  // Throws FabricError when closed.
  std::uintptr_t address() const;
  std::size_t num_bytes() const noexcept { return num_bytes_; }

  // Maps all of `region` at `offset`, replacing what was there. Not `writable` when imported.
  void map(std::size_t offset, const Region& region, bool writable);

  // A uint8 [num_bytes] tensor over the bytes at `offset`, which keeps the range mapped. The caller
  // owns it: call its deleter once.
  dlpack::DLManagedTensor* bytes_tensor(std::size_t offset, std::size_t num_bytes) const;

  // Keeps the addresses mapped for as long as it lives. Throws FabricError when closed.
  std::shared_ptr<const void> keep_mapped() const;

  // The range is unmapped when the last tensor that views it, and the last fetch that reads or
  // writes it, is gone. Idempotent.
  void close() noexcept { mapping_.reset(); }

 private:
  class Mapping;

  const Mapping& mapping() const;

  std::shared_ptr<Mapping> mapping_;
  std::size_t num_bytes_;
};

}  // namespace dwdp::host
