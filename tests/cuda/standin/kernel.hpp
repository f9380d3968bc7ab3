// Kernels: the project's own, run on the CPU from the same source.
#pragma once

#include <cuda.h>

#include <cstdint>
#include <functional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "core.hpp"

namespace standin {

// The shape of a launch.
struct Dimensions {
  unsigned int grid[3];
  unsigned int block[3];
  unsigned int shared_bytes;
};

// A kernel by its name. `bind` copies the arguments, as a launch does, and returns what runs it.
struct Kernel {
  std::string name;
  std::function<std::function<CUresult(const Dimensions&)>(void** arguments)> bind;
};

// A kernel whose arguments have the types that `run` takes after the dimensions.
template <typename... Arguments>
Kernel make_kernel(const char* name, CUresult (*run)(const Dimensions&, Arguments...)) {
  return {name, [run](void** arguments) {
            std::size_t next = 0;
            // Braces: evaluated from left to right.
            std::tuple<Arguments...> values{*static_cast<Arguments*>(arguments[next++])...};
            return [run, values](const Dimensions& dimensions) {
              return std::apply([&](const Arguments&... each) { return run(dimensions, each...); },
                                values);
            };
          }};
}

// The kernels in csrc/cuda.
std::vector<Kernel> project_kernels();

std::int64_t live_modules();

}  // namespace standin
