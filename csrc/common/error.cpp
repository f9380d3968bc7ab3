#include "common/error.hpp"

#include <system_error>

namespace dwdp {
namespace {

std::string describe(const std::string& call, int error_number, const std::string& detail) {
  std::string text = concat(call, " failed: ", std::generic_category().message(error_number),
                            " (errno ", error_number, "): ", detail);
  if (error_number == EMFILE) {
    text += "; raise this process's limit of open files (ulimit -n)";
  }
  return text;
}

}  // namespace

FabricError::FabricError(const std::string& message) : std::runtime_error(message) {}

FabricError::FabricError(const std::string& call, int error_number, const std::string& detail)
    : std::runtime_error(describe(call, error_number, detail)), error_number_(error_number) {}

FabricError::FabricError(const std::string& call, const DriverAnswer& answer,
                         const std::string& detail)
    : std::runtime_error(concat(call, " failed: ", answer.name, " (", answer.number, "), ",
                                answer.text, ": ", detail)),
      error_number_(answer.number) {}

}  // namespace dwdp
