// What is alive, for tests that look for leaks.
#include "control.hpp"
#include "device.hpp"
#include "graph.hpp"
#include "kernel.hpp"
#include "memory.hpp"
#include "stream.hpp"

std::int64_t standin_live(const char* kind) {
  const std::string name(kind);
  if (name == "streams") return static_cast<std::int64_t>(standin::streams().size());
  if (name == "events") return static_cast<std::int64_t>(standin::events().size());
  if (name == "modules") return standin::live_modules();
  for (const auto count : {standin::live_memory, standin::live_graphs, standin::live_contexts}) {
    if (const std::int64_t found = count(kind); found >= 0) return found;
  }
  return -1;
}
