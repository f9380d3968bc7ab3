// The one error type of the native core, and the checks that throw it.
#pragma once

#include <cerrno>
#include <sstream>
#include <stdexcept>
#include <string>

namespace dwdp {

template <typename... Parts>
std::string concat(const Parts&... parts) {
  std::ostringstream stream;
  (stream << ... << parts);
  return stream.str();
}

// A memory, mapping, descriptor or copy operation failed. Python sees dwdp.fabric.base.FabricError.
class FabricError : public std::runtime_error {
 public:
  explicit FabricError(const std::string& message);

  // `call` failed with `error_number`; `detail` says what was being done, with sizes.
  FabricError(const std::string& call, int error_number, const std::string& detail);

  // What a device's driver says of a failed call: its error's name, number and text.
  struct DriverAnswer {
    std::string name;
    int number;
    std::string text;
  };

  // `call` of a device's driver failed; `detail` as above.
  FabricError(const std::string& call, const DriverAnswer& answer, const std::string& detail);

  // The system's or driver's; 0 when no call of either is behind the error.
  int error_number() const noexcept { return error_number_; }

 private:
  int error_number_ = 0;
};

}  // namespace dwdp

// Throws FabricError with the remaining arguments as its text. They are evaluated on failure only.
#define DWDP_CHECK(condition, ...)                            \
  do {                                                        \
    if (!(condition)) {                                       \
      throw ::dwdp::FabricError(::dwdp::concat(__VA_ARGS__)); \
    }                                                         \
  } while (false)

// The same after a system call named `call`, adding what errno says.
#define DWDP_CHECK_ERRNO(condition, call, ...)                                           \
  do {                                                                                   \
    if (!(condition)) {                                                                  \
      const int dwdp_error_number = errno;                                               \
      throw ::dwdp::FabricError((call), dwdp_error_number, ::dwdp::concat(__VA_ARGS__)); \
    }                                                                                    \
  } while (false)
