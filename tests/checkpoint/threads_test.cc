#include "lightning/checkpoint/threads.h"

#include <algorithm>
#include <atomic>
#include <catch2/catch.hpp>
#include <stdexcept>

using namespace lightning;

TEST_CASE("the work runs once on each thread, the calling one among them", "[checkpoint]") {
  for (const int threads : {0, 1, 2, 4}) {
    std::atomic<int> runs{0};
    on_threads(threads, [&runs] { ++runs; });
    CHECK(runs == std::max(threads, 1));
  }
}

TEST_CASE("an error on any thread reaches the caller when all threads are done", "[checkpoint]") {
  std::atomic<int> runs{0};
  CHECK_THROWS_WITH(on_threads(3,
                               [&runs] {
                                 if (++runs == 2) throw std::runtime_error("the second");
                               }),
                    "the second");
  CHECK(runs == 3);
}

TEST_CASE("little work takes one thread, and no work more than four", "[checkpoint]") {
  CHECK(useful_threads(0) == 1);
  CHECK(useful_threads(1 << 20) == 1);
  CHECK(useful_threads(uint64_t{1} << 40) <= 4);
}
