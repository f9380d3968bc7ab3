// The Python module dwdp._C.
#include <pybind11/pybind11.h>

#include <string>

#include "bindings/bindings.hpp"
#include "common/error.hpp"

#ifdef DWDP_WITH_CUDA
#include <cuda.h>
#endif

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
  info["compiler"] =
#if defined(__clang__)
      "clang " __clang_version__;
#else
      "gcc " __VERSION__;
#endif
#ifdef DWDP_WITH_CUDA
  info["fabrics"] = "host+cuda";
  info["cuda_version"] = dwdp::concat(CUDA_VERSION / 1000, ".", CUDA_VERSION % 1000 / 10);
  info["cuda_architectures"] = DWDP_CUDA_ARCHS;
#else
  info["fabrics"] = "host";
  info["cuda_version"] = "";
  info["cuda_architectures"] = "";
#endif
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "Native core of dwdp: memory that peers can map, and engines that copy it.";
  py::register_local_exception_translator(&translate_fabric_error);
  module.def("build_info", &build_info,
             "What this module was built from and for: ``version``, ``compiler``, ``fabrics`` "
             "(``host`` or ``host+cuda``), ``cuda_version`` and ``cuda_architectures``.");
  using namespace dwdp::bindings;
  register_descriptors(module);
  register_host_memory(module);
  register_host_copies(module);
#ifdef DWDP_WITH_CUDA
  register_cuda_device(module);
  register_cuda_memory(module);
  register_cuda_copies(module);
#endif
}
