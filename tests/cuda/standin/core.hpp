// What every part of the stand-in driver uses: the bookkeeping of calls, settings and handles.
#pragma once

#include <cuda.h>

#include <atomic>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

namespace standin {

// Work of a stream or of a graph node. A failure is sticky: it breaks the context.
using Action = std::function<CUresult()>;

// Counts a call of the entry point `function` and returns the error it has to return at once: an
// injected fault, NOT_INITIALIZED before cuInit and in forked children, NOT_PERMITTED in a host
// function of a stream.
CUresult enter(const char* function);

// The same for the few that may be called before cuInit.
CUresult enter_uninitialized(const char* function);

// Counts something that a real driver might not survive, or that checkers report; see control.hpp.
void count_misuse(const char* what);

// False in a forked child of an initialized process, where the driver cannot be used.
bool mark_initialized();

// Entry points that are newer are not there. STANDIN_DRIVER_VERSION, or that of the headers.
int driver_version();

// True while this thread runs a host function of a stream, where driver calls are not allowed.
bool& in_host_function();

// An environment variable, or what standin_set put in its place.
std::int64_t setting(const char* name, std::int64_t fallback);
std::string text_setting(const char* name);

// Guards everything but the memory tables and what streams do in the background. Never held while
// waiting.
std::mutex& api_mutex();

// Never used twice in a process, so that a handle that was destroyed is recognised.
std::uint64_t new_handle();

template <typename Handle>
std::uint64_t handle_value(Handle handle) {
  if constexpr (std::is_pointer_v<Handle>) {
    return reinterpret_cast<std::uintptr_t>(handle);
  } else {
    return handle;
  }
}

// Live objects of one kind by their handles.
template <typename Handle, typename Object>
class Registry {
 public:
  Handle add(std::shared_ptr<Object> object) {
    const std::uint64_t value = new_handle();
    const std::lock_guard<std::mutex> lock(mutex_);
    objects_[value] = std::move(object);
    if constexpr (std::is_pointer_v<Handle>) {
      return reinterpret_cast<Handle>(static_cast<std::uintptr_t>(value));
    } else {
      return value;
    }
  }

  // Null when there is no such handle, or no longer.
  std::shared_ptr<Object> find(Handle handle) const {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = objects_.find(handle_value(handle));
    return found == objects_.end() ? nullptr : found->second;
  }

  std::shared_ptr<Object> remove(Handle handle) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = objects_.find(handle_value(handle));
    if (found == objects_.end()) return nullptr;
    std::shared_ptr<Object> object = std::move(found->second);
    objects_.erase(found);
    return object;
  }

  // Removes and counts all for which `condition(object)`.
  template <typename Condition>
  std::size_t remove_if(Condition condition) {
    const std::lock_guard<std::mutex> lock(mutex_);
    std::size_t count = 0;
    for (auto entry = objects_.begin(); entry != objects_.end();) {
      if (condition(*entry->second)) {
        entry = objects_.erase(entry);
        ++count;
      } else {
        ++entry;
      }
    }
    return count;
  }

  std::size_t size() const {
    const std::lock_guard<std::mutex> lock(mutex_);
    return objects_.size();
  }

 private:
  mutable std::mutex mutex_;
  std::map<std::uint64_t, std::shared_ptr<Object>> objects_;
};

}  // namespace standin

#define STANDIN_ENTER()                                                             \
  if (const CUresult fault_ = ::standin::enter(__func__); fault_ != CUDA_SUCCESS) { \
    return fault_;                                                                  \
  }

#define STANDIN_TRY(expression) \
  if (const CUresult result_ = (expression); result_ != CUDA_SUCCESS) return result_
