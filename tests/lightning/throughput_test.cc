#include "lightning/throughput.h"

#include <catch2/catch.hpp>
#include <nlohmann/json.hpp>

#include "lightning/errors.h"
#include "tests/support/python.h"

using namespace lightning;
using Catch::Contains;

namespace {

ThroughputOptions window(int64_t size) { return ThroughputOptions().window_size(size); }

}  // namespace

TEST_CASE("throughput has the keys and values of the original", "[throughput]") {
  const std::string printed = testing::run_python(R"(
import json
from lightning.fabric.utilities.throughput import Throughput
rows = []
for world, flops, lengths in ((1, 0, False), (1, 1e6, True), (4, 1e6, True)):
    t = Throughput(available_flops=flops or None, world_size=world, window_size=3, separator="|")
    for i in range(1, 6):
        t.update(time=0.5 * i * i, batches=i, samples=4 * i, lengths=40 * i if lengths else None,
                 flops=1000 * i if flops else None)
        rows.append(dict(sorted(t.compute().items())))
print(json.dumps(rows))
)");
  Json ours = Json::array();
  struct Case {
    int64_t world;
    double flops;
    bool lengths;
  };
  for (const Case& c : {Case{1, 0, false}, Case{1, 1e6, true}, Case{4, 1e6, true}}) {
    Throughput throughput(window(3).separator("|"), c.flops, c.world);
    for (int64_t i = 1; i < 6; ++i) {
      Throughput::Update update{};
      update.time = 0.5 * static_cast<double>(i * i);
      update.batches = i;
      update.samples = 4 * i;
      if (c.lengths) update.lengths = 40 * i;
      if (c.flops > 0) update.flops = 1000 * i;
      throughput.update(update);
      std::map<std::string, double> row;
      for (const auto& [key, value] : throughput.compute()) row[key] = value;
      ours.push_back(row);
    }
  }
  const Json theirs = Json::parse(printed);
  REQUIRE(ours.size() == theirs.size());
  for (size_t i = 0; i < theirs.size(); ++i) {
    CAPTURE(i, theirs[i].dump(), ours[i].dump());
    REQUIRE(ours[i].size() == theirs[i].size());
    for (const auto& [key, value] : theirs[i].items()) {
      CHECK(ours[i].at(key).get<double>() == Approx(value.get<double>()));
    }
  }
}

TEST_CASE("throughput refuses totals that do not grow or do not fit", "[throughput]") {
  Throughput throughput(window(2));
  CHECK(throughput.compute().empty());
  throughput.update({1.0, 1, 2});
  CHECK_THROWS_WITH(throughput.update({1.0, 2, 4}), Contains("time 1 after 1"));
  CHECK_THROWS_WITH(throughput.update({2.0, 5, 4}), Contains("4 samples in 5 batches"));
  CHECK_THROWS_WITH(throughput.update({2.0, 2, 4, 3}), Contains("3 items in 4 samples"));
  CHECK_THROWS_WITH(throughput.update({2.0, 2, 4, 8}), Contains("lengths at 0 of 1 updates"));
  CHECK_THROWS_WITH(Throughput(window(1)), Contains("got window_size 1"));
  throughput.reset();
  CHECK_NOTHROW(throughput.update({0.5, 1, 1, 1}));
}

TEST_CASE("peak speeds are found by the device's name, dense", "[throughput]") {
  CHECK(available_flops("NVIDIA H200", c10::kBFloat16, false) == 989.4e12);
  CHECK(available_flops("NVIDIA H100 PCIe", c10::kHalf, false) == 756e12);
  CHECK(available_flops("NVIDIA A100-SXM4-80GB", c10::kFloat, false) == 19.5e12);
  CHECK(available_flops("NVIDIA A100-SXM4-80GB", c10::kFloat, true) == 156e12);
  CHECK(available_flops("NVIDIA L40S", c10::kHalf, false) == 362e12);
  CHECK(available_flops("Tesla T4", c10::kBFloat16, false) == std::nullopt);
  CHECK(available_flops("a toaster", c10::kFloat, false) == std::nullopt);
}
