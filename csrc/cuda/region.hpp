#pragma once

#include <cstddef>
#include <memory>
#include <string>

#include "common/exportable_region.hpp"
#include "cuda/allocation.hpp"
#include "cuda/device.hpp"

namespace dwdp::cuda {

// Physical memory of a GPU: this process's own, or a peer's.
class Region final : public ExportableRegion {
 public:
  // `num_bytes` (a positive multiple of the granularity) of zeroed memory. Throws FabricError, with
  // the bytes needed and free, when it is not available.
  static Region allocate(std::shared_ptr<Device> device, std::size_t num_bytes, HandleType type);

  // What a peer exported. The driver does not tell how large it is, and refuses to map it where it
  // is not of `num_bytes`. `origin` names it in errors.
  static Region import_descriptor(std::shared_ptr<Device> device, UniqueFd fd,
                                  std::size_t num_bytes, const std::string& origin);
  static Region import_fabric(std::shared_ptr<Device> device, const FabricHandle& handle,
                              std::size_t num_bytes, const std::string& origin);

  std::size_t num_bytes() const noexcept override { return num_bytes_; }
  bool imported() const noexcept { return imported_; }
  const Device& device() const noexcept { return *device_; }

  // These throw FabricError when closed, or exported otherwise.
  CUmemGenericAllocationHandle handle() const;
  UniqueFd export_descriptor() const override;
  FabricHandle export_fabric() const;

  // Mappings, here and in peers, stay valid. Idempotent.
  void close() noexcept { allocation_.reset(); }

 private:
  Region(std::shared_ptr<Device> device, Allocation allocation, std::size_t num_bytes,
         HandleType type, bool imported);

  std::shared_ptr<Device> device_;
  Allocation allocation_;
  std::size_t num_bytes_;
  HandleType type_;
  bool imported_;
};

}  // namespace dwdp::cuda
