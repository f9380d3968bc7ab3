// What bindings of several areas have in common.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <tuple>
#include <vector>

#include "common/dlpack.hpp"
#include "common/error.hpp"
#include "common/slices.hpp"

namespace dwdp::bindings {

namespace py = pybind11;

// Lets Ctrl-C end a wait: called, without the GIL, when a signal handler interrupted it.
inline void check_python_signals() {
  const py::gil_scoped_acquire acquire;
  if (PyErr_CheckSignals() != 0) throw py::error_already_set();
}

inline std::chrono::milliseconds milliseconds(double seconds) {
  // A day is as good as for ever, and keeps every sum of times in range.
  constexpr double kLongest = 86400.0;
  DWDP_CHECK(seconds > 0.0, "a timeout is positive, not ", seconds, " s");
  return std::chrono::ceil<std::chrono::milliseconds>(
      std::chrono::duration<double>(std::min(seconds, kLongest)));
}

// Whoever consumes the capsule renames it and calls the deleter himself.
inline py::capsule dlpack_capsule(dlpack::DLManagedTensor* tensor) {
  return py::capsule(tensor, dlpack::kCapsuleName, [](PyObject* capsule) {
    if (!PyCapsule_IsValid(capsule, dlpack::kCapsuleName)) return;
    auto* const unused =
        static_cast<dlpack::DLManagedTensor*>(PyCapsule_GetPointer(capsule, dlpack::kCapsuleName));
    unused->deleter(unused);
  });
}

// (dst, src, num_bytes)
using CopyTuple = std::tuple<std::uintptr_t, std::uintptr_t, std::size_t>;

inline std::vector<std::vector<Copy>> to_slices(const std::vector<std::vector<CopyTuple>>& lists) {
  std::vector<std::vector<Copy>> slices(lists.size());
  for (std::size_t i = 0; i < lists.size(); ++i) {
    slices[i].reserve(lists[i].size());
    for (const auto& [dst, src, num_bytes] : lists[i]) {
      slices[i].push_back(
          {reinterpret_cast<void*>(dst), reinterpret_cast<const void*>(src), num_bytes});
    }
  }
  return slices;
}

template <typename AddressRange>
std::vector<std::shared_ptr<const void>> keep_mapped(
    const std::vector<const AddressRange*>& ranges) {
  std::vector<std::shared_ptr<const void>> kept;
  kept.reserve(ranges.size());
  for (const AddressRange* const range : ranges) {
    DWDP_CHECK(range != nullptr, "a fetch cannot keep mapped what is None");
    kept.push_back(range->keep_mapped());
  }
  return kept;
}

}  // namespace dwdp::bindings
