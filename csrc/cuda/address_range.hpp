#pragma once

#include <cstddef>
#include <memory>

#include "common/dlpack.hpp"
#include "cuda/device.hpp"
#include "cuda/region.hpp"

namespace dwdp::cuda {

// A reserved range of a GPU's addresses into which regions are mapped. Touching a part that is not
// mapped, or whose access was not enabled, is an error that ends the context.
class AddressRange {
 public:
  // `num_bytes`: a positive multiple of the granularity.
  AddressRange(std::shared_ptr<Device> device, std::size_t num_bytes);

  // Throws FabricError when closed.
  CUdeviceptr address() const;
  std::size_t num_bytes() const noexcept { return num_bytes_; }

  // Maps all of `region` at `offset`, where nothing is mapped yet. Not accessible until
  // enable_access().
  void map(std::size_t offset, const Region& region);

  // Lets this GPU read all that has been mapped so far, and write it or not, with one call of the
  // driver for each run of regions that touch. Throws FabricError when `writable` and an imported
  // region is among it. Where the driver knows no read-only mappings, they are writable, and
  // nothing but the caller's care protects a peer's memory.
  void enable_access(bool writable);

  // A uint8 [num_bytes] tensor over the bytes at `offset`, which keeps the range mapped. The caller
  // owns it: call its deleter once.
  dlpack::DLManagedTensor* bytes_tensor(std::size_t offset, std::size_t num_bytes) const;

  // Keeps the addresses mapped for as long as it lives. Throws FabricError when closed.
  std::shared_ptr<const void> keep_mapped() const;

  // The range is unmapped when the last tensor that views it, and the last fetch that reads or
  // writes it, is gone, and the GPU has finished what it was given until then. Idempotent.
  void close() noexcept { mapping_.reset(); }

 private:
  class Mapping;

  Mapping& mapping() const;

  std::shared_ptr<Mapping> mapping_;
  std::size_t num_bytes_;
};

}  // namespace dwdp::cuda
