// What an address range is composed of.
#include <random>
#include <string>
#include <vector>

#include "check.hpp"
#include "common/composition.hpp"
#include "common/error.hpp"

namespace dwdp {
namespace {

TEST(composition_runs_are_what_touches) {
  std::mt19937 random(5);
  for (int round = 0; round < 200; ++round) {
    constexpr std::size_t kPages = 24;
    Composition composition(kPages * 8, 8);
    std::vector<bool> mapped(kPages + 1, false);
    for (int i = 0; i < 12; ++i) {
      const std::size_t page = random() % kPages;
      const std::size_t count = 1 + random() % 3;
      bool free = page + count <= kPages;
      for (std::size_t j = page; free && j < page + count; ++j) free = !mapped[j];
      if (!free) {
        if (page + count > kPages) {
          CHECK_ERROR(composition.check(page * 8, count * 8), "does not fit");
        } else {
          CHECK_ERROR(composition.check(page * 8, count * 8), "overlaps");
        }
        continue;
      }
      composition.check(page * 8, count * 8);
      composition.add({page * 8, count * 8, false});
      for (std::size_t j = page; j < page + count; ++j) mapped[j] = true;
    }
    std::vector<bool> in_runs(kPages + 1, false);
    std::size_t last_end = 0;
    for (const auto& [offset, num_bytes] : composition.runs(true)) {
      CHECK(offset == 0 || offset > last_end);
      for (std::size_t j = offset / 8; j < (offset + num_bytes) / 8; ++j) in_runs[j] = true;
      last_end = offset + num_bytes;
    }
    CHECK(in_runs == mapped);
  }
}

TEST(composition_keeps_imported_pieces_read_only) {
  Composition composition(64, 8);
  CHECK(composition.runs(true).empty());
  composition.check(8, 8);
  composition.add({8, 8, true});
  composition.check(16, 8);
  composition.add({16, 8, false});
  CHECK_ERROR(composition.runs(true), "offset 8 was received from a peer");
  CHECK_EQUAL(composition.runs(false).size(), std::size_t{1});
}

}  // namespace
}  // namespace dwdp
