#include <pybind11/stl.h>

#include <string>

#include "bindings/bindings.hpp"
#include "bindings/python.hpp"
#include "host/address_range.hpp"
#include "host/region.hpp"
#include "transport/descriptor_client.hpp"

namespace dwdp::bindings {

using host::AddressRange;
using host::Region;

namespace {

std::vector<Region> fetch_regions(const std::string& address, const py::bytes& token,
                                  const std::string& name, const std::vector<std::size_t>& sizes,
                                  double timeout_s) {
  const transport::Token parsed_token = transport::parse_token(token);
  const py::gil_scoped_release release;
  std::vector<UniqueFd> fds = transport::fetch_descriptors(
      address, parsed_token, name, sizes, milliseconds(timeout_s), &check_python_signals);
  std::vector<Region> regions;
  regions.reserve(fds.size());
  for (std::size_t i = 0; i < fds.size(); ++i) {
    regions.push_back(
        Region::import(std::move(fds[i]), sizes[i], transport::origin(address, name, i)));
  }
  return regions;
}

}  // namespace

void register_host_memory(py::module_& module) {
  py::class_<Region, ExportableRegion>(module, "HostRegion",
                                       "Shared memory of a fixed size (a sealed memfd).")
      .def(py::init(&Region::allocate), py::arg("num_bytes"),
           py::call_guard<py::gil_scoped_release>(),
           "Allocate ``num_bytes``, a positive multiple of the page size, zeroed.")
      .def_property_readonly("imported", &Region::imported,
                             "Whether it came from a peer and can only be mapped read-only.")
      .def("close", &Region::close, "Drop the descriptor; mappings stay valid. Idempotent.");

  py::class_<AddressRange>(module, "HostAddressRange",
                           "Reserved addresses into which regions are mapped.")
      .def(py::init<std::size_t>(), py::arg("num_bytes"))
      .def_property_readonly("address", &AddressRange::address)
      .def_property_readonly("num_bytes", &AddressRange::num_bytes)
      .def("map", &AddressRange::map, py::arg("offset"), py::arg("region"),
           "Map all of ``region`` at ``offset``, not accessible yet.")
      .def("enable_access", &AddressRange::enable_access, py::arg("writable"),
           "Make all that is mapped readable, and ``writable`` or not.")
      .def(
          "bytes_capsule",
          [](const AddressRange& range, std::size_t offset, std::size_t num_bytes) {
            return dlpack_capsule(range.bytes_tensor(offset, num_bytes));
          },
          py::arg("offset"), py::arg("num_bytes"),
          "A DLPack capsule of a ``uint8 [num_bytes]`` CPU tensor that keeps the range mapped.")
      .def("close", &AddressRange::close,
           "Give the range up; it is unmapped when the last tensor that views it is gone.");

  module.def("fetch_regions", &fetch_regions, py::arg("address"), py::arg("token"), py::arg("name"),
             py::arg("sizes"), py::arg("timeout_s"),
             "Regions that the server at ``address`` published under ``name``.");
}

}  // namespace dwdp::bindings
