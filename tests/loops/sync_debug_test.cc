// The Trainer's sync_debug_mode: what waits for the GPU in a training step.
#include <torch/cuda.h>
#include <torch/torch.h>

#include <catch2/catch.hpp>

#include "lightning/errors.h"
#include "lightning/log.h"
#include "lightning/optim/schedulers.h"
#include "lightning/trainer.h"
#include "tests/support/boring.h"
#include "tests/support/memory_logger.h"

namespace lightning::testing {
namespace {

using Catch::Matchers::Contains;

bool stands_aside() {
  if (torch::cuda::is_available()) return false;
  WARN("needs a GPU");
  return true;
}

TrainerOptions on_gpu(const TempDir& dir) {
  return quiet(dir).accelerator("cuda").devices(int64_t{1}).max_epochs(2).sync_debug_mode("error");
}

// Logs in each way a step can; waits for the device where told.
struct Busy : BoringModule {
  StepOutput training_step(const Batch& batch, int64_t) override {
    const auto value = loss(batch);
    log("both", value, LogOptions().on_step(true).on_epoch(true).prog_bar(true));
    log("most", value, LogOptions().on_step(false).on_epoch(true).reduce_fx(std::string("max")));
    log("number", 2.0, LogOptions().on_epoch(true));
    if (waits) value.item<float>();
    if (automatic_optimization()) return value;
    optimizer().zero_grad();
    manual_backward(value);
    optimizer().step();
    return value;
  }
  Optimizers configure_optimizers() override {
    const auto adamw = std::make_shared<torch::optim::AdamW>(parameters(), 0.01);
    const auto schedule = std::make_shared<StepLR>(adamw, StepLROptions().step_size(2).gamma(0.5));
    return {adamw, LRSchedulerConfig(schedule).set_interval("step")};
  }
  bool waits = false;
};

}  // namespace

TEST_CASE("sync_debug_mode knows three words", "[loops]") {
  const TempDir dir;
  CHECK_THROWS_WITH(Trainer(quiet(dir).sync_debug_mode("eror")),
                    Contains("sync_debug_mode=\"eror\"") && Contains("Did you mean \"error\"?"));
}

TEST_CASE("on a CPU nothing waits, and sync_debug_mode says that it has no effect", "[loops]") {
  const TempDir dir;
  std::string lines;
  set_log_sink([&](const std::string& line) { lines += line + "\n"; });
  Trainer quietly(quiet(dir).max_epochs(1).sync_debug_mode("default"));
  quietly.fit(std::make_shared<BoringModule>());
  CHECK_THAT(lines, !Contains("sync_debug_mode"));
  Trainer trainer(quiet(dir).max_epochs(1).sync_debug_mode("error"));
  const auto module = std::make_shared<Busy>();
  module->waits = true;
  trainer.fit(module);
  set_log_sink(nullptr);
  CHECK_THAT(lines,
             Contains("sync_debug_mode=\"error\" has no effect with the accelerator \"cpu\""));
}

TEST_CASE("a step that waits for the GPU fails under sync_debug_mode error", "[loops][gpu]") {
  if (stands_aside()) return;
  for (const bool automatic : {true, false}) {
    const TempDir dir;
    Trainer trainer(on_gpu(dir));
    const auto module = std::make_shared<Busy>();
    module->waits = true;
    module->set_automatic_optimization(automatic);
    CHECK_THROWS_WITH(trainer.fit(module), Contains("synchroniz"));
    CHECK(torch::ones(1, at::kCUDA).item<float>() == 1);  // allowed again
  }
}

TEST_CASE("a training step of the framework waits for nothing", "[loops][gpu]") {
  if (stands_aside()) return;
  for (const char* precision : {"32-true", "bf16-mixed", "16-mixed", "bf16-true"}) {
    for (const char* algorithm : {"norm", "value"}) {
      for (const int64_t windows : {1, 2}) {
        INFO(precision << ", clipped by " << algorithm << ", " << windows << " batches a step");
        const TempDir dir;
        const auto logger = std::make_shared<MemoryLogger>();
        Trainer trainer(on_gpu(dir)
                            .precision(precision)
                            .logger(logger)
                            .log_every_n_steps(1)
                            .gradient_clip_val(0.5)
                            .gradient_clip_algorithm(algorithm)
                            .accumulate_grad_batches(windows));
        CHECK_NOTHROW(trainer.fit(std::make_shared<Busy>()));
      }
    }
  }
  const TempDir dir;
  Trainer trainer(on_gpu(dir).precision("16-mixed"));
  const auto by_hand = std::make_shared<Busy>();
  by_hand->set_automatic_optimization(false);
  CHECK_NOTHROW(trainer.fit(by_hand));
}

}  // namespace lightning::testing
