// Each area of the native core registers its Python classes.
#pragma once

#include <pybind11/pybind11.h>

namespace dwdp::bindings {

void register_host_memory(pybind11::module_& module);
void register_host_copies(pybind11::module_& module);
void register_descriptors(pybind11::module_& module);

#ifdef DWDP_WITH_CUDA
void register_cuda_device(pybind11::module_& module);
void register_cuda_memory(pybind11::module_& module);
void register_cuda_copies(pybind11::module_& module);
#endif

}  // namespace dwdp::bindings
