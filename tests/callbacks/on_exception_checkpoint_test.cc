#include "callbacks/on_exception_checkpoint.h"

#include <catch2/catch.hpp>
#include <filesystem>

#include "lightning/errors.h"
#include "lightning/trainer.h"
#include "tests/support/boring.h"
#include "tests/support/temp_dir.h"

using namespace lightning;
using namespace lightning::testing;
using Catch::Contains;

TEST_CASE("a run that failed goes on where it stood", "[callbacks]") {
  const TempDir dir;
  const auto trainer_options = [&] {
    return quiet(dir)
        .enable_checkpointing(true)
        .callbacks({std::make_shared<OnExceptionCheckpoint>(
            OnExceptionCheckpointOptions(dir.path()).filename("rescue"))})
        .max_epochs(3);
  };
  auto failing = std::make_shared<BoringModule>();
  failing->before_training_step = [](BoringModule& module, int64_t) {
    if (module.global_step() == 6) throw std::runtime_error("power cut");
  };
  Trainer first(trainer_options());
  CHECK_THROWS_WITH(first.fit(failing), "power cut");
  REQUIRE(std::filesystem::exists(dir.path("rescue.ckpt")));

  std::vector<std::string> steps;
  auto module = std::make_shared<BoringModule>();
  module->before_training_step = [&](BoringModule& of, int64_t batch_idx) {
    steps.push_back(str(of.current_epoch(), ".", batch_idx));
  };
  Trainer second(trainer_options());
  second.fit(module);
  REQUIRE(!steps.empty());
  CHECK(steps.front() == "1.2");  // six steps were done, at four batches in an epoch
  CHECK(steps.back() == "2.3");
  CHECK_FALSE(std::filesystem::exists(dir.path("rescue.ckpt")));  // a run that ends well
}

TEST_CASE("an exception checkpoint wants a folder and a name", "[callbacks]") {
  CHECK_THROWS_WITH(OnExceptionCheckpoint(OnExceptionCheckpointOptions()), Contains("no dirpath"));
  CHECK_THROWS_WITH(OnExceptionCheckpoint(OnExceptionCheckpointOptions(".").filename("")),
                    Contains("empty filename"));
}
