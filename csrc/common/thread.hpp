#pragma once

#include <functional>
#include <string>
#include <thread>

namespace dwdp {

// Starts a thread named `name` (at most 15 characters are kept) that takes no signals, so that they
// reach the interpreter's main thread. Faults of the thread itself are still reported.
// Throws FabricError when the system has no thread to give.
std::thread start_thread(const std::string& name, std::function<void()> body);

}  // namespace dwdp
