#include <sys/resource.h>

#include <chrono>
#include <cstdio>
#include <exception>

#include "check.hpp"

// Runs all tests, or those whose names contain the first argument. Status 1: one failed.
int main(int argc, char** argv) {
  rlimit descriptors{};  // some tests open more files than the usual limit of 1024
  getrlimit(RLIMIT_NOFILE, &descriptors);
  descriptors.rlim_cur = descriptors.rlim_max;
  setrlimit(RLIMIT_NOFILE, &descriptors);
  const std::string wanted = argc > 1 ? argv[1] : "";
  int num_run = 0;
  int num_failed = 0;
  for (const dwdp::test::Test& test : dwdp::test::tests()) {
    if (test.name.find(wanted) == std::string::npos) continue;
    ++num_run;
    const auto start = std::chrono::steady_clock::now();
    std::string failure;
    try {
      test.body();
    } catch (const std::exception& error) {
      failure = error.what();
      ++num_failed;
    }
    const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - start;
    std::printf("%-6s %6.2f s  %s\n", failure.empty() ? "ok" : "FAILED", taken.count(),
                test.name.c_str());
    if (!failure.empty()) std::printf("       %s\n", failure.c_str());
    std::fflush(stdout);
  }
  std::printf("%d tests, %d failed\n", num_run, num_failed);
  return num_failed > 0 || num_run == 0 ? 1 : 0;
}
