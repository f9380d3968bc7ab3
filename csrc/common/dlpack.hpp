// The part of the DLPack data interchange format (version 0.x, the unversioned "dltensor" capsule)
// that a tensor of bytes needs. The layout is fixed by the specification:
// https://dmlc.github.io/dlpack/latest/c_api.html
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <utility>

namespace dwdp::dlpack {

inline constexpr const char* kCapsuleName = "dltensor";

enum DLDeviceType : std::int32_t { kDLCPU = 1, kDLCUDA = 2 };

enum DLDataTypeCode : std::uint8_t { kDLUInt = 1 };

struct DLDevice {
  DLDeviceType device_type;
  std::int32_t device_id;
};

struct DLDataType {
  std::uint8_t code;
  std::uint8_t bits;
  std::uint16_t lanes;
};

struct DLTensor {
  void* data;
  DLDevice device;
  std::int32_t ndim;
  DLDataType dtype;
  std::int64_t* shape;
  std::int64_t* strides;  // null: compact and row-major
  std::uint64_t byte_offset;
};

struct DLManagedTensor {
  DLTensor dl_tensor;
  void* manager_ctx;
  void (*deleter)(DLManagedTensor*);
};

static_assert(sizeof(void*) != 8 || sizeof(DLTensor) == 48);
static_assert(sizeof(void*) != 8 || offsetof(DLManagedTensor, deleter) == 56);

// A uint8 [num_bytes] tensor at `data`, which holds `owner` until its deleter is called, once, by
// whoever consumes it.
inline DLManagedTensor* make_bytes_tensor(void* data, std::size_t num_bytes, DLDevice device,
                                          std::shared_ptr<const void> owner) {
  struct View {
    DLManagedTensor tensor;
    std::int64_t shape[1];
    std::shared_ptr<const void> owner;
  };
  auto* const view = new View{{}, {static_cast<std::int64_t>(num_bytes)}, std::move(owner)};
  view->tensor.dl_tensor = {data,
                            device,
                            /*ndim=*/1,
                            {kDLUInt, /*bits=*/8, /*lanes=*/1},
                            view->shape,
                            /*strides=*/nullptr,
                            /*byte_offset=*/0};
  view->tensor.manager_ctx = view;
  view->tensor.deleter = [](DLManagedTensor* tensor) {
    delete static_cast<View*>(tensor->manager_ctx);
  };
  return &view->tensor;
}

}  // namespace dwdp::dlpack
