#include "callbacks/throughput_monitor.h"

#include <catch2/catch.hpp>

#include "lightning/errors.h"
#include "lightning/trainer.h"
#include "tests/support/boring.h"
#include "tests/support/memory_logger.h"
#include "tests/support/temp_dir.h"

using namespace lightning;
using namespace lightning::testing;
using Catch::Contains;

namespace {

using Points = std::vector<std::pair<int64_t, double>>;

// A second for each training step, ten for each validation batch.
struct Module : BoringModule {
  StepOutput training_step(const Batch& batch, int64_t batch_idx) override {
    now += 1;
    return BoringModule::training_step(batch, batch_idx);
  }
  StepOutput validation_step(const Batch& batch, int64_t batch_idx) override {
    now += 10;
    return BoringModule::validation_step(batch, batch_idx);
  }
  double now = 50;
};

}  // namespace

TEST_CASE("throughput of training leaves validation's time out", "[callbacks]") {
  const TempDir dir;
  auto module = std::make_shared<Module>();
  module->flops_per_batch = 1000;
  auto logger = std::make_shared<MemoryLogger>();
  auto monitor = std::make_shared<ThroughputMonitor>(
      ThroughputMonitorOptions().window_size(3), nullptr,
      [](const Batch& batch) { return batch.tensor().numel(); });
  monitor->set_clock([&] { return module->now; });
  Trainer trainer(
      quiet(dir).logger(logger).callbacks({monitor}).max_epochs(2).log_every_n_steps(2));
  trainer.fit(module);

  CHECK(logger->of("train/time") == Points{{1, 2}, {3, 4}, {5, 6}, {7, 8}});
  CHECK(logger->of("train/batches") == Points{{1, 2}, {3, 4}, {5, 6}, {7, 8}});
  CHECK(logger->of("train/samples") == Points{{1, 4}, {3, 8}, {5, 12}, {7, 16}});
  CHECK(logger->of("train/lengths") == Points{{1, 128}, {3, 256}, {5, 384}, {7, 512}});
  // Rates once three batches were seen.
  CHECK(logger->of("train/device/batches_per_sec") == Points{{3, 1}, {5, 1}, {7, 1}});
  CHECK(logger->of("train/device/samples_per_sec") == Points{{3, 2}, {5, 2}, {7, 2}});
  CHECK(logger->of("train/device/items_per_sec") == Points{{3, 64}, {5, 64}, {7, 64}});
  CHECK(logger->of("train/device/flops_per_sec") == Points{{3, 1000}, {5, 1000}, {7, 1000}});
  // Validation counts its batches over the epochs, and its time anew.
  CHECK(logger->of("validate/time") == Points{{2, 20}, {4, 20}});
  for (const auto& [step, bytes] : logger->of("train/device/peak_memory_bytes")) {
    CAPTURE(step);
    CHECK(bytes > 1e6);
  }
  CHECK(logger->of("train/device/peak_memory_bytes").size() == 4);
}

TEST_CASE("throughput of training counts steps where gradients accumulate", "[callbacks]") {
  const TempDir dir;
  auto module = std::make_shared<Module>();
  auto logger = std::make_shared<MemoryLogger>();
  auto monitor = std::make_shared<ThroughputMonitor>(ThroughputMonitorOptions().window_size(2));
  monitor->set_clock([&] { return module->now; });
  Trainer trainer(quiet(dir)
                      .logger(logger)
                      .callbacks({monitor})
                      .max_epochs(1)
                      .accumulate_grad_batches(2)
                      .log_every_n_steps(1));
  trainer.fit(module);
  CHECK(logger->of("train/batches") == Points{{0, 2}, {1, 4}});
}

TEST_CASE("throughput of validate, test and predict goes under their names", "[callbacks]") {
  const TempDir dir;
  auto module = std::make_shared<Module>();
  auto logger = std::make_shared<MemoryLogger>();
  auto monitor = std::make_shared<ThroughputMonitor>();
  Trainer trainer(quiet(dir).logger(logger).callbacks({monitor}).log_every_n_steps(1));
  trainer.validate(module);
  trainer.test(module);
  trainer.predict(module);
  for (const std::string stage : {"validate", "test", "predict"}) {
    CAPTURE(stage);
    CHECK(logger->of(stage + "/samples") == Points{{1, 2}, {2, 4}});
  }
}

TEST_CASE("a throughput monitor refuses a window of one batch", "[callbacks]") {
  CHECK_THROWS_WITH(ThroughputMonitor(ThroughputMonitorOptions().window_size(1)),
                    Contains("ThroughputMonitor got window_size 1"));
}
