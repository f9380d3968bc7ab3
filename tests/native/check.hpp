// Checks that stay when NDEBUG is set, and a list of tests that main.cpp runs.
#pragma once

#include <chrono>
#include <functional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

namespace dwdp::test {

struct Failure : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Test {
  std::string name;
  std::function<void()> body;
};

inline std::vector<Test>& tests() {
  static std::vector<Test> all;
  return all;
}

struct Registration {
  Registration(const char* name, std::function<void()> body) {
    tests().push_back({name, std::move(body)});
  }
};

[[noreturn]] inline void fail(const char* file, int line, const std::string& text) {
  std::ostringstream message;
  message << file << ":" << line << ": " << text;
  throw Failure(message.str());
}

// Whether `condition` becomes true within a few seconds.
inline bool eventually(const std::function<bool()>& condition) {
  for (int i = 0; i < 500; ++i) {
    if (condition()) return true;
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
  }
  return condition();
}

}  // namespace dwdp::test

#define TEST(name)                                                        \
  static void name();                                                     \
  static const ::dwdp::test::Registration name##_registered(#name, name); \
  static void name()

#define CHECK(condition)                                                              \
  do {                                                                                \
    if (!(condition)) ::dwdp::test::fail(__FILE__, __LINE__, #condition " is false"); \
  } while (false)

#define CHECK_EQUAL(actual, expected)                                             \
  do {                                                                            \
    const auto& check_actual = (actual);                                          \
    const auto& check_expected = (expected);                                      \
    if (!(check_actual == check_expected)) {                                      \
      std::ostringstream check_text;                                              \
      check_text << #actual " is " << check_actual << ", not " << check_expected; \
      ::dwdp::test::fail(__FILE__, __LINE__, check_text.str());                   \
    }                                                                             \
  } while (false)

// `statement` throws FabricError with `part` in its text.
#define CHECK_ERROR(statement, part)                                                     \
  do {                                                                                   \
    std::string check_text;                                                              \
    try {                                                                                \
      statement;                                                                         \
    } catch (const ::dwdp::FabricError& check_error) {                                   \
      check_text = check_error.what();                                                   \
    }                                                                                    \
    if (check_text.find(part) == std::string::npos) {                                    \
      ::dwdp::test::fail(__FILE__, __LINE__,                                             \
                         #statement " threw '" + check_text + "', expected '" part "'"); \
    }                                                                                    \
  } while (false)
