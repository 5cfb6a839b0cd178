#include "benchmarks/kernel_trace.h"

#include <catch2/catch.hpp>

using namespace benchmark;

TEST_CASE("of the time of collectives, what another kernel runs beside is hidden", "[benchmarks]") {
  const auto overlap = overlap_of({{"gemm", 0, 4'000'000},
                                   {"ncclDevKernel_AllGather_RING_LL", 3'000'000, 7'000'000},
                                   {"gelu", 5'000'000, 5'500'000},
                                   {"add", 5'250'000, 6'000'000},  // beside the one before
                                   {"ncclDevKernel_ReduceScatter", 20'000'000, 21'000'000},
                                   {"adam", 21'000'000, 30'000'000}});  // begins where it ends
  REQUIRE(overlap.has_value());
  CHECK(overlap->collectives_ms == Approx(5));
  CHECK(overlap->hidden_ms == Approx(2));
  CHECK(overlap->share() == Approx(0.4));
  CHECK(overlap->span_ms == Approx(30));
  CHECK(overlap->idle_ms == Approx(13));
}

TEST_CASE("collectives that run beside each other hide nothing and count once", "[benchmarks]") {
  const auto overlap = overlap_of({{"ncclDevKernel_AllGather", 0, 2'000'000},
                                   {"ncclDevKernel_ReduceScatter", 1'000'000, 3'000'000}});
  REQUIRE(overlap.has_value());
  CHECK(overlap->collectives_ms == Approx(3));
  CHECK(overlap->share() == 0);
}

TEST_CASE("where no collective ran the rest is told", "[benchmarks]") {
  const auto overlap = overlap_of({{"gemm", 0, 4'000'000}, {"gelu", 5'000'000, 6'000'000}});
  REQUIRE(overlap.has_value());
  CHECK(overlap->collectives_ms == 0);
  CHECK(overlap->idle_ms == Approx(1));
  CHECK_FALSE(overlap_of({}).has_value());
}
