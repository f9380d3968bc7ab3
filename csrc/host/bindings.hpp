#pragma once

#include <pybind11/pybind11.h>

namespace dwdp::host {

// Adds the host fabric's classes and functions to `module`.
void register_bindings(pybind11::module_& module);

}  // namespace dwdp::host
