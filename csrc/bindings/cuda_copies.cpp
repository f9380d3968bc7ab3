#include <pybind11/stl.h>

#include <utility>

#include "bindings/bindings.hpp"
#include "bindings/python.hpp"
#include "cuda/address_range.hpp"
#include "cuda/copy_engine.hpp"

namespace dwdp::bindings {

using cuda::AddressRange;
using cuda::CopyEngine;
using cuda::Demand;
using cuda::Device;
using cuda::Event;
using cuda::Fetch;

namespace {

CUstream to_stream(std::uintptr_t handle) { return reinterpret_cast<CUstream>(handle); }

void register_event(py::module_& module) {
  using release_gil = py::call_guard<py::gil_scoped_release>;
  py::class_<Event, std::shared_ptr<Event>>(
      module, "CudaEvent",
      "Orders streams, given as handles; also while they are captured. A stream that was captured "
      "has to exist until the fabric is used once more after that.")
      .def(py::init<std::shared_ptr<Device>>(), py::arg("device").none(false), release_gil())
      .def(
          "record", [](Event& event, std::uintptr_t stream) { event.record(to_stream(stream)); },
          py::arg("stream"), release_gil(),
          "Issue a generation that completes when what is in ``stream`` has finished.")
      .def(
          "wait", [](Event& event, std::uintptr_t stream) { event.wait(to_stream(stream)); },
          py::arg("stream"), release_gil(),
          "Make ``stream`` wait for the generation issued last. The host goes on at once.")
      .def("query", &Event::query, release_gil(),
           "Whether the generation issued last has completed.")
      .def("synchronize", &Event::synchronize, release_gil(),
           "Make the host wait for the generation issued last.")
      .def_property_readonly("num_waits", py::cpp_function(&Event::num_waits, release_gil()),
                             "Waits in which a stream stood still, as far as known by now.")
      .def_property_readonly("waited_s", py::cpp_function(&Event::waited_s, release_gil()),
                             "Seconds that streams stood still, as far as known by now.");
}

void register_engine(py::module_& module) {
  using release_gil = py::call_guard<py::gil_scoped_release>;
  py::class_<CopyEngine>(module, "CudaCopyEngine", "Streams that copy slices, some per lane.")
      .def(py::init<std::shared_ptr<Device>, std::size_t, std::size_t, bool, std::size_t>(),
           py::arg("device").none(false), py::arg("num_lanes"), py::arg("lane_depth"),
           py::arg("overlap") = true, py::arg("demand_blocks") = 16, release_gil(),
           "``overlap``: prefer copy engines to copies that take multiprocessors from compute. "
           "``demand_blocks``: multiprocessors that fetching on demand may take.")
      .def_property_readonly("num_lanes", &CopyEngine::num_lanes)
      .def_property_readonly("lane_depth", &CopyEngine::lane_depth)
      .def_property_readonly("uses_batch_copies", &CopyEngine::uses_batch_copies,
                             "Whether the driver takes many slices in one call.")
      .def(
          "prepare",
          [](const CopyEngine& engine, const std::vector<std::vector<CopyTuple>>& lanes,
             const std::vector<const AddressRange*>& ranges) {
            return std::const_pointer_cast<Fetch>(
                engine.prepare(to_slices(lanes), keep_mapped(ranges)));
          },
          py::arg("lanes"), py::arg("ranges") = std::vector<const AddressRange*>{},
          "Lay out a fetch: per lane its ``(dst, src, num_bytes)`` slices. It keeps ``ranges`` "
          "mapped.")
      .def(
          "submit",
          [](CopyEngine& engine, const std::shared_ptr<Fetch>& fetch,
             const std::shared_ptr<Event>& after, const std::shared_ptr<Event>& done) {
            const py::gil_scoped_release release;
            engine.submit(fetch, after.get(), *done);
          },
          py::arg("fetch").none(false), py::kw_only(), py::arg("after").none(true),
          py::arg("done").none(false),
          "Start ``fetch`` after the last generation of ``after``; ``done`` gets a new one. If "
          "``after`` is being captured, so is the fetch, and the engine keeps it until close().")
      .def(
          "prepare_demand",
          [](CopyEngine& engine, const std::vector<std::vector<CopyTuple>>& experts,
             const std::vector<const AddressRange*>& ranges) {
            return std::const_pointer_cast<Demand>(
                engine.prepare_demand(to_slices(experts), keep_mapped(ranges)));
          },
          py::arg("experts"), py::arg("ranges") = std::vector<const AddressRange*>{},
          "Lay out what each expert takes: its ``(dst, src, num_bytes)`` slices, in a table on the "
          "GPU. Keeps ``ranges`` mapped.")
      .def(
          "fetch_activated",
          [](CopyEngine& engine, const std::shared_ptr<Demand>& demand, std::uintptr_t indices,
             std::size_t num_indices, std::size_t index_bytes, std::uintptr_t stream) {
            const py::gil_scoped_release release;
            engine.fetch_activated(demand, reinterpret_cast<const void*>(indices), num_indices,
                                   index_bytes, to_stream(stream));
          },
          py::arg("demand").none(false), py::arg("indices"), py::arg("num_indices"),
          py::arg("index_bytes"), py::arg("stream"),
          "Let ``stream`` copy the experts that the integers at device address ``indices`` name.")
      .def_property_readonly("demanded_bytes",
                             py::cpp_function(&CopyEngine::demanded_bytes, release_gil()),
                             "Bytes copied on demand, replays of graphs aside. Waits for the GPU.")
      .def_property_readonly("demand_waited_s",
                             py::cpp_function(&CopyEngine::demand_waited_s, release_gil()),
                             "Seconds that took streams, as far as known by now.")
      .def("close", &CopyEngine::close, release_gil(), "Wait for what was submitted. Idempotent.");
}

}  // namespace

void register_cuda_copies(py::module_& module) {
  register_event(module);

  py::class_<Fetch, std::shared_ptr<Fetch>>(module, "CudaFetch", "Slices laid out per lane.")
      .def_property_readonly("num_slices", &Fetch::num_slices)
      .def_property_readonly("num_bytes", &Fetch::num_bytes);

  py::class_<Demand, std::shared_ptr<Demand>>(module, "CudaDemand", "Slices laid out per expert.")
      .def_property_readonly("num_experts", &Demand::num_experts)
      .def_property_readonly("num_bytes", &Demand::num_bytes);

  register_engine(module);
}

}  // namespace dwdp::bindings
