#include <pybind11/stl.h>

#include "bindings/bindings.hpp"
#include "bindings/python.hpp"
#include "host/address_range.hpp"
#include "host/copy_engine.hpp"

namespace dwdp::bindings {

using host::AddressRange;
using host::CopyEngine;
using host::Demand;
using host::Event;
using host::Fetch;
using host::Span;

namespace {

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

using SpanTuple = std::tuple<double, double, std::size_t, std::size_t>;

std::vector<std::vector<SpanTuple>> drain_spans(CopyEngine& engine) {
  std::vector<std::vector<SpanTuple>> lanes;
  for (const std::vector<Span>& spans : engine.drain_spans()) {
    std::vector<SpanTuple>& lane = lanes.emplace_back();
    lane.reserve(spans.size());
    for (const Span& span : spans) {
      lane.emplace_back(static_cast<double>(span.start_ns) * 1e-9,
                        static_cast<double>(span.end_ns) * 1e-9, span.layer, span.num_bytes);
    }
  }
  return lanes;
}

}  // namespace

void register_host_copies(py::module_& module) {
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

  py::class_<Demand, std::shared_ptr<Demand>>(module, "HostDemand", "Slices laid out per expert.")
      .def_property_readonly("num_experts", &Demand::num_experts)
      .def_property_readonly("num_bytes", &Demand::num_bytes);

  py::class_<CopyEngine>(module, "HostCopyEngine", "Threads that copy slices, some per lane.")
      .def(py::init<std::size_t, std::size_t>(), py::arg("num_lanes"), py::arg("lane_depth"))
      .def_property_readonly("num_lanes", &CopyEngine::num_lanes)
      .def_property_readonly("lane_depth", &CopyEngine::lane_depth)
      .def(
          "prepare",
          [](const CopyEngine& engine, const std::vector<std::vector<CopyTuple>>& lanes,
             const std::vector<const AddressRange*>& ranges, std::size_t layer) {
            return std::const_pointer_cast<Fetch>(
                engine.prepare(to_slices(lanes), keep_mapped(ranges), layer));
          },
          py::arg("lanes"), py::arg("ranges") = std::vector<const AddressRange*>{},
          py::arg("layer") = 0,
          "Lay out a fetch: per lane its ``(dst, src, num_bytes)`` slices. It keeps ``ranges`` "
          "mapped; its spans are of ``layer``.")
      .def(
          "submit",
          [](CopyEngine& engine, std::shared_ptr<Fetch> fetch, std::shared_ptr<Event> after,
             std::shared_ptr<Event> done) {
            engine.submit(std::move(fetch), std::move(after), std::move(done));
          },
          py::arg("fetch").none(false), py::kw_only(), py::arg("after").none(true),
          py::arg("done").none(false),
          "Start ``fetch`` after the last generation of ``after``; ``done`` gets a new one.")
      .def(
          "prepare_demand",
          [](const CopyEngine&, const std::vector<std::vector<CopyTuple>>& experts,
             const std::vector<const AddressRange*>& ranges, std::size_t layer) {
            return std::make_shared<Demand>(to_slices(experts), keep_mapped(ranges), layer);
          },
          py::arg("experts"), py::arg("ranges") = std::vector<const AddressRange*>{},
          py::arg("layer") = 0,
          "Lay out what each expert takes: its ``(dst, src, num_bytes)`` slices. Keeps ``ranges`` "
          "mapped; its spans are of ``layer``.")
      .def(
          "fetch_activated",
          [](CopyEngine& engine, const Demand& demand, std::uintptr_t indices,
             std::size_t num_indices, std::size_t index_bytes) {
            const py::gil_scoped_release release;
            return engine.fetch_activated(demand, reinterpret_cast<const void*>(indices),
                                          num_indices, index_bytes);
          },
          py::arg("demand"), py::arg("indices"), py::arg("num_indices"), py::arg("index_bytes"),
          "Copy the experts that the integers at address ``indices`` name. Returns the bytes "
          "copied.")
      .def("drain_spans", &drain_spans,
           "Per lane, and at last for fetches on demand, ``(start_s, end_s, layer, num_bytes)`` of "
           "what was copied since the last call.")
      .def("close", &CopyEngine::close, py::call_guard<py::gil_scoped_release>(),
           "Finish what was submitted and end the threads. Idempotent.");
}

}  // namespace dwdp::bindings
