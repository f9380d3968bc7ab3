#include <pybind11/stl.h>

#include <string>

#include "bindings/bindings.hpp"
#include "bindings/python.hpp"
#include "common/exportable_region.hpp"
#include "transport/descriptor_server.hpp"

namespace dwdp::bindings {

using transport::Descriptor;
using transport::DescriptorServer;

namespace {

void publish(DescriptorServer& server, const std::string& name,
             const std::vector<const ExportableRegion*>& regions) {
  std::vector<Descriptor> descriptors;
  descriptors.reserve(regions.size());
  for (const ExportableRegion* const region : regions) {
    DWDP_CHECK(region != nullptr, "'", name, "' cannot be published: one of its regions is None");
    descriptors.push_back({region->export_descriptor(), region->num_bytes()});
  }
  server.publish(name, std::move(descriptors));
}

}  // namespace

void register_descriptors(py::module_& module) {
  py::class_<ExportableRegion>(module, "ExportableRegion",
                               "Memory that other processes can import by a file descriptor.")
      .def_property_readonly("num_bytes", &ExportableRegion::num_bytes);

  py::class_<DescriptorServer>(module, "DescriptorServer",
                               "Hands descriptors to processes of this user that know the token.")
      .def(py::init([](const py::bytes& token, double client_timeout_s) {
             return std::make_unique<DescriptorServer>(transport::parse_token(token),
                                                       milliseconds(client_timeout_s));
           }),
           py::arg("token"), py::arg("client_timeout_s") = 10.0,
           "``token``: 16 bytes. Clients that are silent for ``client_timeout_s`` are dropped.")
      .def_property_readonly("address", &DescriptorServer::address)
      .def("publish", &publish, py::arg("name"), py::arg("regions"),
           "Serve ``regions``, of any fabric, under ``name``; they may be closed afterwards.")
      .def("close", &DescriptorServer::close, py::call_guard<py::gil_scoped_release>(),
           "Stop serving. Idempotent.");
}

}  // namespace dwdp::bindings
