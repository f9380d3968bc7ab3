#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#include "common/composition.hpp"
#include "common/dlpack.hpp"
#include "host/region.hpp"

namespace dwdp::host {

// A reserved range of addresses into which regions are mapped. Touching a part that is not mapped,
// or whose access was not enabled, faults.
class AddressRange {
 public:
  // `num_bytes`: a positive multiple of the granularity.
  explicit AddressRange(std::size_t num_bytes);

  // Throws FabricError when closed.
  std::uintptr_t address() const;
  std::size_t num_bytes() const noexcept { return composition_.num_bytes(); }

  // Maps all of `region` at `offset`, where nothing is mapped yet. Not accessible until
  // enable_access().
  void map(std::size_t offset, const Region& region);

  // Makes all that has been mapped so far readable, and writable or not. Throws FabricError when
  // `writable` and an imported region is among it.
  void enable_access(bool writable);

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

  Composition composition_;
  std::shared_ptr<Mapping> mapping_;
};

}  // namespace dwdp::host
