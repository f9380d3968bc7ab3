#include "host/bindings.hpp"

#include <pybind11/stl.h>

#include <algorithm>
#include <chrono>
#include <memory>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "common/dlpack.hpp"
#include "common/error.hpp"
#include "host/address_range.hpp"
#include "host/copy_engine.hpp"
#include "host/descriptor_client.hpp"
#include "host/descriptor_server.hpp"
#include "host/event.hpp"
#include "host/region.hpp"

namespace py = pybind11;

namespace dwdp::host {
namespace {

// Lets Ctrl-C end a wait: called, without the GIL, when a signal handler interrupted it.
void check_python_signals() {
  const py::gil_scoped_acquire acquire;
  if (PyErr_CheckSignals() != 0) throw py::error_already_set();
}

double wait_for_event(const Event& event) {
  const std::uint64_t generation = event.issued();
  if (event.completed(generation)) return 0.0;
  const auto start = std::chrono::steady_clock::now();
  {
    const py::gil_scoped_release release;
    while (!event.wait_interruptible(generation)) check_python_signals();
  }
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

py::capsule bytes_capsule(const AddressRange& range, std::size_t offset, std::size_t num_bytes) {
  // Whoever consumes the capsule renames it and calls the deleter himself.
  return py::capsule(range.bytes_tensor(offset, num_bytes), dlpack::kCapsuleName,
                     [](PyObject* capsule) {
                       if (!PyCapsule_IsValid(capsule, dlpack::kCapsuleName)) return;
                       auto* const tensor = static_cast<dlpack::DLManagedTensor*>(
                           PyCapsule_GetPointer(capsule, dlpack::kCapsuleName));
                       tensor->deleter(tensor);
                     });
}

using CopyTuple = std::tuple<std::uintptr_t, std::uintptr_t, std::size_t>;

std::shared_ptr<const Fetch> prepare(const CopyEngine& engine,
                                     const std::vector<std::vector<CopyTuple>>& lanes,
                                     const std::vector<const AddressRange*>& ranges) {
  std::vector<std::vector<Copy>> copies(lanes.size());
  for (std::size_t lane = 0; lane < lanes.size(); ++lane) {
    copies[lane].reserve(lanes[lane].size());
    for (const auto& [dst, src, num_bytes] : lanes[lane]) {
      copies[lane].push_back(
          {reinterpret_cast<void*>(dst), reinterpret_cast<const void*>(src), num_bytes});
    }
  }
  std::vector<std::shared_ptr<const void>> keep_mapped;
  for (const AddressRange* range : ranges) keep_mapped.push_back(range->keep_mapped());
  return engine.prepare(std::move(copies), std::move(keep_mapped));
}

void register_memory(py::module_& module) {
  py::class_<Region>(module, "HostRegion", "Shared memory of a fixed size (a sealed memfd).")
      .def(py::init(&Region::allocate), py::arg("num_bytes"),
           py::call_guard<py::gil_scoped_release>(),
           "Allocate ``num_bytes``, a positive multiple of the page size, zeroed.")
      .def_property_readonly("num_bytes", &Region::num_bytes)
      .def_property_readonly("imported", &Region::imported,
                             "Whether it came from a peer and can only be mapped read-only.")
      .def("close", &Region::close, "Drop the descriptor; mappings stay valid. Idempotent.");

  py::class_<AddressRange>(module, "HostAddressRange",
                           "Reserved addresses into which regions are mapped.")
      .def(py::init<std::size_t>(), py::arg("num_bytes"))
      .def_property_readonly("address", &AddressRange::address)
      .def_property_readonly("num_bytes", &AddressRange::num_bytes)
      .def("map", &AddressRange::map, py::arg("offset"), py::arg("region"), py::kw_only(),
           py::arg("writable"), "Map all of ``region`` at ``offset``, replacing what was there.")
      .def("bytes_capsule", &bytes_capsule, py::arg("offset"), py::arg("num_bytes"),
           "A DLPack capsule of a ``uint8 [num_bytes]`` CPU tensor that keeps the range mapped.")
      .def("close", &AddressRange::close,
           "Give the range up; it is unmapped when the last tensor that views it is gone.");
}

void register_copies(py::module_& module) {
  py::class_<Event, std::shared_ptr<Event>>(
      module, "HostEvent", "Generations that are issued and completed, as with a CUDA event.")
      .def(py::init<>())
      .def("record", &Event::record, "Issue a generation that is complete at once.")
      .def("query", &Event::query, "Whether the generation issued last has completed.")
      .def("wait", &wait_for_event,
           "Wait for the generation issued last. Returns the seconds waited.");

  py::class_<Fetch, std::shared_ptr<Fetch>>(module, "HostFetch", "Slices laid out per lane.")
      .def_property_readonly("num_slices", &Fetch::num_slices)
      .def_property_readonly("num_bytes", &Fetch::num_bytes);

  py::class_<CopyEngine>(module, "HostCopyEngine", "Threads that copy slices, some per lane.")
      .def(py::init<std::size_t, std::size_t>(), py::arg("num_lanes"), py::arg("lane_depth"))
      .def_property_readonly("num_lanes", &CopyEngine::num_lanes)
      .def_property_readonly("lane_depth", &CopyEngine::lane_depth)
      .def_property_readonly("num_bytes_copied", &CopyEngine::num_bytes_copied,
                             "Bytes copied since the engine was made.")
      .def(
          "prepare",
          [](const CopyEngine& engine, const std::vector<std::vector<CopyTuple>>& lanes,
             const std::vector<const AddressRange*>& ranges) {
            return std::const_pointer_cast<Fetch>(prepare(engine, lanes, ranges));
          },
          py::arg("lanes"), py::arg("ranges") = std::vector<const AddressRange*>{},
          "Lay out a fetch: per lane its ``(dst, src, num_bytes)`` slices. It keeps ``ranges`` "
          "mapped.")
      .def(
          "submit",
          [](CopyEngine& engine, std::shared_ptr<Fetch> fetch, std::shared_ptr<Event> after,
             std::shared_ptr<Event> done) {
            engine.submit(std::move(fetch), std::move(after), std::move(done));
          },
          py::arg("fetch").none(false), py::kw_only(), py::arg("after").none(true),
          py::arg("done").none(false),
          "Start ``fetch`` after the last generation of ``after``; ``done`` gets a new one.")
      .def("close", &CopyEngine::close, py::call_guard<py::gil_scoped_release>(),
           "Finish what was submitted and end the threads. Idempotent.");
}

std::chrono::milliseconds milliseconds(double seconds) {
  // A day is as good as for ever, and keeps every sum of times in range.
  constexpr double kLongest = 86400.0;
  DWDP_CHECK(seconds > 0.0, "a timeout is positive, not ", seconds, " s");
  return std::chrono::ceil<std::chrono::milliseconds>(
      std::chrono::duration<double>(std::min(seconds, kLongest)));
}

void publish(DescriptorServer& server, const std::string& name,
             const std::vector<const Region*>& regions) {
  std::vector<Descriptor> descriptors;
  descriptors.reserve(regions.size());
  for (const Region* const region : regions) {
    DWDP_CHECK(region != nullptr, "'", name, "' cannot be published: one of its regions is None");
    descriptors.push_back({region->open_read_only(), region->num_bytes()});
  }
  server.publish(name, std::move(descriptors));
}

void register_descriptors(py::module_& module) {
  py::class_<DescriptorServer>(module, "DescriptorServer",
                               "Hands descriptors to processes of this user that know the token.")
      .def(py::init([](const py::bytes& token, double client_timeout_s) {
             return std::make_unique<DescriptorServer>(parse_token(token),
                                                       milliseconds(client_timeout_s));
           }),
           py::arg("token"), py::arg("client_timeout_s") = 10.0,
           "``token``: 16 bytes. Clients that are silent for ``client_timeout_s`` are dropped.")
      .def_property_readonly("address", &DescriptorServer::address)
      .def("publish", &publish, py::arg("name"), py::arg("regions"),
           "Serve ``regions`` under ``name``; they may be closed afterwards.")
      .def("close", &DescriptorServer::close, py::call_guard<py::gil_scoped_release>(),
           "Stop serving. Idempotent.");

  module.def(
      "fetch_regions",
      [](const std::string& address, const py::bytes& token, const std::string& name,
         const std::vector<std::size_t>& sizes, double timeout_s) {
        const Token parsed_token = parse_token(token);
        const py::gil_scoped_release release;
        return fetch_regions(address, parsed_token, name, sizes, milliseconds(timeout_s),
                             &check_python_signals);
      },
      py::arg("address"), py::arg("token"), py::arg("name"), py::arg("sizes"), py::arg("timeout_s"),
      "Regions that the server at ``address`` published under ``name``.");
}

}  // namespace

void register_bindings(py::module_& module) {
  register_memory(module);
  register_copies(module);
  register_descriptors(module);
}

}  // namespace dwdp::host
