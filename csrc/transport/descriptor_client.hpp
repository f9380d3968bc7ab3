#pragma once

#include <chrono>
#include <cstddef>
#include <functional>
#include <string>
#include <vector>

#include "common/unique_fd.hpp"
#include "transport/descriptor_protocol.hpp"

namespace dwdp::transport {

// Descriptors of the regions that the server at `address` published under `name`. Which memory they
// lead to is for the fabric to check that imports them.
//
// Calls `on_interrupt` when a signal handler interrupted it, and passes on what that throws.
// Throws FabricError when there is no whole answer within `timeout`, the server belongs to another
// user or refuses, or the sizes are not `sizes`.
std::vector<UniqueFd> fetch_descriptors(const std::string& address, const Token& token,
                                        const std::string& name,
                                        const std::vector<std::size_t>& sizes,
                                        std::chrono::milliseconds timeout,
                                        const std::function<void()>& on_interrupt);

// Names one of them in errors: "fetching the regions of 'layer/0' from @dwdp-...: region 3".
std::string origin(const std::string& address, const std::string& name, std::size_t index);

}  // namespace dwdp::transport
