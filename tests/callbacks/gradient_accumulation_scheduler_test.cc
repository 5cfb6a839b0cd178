#include "callbacks/gradient_accumulation_scheduler.h"

#include <catch2/catch.hpp>
#include <nlohmann/json.hpp>

#include "lightning/registry.h"
#include "lightning/trainer.h"
#include "tests/support/boring.h"
#include "tests/support/temp_dir.h"

using namespace lightning;
using namespace lightning::testing;
using Catch::Contains;

TEST_CASE("accumulation follows its schedule from epoch to epoch", "[callbacks]") {
  const TempDir dir;
  auto scheduler =
      std::make_shared<GradientAccumulationScheduler>(AccumulationSchedule{{1, 2}, {3, 4}});
  Trainer trainer(quiet(dir).max_epochs(4).callbacks({scheduler}));

  trainer.fit(std::make_shared<BoringModule>());  // 4 batches in an epoch

  CHECK(trainer.global_step() == 4 + 2 + 2 + 1);
  CHECK(trainer.accumulate_grad_batches() == 1);  // as it was, for the next fit
}

TEST_CASE("an accumulation schedule holds from its epoch on", "[callbacks]") {
  const GradientAccumulationScheduler scheduler(AccumulationSchedule{{2, 3}, {5, 1}});
  std::vector<int64_t> factors;
  for (int64_t epoch = 0; epoch < 7; ++epoch) {
    factors.push_back(scheduler.get_accumulate_grad_batches(epoch));
  }
  CHECK(factors == std::vector<int64_t>{1, 1, 3, 3, 3, 1, 1});
  CHECK(scheduler.going_to_accumulate_grad_batches());
}

TEST_CASE("an accumulation schedule that makes no sense is refused", "[callbacks]") {
  using Schedule = AccumulationSchedule;
  CHECK_THROWS_WITH(GradientAccumulationScheduler(Schedule{}), Contains("empty schedule"));
  CHECK_THROWS_WITH(GradientAccumulationScheduler(Schedule{{-1, 2}}), Contains("the epoch -1"));
  CHECK_THROWS_WITH(GradientAccumulationScheduler(Schedule{{1, 0}}),
                    Contains("the factor 0 for epoch 1"));
  const auto make = [](const Json& scheduling) {
    return registry<Callback>().make("GradientAccumulationScheduler",
                                     Json{{"scheduling", scheduling}});
  };
  CHECK_NOTHROW(make(Json{{"4", 2}}));
  CHECK_THROWS_WITH(make(Json{{"four", 2}}), Contains("the epoch \"four\""));
}

TEST_CASE("an accumulation schedule refuses what it does not go with", "[callbacks]") {
  const TempDir dir;
  const auto scheduler =
      std::make_shared<GradientAccumulationScheduler>(AccumulationSchedule{{0, 2}});
  Trainer doubled(quiet(dir).max_epochs(1).accumulate_grad_batches(2).callbacks({scheduler}));
  CHECK_THROWS_WITH(doubled.fit(std::make_shared<BoringModule>()),
                    Contains("accumulate_grad_batches 2 beside"));
  auto manual = std::make_shared<BoringModule>();
  manual->set_automatic_optimization(false);
  CHECK_THROWS_WITH(Trainer(quiet(dir).max_epochs(1).callbacks({scheduler})).fit(manual),
                    Contains("manual optimization"));
}
