// The Python module dwdp._C. Each area of the native core registers itself.
#include "host/bindings.hpp"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "common/error.hpp"

namespace py = pybind11;

namespace {

// Python's FabricError lives in dwdp.fabric.base, next to the interface that documents it, and is
// looked up when the first error is thrown: importing this module imports nothing else.
void translate_fabric_error(std::exception_ptr error) {
  static PyObject* python_type = nullptr;
  try {
    if (error) std::rethrow_exception(error);
  } catch (const dwdp::FabricError& fabric_error) {
    if (python_type == nullptr) {
      const py::object found = py::module_::import("dwdp.fabric.base").attr("FabricError");
      python_type = py::object(found).release().ptr();
    }
    py::set_error(py::handle(python_type), fabric_error.what());
  }
}

py::dict build_info() {
  py::dict info;
  info["version"] = DWDP_VERSION;
  info["fabrics"] = "host";
  info["compiler"] =
#if defined(__clang__)
      "clang " __clang_version__;
#else
      "gcc " __VERSION__;
#endif
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "Native core of dwdp: memory that peers can map, and engines that copy it.";
  py::register_local_exception_translator(&translate_fabric_error);
  module.def("build_info", &build_info,
             "What this module was built from and for: ``version``, ``fabrics``, ``compiler``.");
  dwdp::host::register_bindings(module);
}
