#include <pybind11/stl.h>

#include <string>
#include <utility>

#include "bindings/bindings.hpp"
#include "bindings/python.hpp"
#include "cuda/device.hpp"

namespace dwdp::bindings {

using cuda::Device;

namespace {

template <typename Value>
auto attribute(Value cuda::DeviceAttributes::* member) {
  return [member](const Device& device) { return device.attributes().*member; };
}

}  // namespace

void register_cuda_device(py::module_& module) {
  using cuda::DeviceAttributes;
  py::class_<Device, std::shared_ptr<Device>>(module, "CudaDevice",
                                              "One GPU, in the context that torch works in.")
      .def(py::init<int>(), py::arg("ordinal"), py::call_guard<py::gil_scoped_release>())
      .def_property_readonly("ordinal", &Device::ordinal)
      .def_property_readonly("granularity", &Device::granularity,
                             "Bytes; sizes and offsets of mappings are multiples of it.")
      .def_property_readonly("name", attribute(&DeviceAttributes::name))
      .def_property_readonly("uuid", attribute(&DeviceAttributes::uuid))
      .def_property_readonly("supports_virtual_memory",
                             attribute(&DeviceAttributes::supports_virtual_memory))
      .def_property_readonly("supports_posix_handles",
                             attribute(&DeviceAttributes::supports_posix_handles))
      .def_property_readonly("supports_fabric_handles",
                             attribute(&DeviceAttributes::supports_fabric_handles))
      .def_property_readonly("num_copy_engines", attribute(&DeviceAttributes::num_copy_engines))
      .def_property_readonly("num_multiprocessors",
                             attribute(&DeviceAttributes::num_multiprocessors))
      .def_property_readonly("compute_capability",
                             [](const Device& device) {
                               const DeviceAttributes& attributes = device.attributes();
                               return std::pair(attributes.compute_capability_major,
                                                attributes.compute_capability_minor);
                             })
      .def_property_readonly(
          "driver_version",
          [](const Device&) {
            const int version = cuda::driver().version;
            return std::pair(version / 1000, version % 1000 / 10);
          },
          "The newest CUDA version that the driver supports.")
      .def("can_access_peer", &Device::can_access_peer, py::arg("ordinal"),
           "Whether this GPU can read the memory of GPU ``ordinal``.")
      .def(
          "choose_handle_type",
          [](Device& device, bool across_hosts) {
            const py::gil_scoped_release release;
            return std::string(to_string(device.choose_handle_type(across_hosts)));
          },
          py::arg("across_hosts"),
          "How to export memory: ``posix_fd`` or ``fabric``. Exports some to see that it works.")
      .def(
          "spin",
          [](Device& device, std::uintptr_t stream, unsigned long long nanoseconds) {
            const py::gil_scoped_release release;
            device.spin(reinterpret_cast<CUstream>(stream), nanoseconds);
          },
          py::arg("stream"), py::arg("nanoseconds"), "Keep ``stream`` busy for so long.");
}

}  // namespace dwdp::bindings
