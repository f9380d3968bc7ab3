// Counting calls, failing them on demand, and settings.
#include <sys/types.h>
#include <unistd.h>

#include <cctype>
#include <cstdlib>
#include <set>

#include "control.hpp"
#include "core.hpp"

namespace standin {
namespace {

struct Ledger {
  std::mutex mutex;
  std::map<std::string, std::int64_t> calls;
  std::map<std::string, std::int64_t> misuses;
  std::map<std::string, std::string> settings;
  std::string fault_name;
  std::int64_t fault_countdown = 0;
  CUresult fault_code = CUDA_SUCCESS;
  std::string raised;
};

// Here and elsewhere, state is never destroyed: streams may still run while the process exits.
Ledger& ledger() {
  static Ledger& instance = *new Ledger;
  return instance;
}

std::atomic<pid_t> initialized_in{0};

// Calls that give something back or restore it, and questions about names: "*" leaves them alone.
bool excluded_from_any(const std::string& name) {
  static const std::set<std::string>& names =
      *new std::set<std::string>{"cuCtxPopCurrent",  "cuDevicePrimaryCtxRelease",
                                 "cuEventDestroy",   "cuGetErrorName",
                                 "cuGetErrorString", "cuGetProcAddress",
                                 "cuGraphDestroy",   "cuGraphExecDestroy",
                                 "cuLibraryUnload",  "cuMemAddressFree",
                                 "cuMemFree",        "cuMemFreeHost",
                                 "cuMemRelease",     "cuMemUnmap",
                                 "cuModuleUnload",   "cuThreadExchangeStreamCaptureMode",
                                 "cuStreamDestroy"};
  return names.count(name) != 0;
}

// cuMemAlloc_v2 -> cuMemAlloc
std::string base_name(const char* function) {
  std::string name(function);
  const std::size_t mark = name.rfind("_v");
  if (mark != std::string::npos && mark + 2 < name.size() &&
      std::isdigit(static_cast<unsigned char>(name[mark + 2])) != 0) {
    name.resize(mark);
  }
  return name;
}

CUresult count(const std::string& name) {
  Ledger& state = ledger();
  const std::lock_guard<std::mutex> lock(state.mutex);
  ++state.calls[name];
  const bool counts_as_any = !excluded_from_any(name);
  if (counts_as_any) ++state.calls["*"];
  if (state.fault_countdown == 0) return CUDA_SUCCESS;
  if (state.fault_name != name && !(state.fault_name == "*" && counts_as_any)) return CUDA_SUCCESS;
  if (--state.fault_countdown > 0) return CUDA_SUCCESS;
  state.raised = name;
  return state.fault_code;
}

}  // namespace

std::mutex& api_mutex() {
  static std::mutex& instance = *new std::mutex;
  return instance;
}

std::uint64_t new_handle() {
  static std::atomic<std::uint64_t> next{0x1000};
  return next.fetch_add(0x10);
}

bool& in_host_function() {
  thread_local bool inside = false;
  return inside;
}

bool mark_initialized() {
  pid_t nobody = 0;
  return initialized_in.compare_exchange_strong(nobody, getpid()) || nobody == getpid();
}

int driver_version() { return static_cast<int>(setting("STANDIN_DRIVER_VERSION", CUDA_VERSION)); }

CUresult enter_uninitialized(const char* function) { return count(base_name(function)); }

CUresult enter(const char* function) {
  if (initialized_in.load() != getpid()) return CUDA_ERROR_NOT_INITIALIZED;
  if (in_host_function()) return CUDA_ERROR_NOT_PERMITTED;
  return count(base_name(function));
}

void count_misuse(const char* what) {
  Ledger& state = ledger();
  const std::lock_guard<std::mutex> lock(state.mutex);
  ++state.misuses[what];
}

std::string text_setting(const char* name) {
  Ledger& state = ledger();
  const std::lock_guard<std::mutex> lock(state.mutex);
  const auto found = state.settings.find(name);
  if (found != state.settings.end()) return found->second;
  const char* const value = std::getenv(name);
  return value == nullptr ? "" : value;
}

std::int64_t setting(const char* name, std::int64_t fallback) {
  const std::string text = text_setting(name);
  return text.empty() ? fallback : std::strtoll(text.c_str(), nullptr, 10);
}

}  // namespace standin

void standin_fail(const char* name, std::int64_t nth, int code) {
  standin::Ledger& state = standin::ledger();
  const std::lock_guard<std::mutex> lock(state.mutex);
  state.fault_name = name;
  state.fault_countdown = nth;
  state.fault_code = static_cast<CUresult>(code);
  state.raised.clear();
}

const char* standin_fault_raised() {
  thread_local std::string copy;
  standin::Ledger& state = standin::ledger();
  const std::lock_guard<std::mutex> lock(state.mutex);
  copy = state.raised;
  return copy.c_str();
}

std::int64_t standin_calls(const char* name) {
  standin::Ledger& state = standin::ledger();
  const std::lock_guard<std::mutex> lock(state.mutex);
  return state.calls[name];
}

std::int64_t standin_misuses(const char* what) {
  standin::Ledger& state = standin::ledger();
  const std::lock_guard<std::mutex> lock(state.mutex);
  return state.misuses[what];
}

void standin_set(const char* name, const char* value) {
  standin::Ledger& state = standin::ledger();
  const std::lock_guard<std::mutex> lock(state.mutex);
  state.settings[name] = value;
}
