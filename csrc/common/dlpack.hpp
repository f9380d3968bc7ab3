// The part of the DLPack data interchange format (version 0.x, the unversioned "dltensor" capsule)
// that a CPU byte tensor needs. The layout is fixed by the specification:
// https://dmlc.github.io/dlpack/latest/c_api.html
#pragma once

#include <cstddef>
#include <cstdint>

namespace dwdp::dlpack {

inline constexpr const char* kCapsuleName = "dltensor";

enum DLDeviceType : std::int32_t { kDLCPU = 1 };

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

}  // namespace dwdp::dlpack
