#include "cuda/attributes.hpp"

#include <cstddef>

namespace dwdp::cuda {
namespace {

std::string query_name(CUdevice device) {
  char name[256] = {};
  DWDP_CUDA(DeviceGetName, (name, static_cast<int>(sizeof(name)) - 1, device), "GPU ", device);
  return name;
}

std::string query_uuid(CUdevice device) {
  CUuuid uuid{};
  DWDP_CUDA(DeviceGetUuid, (&uuid, device), "GPU ", device);
  std::string text;
  for (std::size_t i = 0; i < sizeof(uuid.bytes); ++i) {
    constexpr char kDigits[] = "0123456789abcdef";
    const auto byte = static_cast<unsigned char>(uuid.bytes[i]);
    if (i == 4 || i == 6 || i == 8 || i == 10) text += '-';
    text += kDigits[byte >> 4];
    text += kDigits[byte & 15];
  }
  return text;
}

int query(CUdevice device, CUdevice_attribute kind) {
  int value = 0;
  DWDP_CUDA(DeviceGetAttribute, (&value, kind, device), "attribute ", static_cast<int>(kind),
            " of GPU ", device);
  return value;
}

}  // namespace

DeviceAttributes query_attributes(const PrimaryContext& context) {
  const CUdevice device = context.device();
  // Drivers before CUDA 12.4 do not know of fabric handles.
  const bool knows_fabric = driver().version >= 12040;
  return {
      query_name(device),
      query_uuid(device),
      query(device, CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED) != 0,
      query(device, CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED) != 0,
      knows_fabric && query(device, CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_FABRIC_SUPPORTED) != 0,
      query(device, CU_DEVICE_ATTRIBUTE_ASYNC_ENGINE_COUNT),
      query(device, CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT),
      query(device, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR),
      query(device, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR),
  };
}

}  // namespace dwdp::cuda
