#include <pybind11/stl.h>

#include <cstring>
#include <string>
#include <utility>

#include "bindings/bindings.hpp"
#include "bindings/python.hpp"
#include "cuda/address_range.hpp"
#include "cuda/region.hpp"
#include "transport/descriptor_client.hpp"

namespace dwdp::bindings {

using cuda::AddressRange;
using cuda::Device;
using cuda::FabricHandle;
using cuda::Region;

namespace {

FabricHandle parse_fabric_handle(const std::string& bytes) {
  FabricHandle handle{};
  DWDP_CHECK(bytes.size() == handle.size(), "a fabric handle has ", handle.size(), " bytes, not ",
             bytes.size());
  std::memcpy(handle.data(), bytes.data(), handle.size());
  return handle;
}

std::vector<Region> fetch_cuda_regions(const std::shared_ptr<Device>& device,
                                       const std::string& address, const py::bytes& token,
                                       const std::string& name,
                                       const std::vector<std::size_t>& sizes, double timeout_s) {
  const transport::Token parsed_token = transport::parse_token(token);
  const py::gil_scoped_release release;
  std::vector<UniqueFd> fds = transport::fetch_descriptors(
      address, parsed_token, name, sizes, milliseconds(timeout_s), &check_python_signals);
  std::vector<Region> regions;
  regions.reserve(fds.size());
  for (std::size_t i = 0; i < fds.size(); ++i) {
    regions.push_back(Region::import_descriptor(device, std::move(fds[i]), sizes[i],
                                                transport::origin(address, name, i)));
  }
  return regions;
}

void register_region(py::module_& module) {
  py::class_<Region, ExportableRegion>(module, "CudaRegion", "Physical memory of a GPU.")
      .def(py::init([](std::shared_ptr<Device> device, std::size_t num_bytes,
                       const std::string& handle_type) {
             return Region::allocate(std::move(device), num_bytes,
                                     cuda::parse_handle_type(handle_type));
           }),
           py::arg("device").none(false), py::arg("num_bytes"), py::arg("handle_type"),
           py::call_guard<py::gil_scoped_release>(),
           "Allocate ``num_bytes``, a positive multiple of the granularity, zeroed. "
           "``handle_type``: how it can be exported, ``posix_fd`` or ``fabric``.")
      .def_static(
          "import_fabric",
          [](std::shared_ptr<Device> device, const py::bytes& handle, std::size_t num_bytes) {
            const FabricHandle parsed = parse_fabric_handle(handle);
            const py::gil_scoped_release release;
            return Region::import_fabric(std::move(device), parsed, num_bytes,
                                         "by a peer's fabric handle");
          },
          py::arg("device").none(false), py::arg("handle"), py::arg("num_bytes"),
          "The region of ``num_bytes`` that a peer's ``export_fabric`` returned ``handle`` for.")
      .def_property_readonly("imported", &Region::imported,
                             "Whether it came from a peer and can only be mapped read-only.")
      .def(
          "export_fabric",
          [](const Region& region) {
            const FabricHandle handle = region.export_fabric();
            return py::bytes(handle.data(), handle.size());
          },
          "64 bytes by which any GPU of the NVLink domain can import it.")
      .def("close", &Region::close, "Drop the handle; mappings stay valid. Idempotent.");
}

}  // namespace

void register_cuda_memory(py::module_& module) {
  register_region(module);

  py::class_<AddressRange>(module, "CudaAddressRange",
                           "Reserved addresses of a GPU into which regions are mapped.")
      .def(py::init<std::shared_ptr<Device>, std::size_t>(), py::arg("device").none(false),
           py::arg("num_bytes"), py::call_guard<py::gil_scoped_release>())
      .def_property_readonly("address", &AddressRange::address)
      .def_property_readonly("num_bytes", &AddressRange::num_bytes)
      .def("map", &AddressRange::map, py::arg("offset"), py::arg("region"),
           py::call_guard<py::gil_scoped_release>(),
           "Map all of ``region`` at ``offset``, not accessible yet.")
      .def("enable_access", &AddressRange::enable_access, py::arg("writable"),
           py::call_guard<py::gil_scoped_release>(),
           "Let the GPU read all that is mapped, and write it if ``writable``.")
      .def(
          "bytes_capsule",
          [](const AddressRange& range, std::size_t offset, std::size_t num_bytes) {
            return dlpack_capsule(range.bytes_tensor(offset, num_bytes));
          },
          py::arg("offset"), py::arg("num_bytes"),
          "A DLPack capsule of a ``uint8 [num_bytes]`` CUDA tensor that keeps the range mapped.")
      .def("close", &AddressRange::close, py::call_guard<py::gil_scoped_release>(),
           "Give the range up; it is unmapped when the last tensor that views it is gone.");

  module.def("fetch_cuda_regions", &fetch_cuda_regions, py::arg("device").none(false),
             py::arg("address"), py::arg("token"), py::arg("name"), py::arg("sizes"),
             py::arg("timeout_s"),
             "Regions that the server at ``address`` published under ``name``, for ``device``.");
}

}  // namespace dwdp::bindings
