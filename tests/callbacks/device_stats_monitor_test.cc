#include "callbacks/device_stats_monitor.h"

#include <catch2/catch.hpp>

#include "lightning/trainer.h"
#include "tests/support/boring.h"
#include "tests/support/memory_logger.h"
#include "tests/support/temp_dir.h"

using namespace lightning;
using namespace lightning::testing;
using Catch::Contains;

namespace {

std::shared_ptr<MemoryLogger> logged(const DeviceStatsMonitorOptions& options) {
  const TempDir dir;
  auto logger = std::make_shared<MemoryLogger>();
  Trainer trainer(quiet(dir)
                      .logger(logger)
                      .callbacks({std::make_shared<DeviceStatsMonitor>(options)})
                      .max_epochs(1)
                      .log_every_n_steps(2));
  trainer.fit(std::make_shared<BoringModule>());
  return logger;
}

}  // namespace

TEST_CASE("device statistics are logged around the batches that log", "[callbacks]") {
  const auto logger = logged(DeviceStatsMonitorOptions());
  for (const std::string stat : {"cpu_percent", "cpu_vm_percent", "cpu_swap_percent"}) {
    for (const std::string hook : {"on_train_batch_start", "on_train_batch_end"}) {
      CAPTURE(hook, stat);
      const auto rows = logger->of("DeviceStatsMonitor." + hook + "/" + stat);
      REQUIRE(rows.size() == 2);  // batches 1 and 3 of 4
      CHECK(rows[0].first == 1);
      CHECK(rows[1].first == 3);
      CHECK((rows[0].second >= 0 && rows[0].second <= 100));
    }
  }
  // One of two validation batches, in sanity checking and in fit.
  CHECK(logger->of("DeviceStatsMonitor.on_validation_batch_end/cpu_vm_percent").size() == 2);
}

TEST_CASE("device statistics of a CPU can be turned off", "[callbacks]") {
  const auto logger = logged(DeviceStatsMonitorOptions().cpu_stats(false));
  CHECK(logger->of("DeviceStatsMonitor.on_train_batch_start/cpu_percent").empty());
}

TEST_CASE("device statistics want a logger", "[callbacks]") {
  const TempDir dir;
  Trainer trainer(quiet(dir).callbacks({std::make_shared<DeviceStatsMonitor>()}).max_epochs(1));
  CHECK_THROWS_WITH(trainer.fit(std::make_shared<BoringModule>()), Contains("without a logger"));
}
