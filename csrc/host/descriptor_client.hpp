#pragma once

#include <chrono>
#include <cstddef>
#include <functional>
#include <string>
#include <vector>

#include "host/descriptor_protocol.hpp"
#include "host/region.hpp"

namespace dwdp::host {

// Regions that the server at `address` published under `name`, read-only when mapped.
//
// Calls `on_interrupt` when a signal handler interrupted it, and passes on what that throws.
// Throws FabricError when there is no whole answer within `timeout`, the server belongs to another
// user or refuses, or the sizes are not `sizes`.
std::vector<Region> fetch_regions(const std::string& address, const Token& token,
                                  const std::string& name, const std::vector<std::size_t>& sizes,
                                  std::chrono::milliseconds timeout,
                                  const std::function<void()>& on_interrupt);

}  // namespace dwdp::host
