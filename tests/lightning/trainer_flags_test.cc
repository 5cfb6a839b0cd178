// Flags are checked when a Trainer is made: a value that makes no sense is refused with the flag's
// name, what was given, and what would do.
#include "lightning/trainer_flags.h"

#include <catch2/catch.hpp>
#include <cstdlib>
#include <functional>
#include <nlohmann/json.hpp>
#include <utility>
#include <vector>

#include "lightning/trainer.h"

using namespace lightning;
using Catch::Contains;

namespace {

struct Refused {
  std::function<TrainerOptions()> options;
  std::vector<std::string> said;  // all of these in the message
};

TrainerOptions options() { return TrainerOptions(); }

const std::vector<Refused>& refused() {
  static const std::vector<Refused> cases = {
      {[] { return options().max_epochs(-2); }, {"max_epochs=-2", "0 or more, or -1"}},
      {[] { return options().max_steps(-2); }, {"max_steps=-2"}},
      {[] { return options().min_epochs(-1); }, {"min_epochs=-1"}},
      {[] { return options().min_epochs(5).max_epochs(3); }, {"min_epochs=5", "max_epochs=3"}},
      {[] { return options().min_steps(5).max_steps(3); }, {"min_steps=5", "max_steps=3"}},
      {[] { return options().limit_train_batches(-1); }, {"limit_train_batches=-1"}},
      {[] { return options().limit_val_batches(1.5); }, {"limit_val_batches=1.5", "0.0 to 1.0"}},
      {[] { return options().limit_test_batches(-0.5); }, {"limit_test_batches=-0.5"}},
      {[] { return options().overfit_batches(-3); }, {"overfit_batches=-3"}},
      {[] { return options().fast_dev_run(-1); }, {"fast_dev_run=-1"}},
      {[] { return options().check_val_every_n_epoch(0); }, {"check_val_every_n_epoch=0", "null"}},
      {[] { return options().val_check_interval(0); }, {"val_check_interval=0"}},
      {[] { return options().val_check_interval(1.5); },
       {"val_check_interval=1.5", "limit_val_batches=0"}},
      {[] { return options().val_check_interval(0.5).check_val_every_n_epoch(std::nullopt); },
       {"val_check_interval=0.5", "check_val_every_n_epoch=null"}},
      {[] { return options().val_check_interval(std::string("1:30")); }, {"1:30", "DD:HH:MM:SS"}},
      {[] { return options().max_time(std::string("1:30")); }, {"1:30", "DD:HH:MM:SS"}},
      {[] { return options().num_sanity_val_steps(-2); }, {"num_sanity_val_steps=-2"}},
      {[] { return options().log_every_n_steps(-1); }, {"log_every_n_steps=-1"}},
      {[] { return options().accumulate_grad_batches(0); }, {"accumulate_grad_batches=0"}},
      {[] { return options().gradient_clip_val(-1.0); }, {"gradient_clip_val=-1"}},
      {[] { return options().gradient_clip_algorithm("nrom"); }, {"nrom", "Did you mean \"norm\""}},
      {[] { return options().deterministic(std::string("sometimes")); }, {"sometimes", "warn"}},
      {[] { return options().reload_dataloaders_every_n_epochs(-1); },
       {"reload_dataloaders_every_n_epochs=-1"}},
      {[] { return options().num_nodes(0); }, {"num_nodes=0"}},
      {[] { return options().num_nodes(2); }, {"num_nodes=2", "MASTER_ADDR is not set"}},
      {[] { return options().accelerator("cpu").strategy("single_device").devices(4); },
       {"devices=4", "works on one device"}},
      {[] { return options().accelerator("cpu").devices(0); }, {"devices", "0"}},
      {[] { return options().strategy("ddq"); }, {"\"ddq\"", "Did you mean \"ddp\""}},
      {[] { return options().strategy("single_devise"); }, {"Did you mean \"single_device\""}},
      {[] { return options().precision("32-ture"); }, {"32-ture", "Did you mean \"32-true\""}},
      {[] { return options().accelerator("gpuu"); }, {"gpuu", "Did you mean"}},
      {[] { return options().profiler("simpel"); }, {"simpel", "Did you mean \"simple\""}},
      {[] { return options().compile("cuda_graph"); }, {"cuda_graph", "eager"}},
      {[] { return options().callbacks({"EarlyStoping"}); },
       {"EarlyStoping", "Did you mean \"EarlyStopping\""}},
      {[] {
         return options().callbacks({Part<Callback>("Timer", Json{{"duraton", "00:00:01:00"}})});
       },
       {"duraton", "Did you mean \"duration\""}},
      {[] {
         return options().callbacks({"TQDMProgressBar", "RichProgressBar"});
       },
       {"several progress bars"}},
      {[] { return options().callbacks({"ModelCheckpoint"}).enable_checkpointing(false); },
       {"enable_checkpointing=false"}},
      {[] { return options().callbacks({"TQDMProgressBar"}).enable_progress_bar(false); },
       {"enable_progress_bar=false"}},
      {[] {
         return options().callbacks({"ModelCheckpoint", "ModelCheckpoint"});
       },
       {"ModelCheckpoint{'monitor'"}},
      {[] { return options().barebones(true).enable_checkpointing(true); },
       {"barebones", "enable_checkpointing"}},
      {[] { return options().barebones(true).logger("CSVLogger"); }, {"barebones", "logger"}},
      {[] { return options().barebones(true).profiler("simple"); }, {"barebones", "profiler"}},
      {[] { return options().barebones(true).fast_dev_run(true); }, {"barebones", "fast_dev_run"}},
      {[] { return options().logger("CVSLogger"); }, {"CVSLogger", "Did you mean \"CSVLogger\""}},
  };
  return cases;
}

}  // namespace

TEST_CASE("a flag that makes no sense is refused before any work starts", "[trainer]") {
  for (const auto& one : refused()) {
    try {
      const Trainer trainer(one.options().logger().is_default() ? one.options().logger(false)
                                                                : one.options());
      FAIL("accepted: " << one.said[0]);
    } catch (const MisconfigurationError& error) {
      for (const auto& words : one.said) CHECK_THAT(error.what(), Contains(words));
    }
  }
}

TEST_CASE("1 is one batch and 1.0 all of them, in code and in YAML", "[trainer]") {
  CHECK(check_flags(options().limit_train_batches(1)).limit_train_batches ==
        BatchLimit(int64_t{1}));
  CHECK(check_flags(options().limit_train_batches(1.0)).limit_train_batches == BatchLimit(1.0));
  CHECK(check_flags(options().limit_train_batches(2.0)).limit_train_batches ==
        BatchLimit(int64_t{2}));
  TrainerOptions read;
  read.read(Json{{"limit_train_batches", 1}, {"limit_val_batches", 1.0}}, "trainer");
  CHECK(read.limit_train_batches() == std::optional<IntOrFloat>(int64_t{1}));
  CHECK(read.limit_val_batches() == std::optional<IntOrFloat>(1.0));
}

TEST_CASE("fast_dev_run limits every stage and turns saving and logging off", "[trainer]") {
  const auto settings = check_flags(options().fast_dev_run(3).max_epochs(100));
  CHECK(settings.max_steps == 3);
  CHECK(settings.max_epochs == 1);
  CHECK(settings.num_sanity_val_steps == 0);
  CHECK(settings.limit_test_batches == BatchLimit(int64_t{3}));
  CHECK(make_loggers(options().fast_dev_run(true), settings).empty());
}

TEST_CASE("every flag survives being written to YAML and read back", "[trainer]") {
  const auto given = options()
                         .max_epochs(3)
                         .devices(std::vector<int64_t>{0})
                         .precision("bf16-true")
                         .callbacks({Part<Callback>("EarlyStopping", Json{{"monitor", "loss"}})})
                         .val_check_interval(std::string("00:00:10:00"))
                         .gradient_clip_val(0.5)
                         .overfit_batches(2)
                         .deterministic(std::string("warn"))
                         .check_val_every_n_epoch(std::nullopt);
  Json once, twice;
  given.write(once);
  TrainerOptions back;
  back.read(once, "trainer");
  back.write(twice);
  CHECK(once == twice);
  CHECK(once["callbacks"][0]["class_path"] == "EarlyStopping");
  CHECK(once["check_val_every_n_epoch"].is_null());
}

TEST_CASE("an unknown flag gets its nearest matches", "[trainer]") {
  TrainerOptions read;
  CHECK_THROWS_WITH(read.read(Json{{"max_epoch", 3}}, "trainer"),
                    Contains("trainer.max_epoch") && Contains("Did you mean \"max_epochs\""));
  CHECK_THROWS_WITH(
      read.read(Json{{"max_epochs", "three"}}, "trainer"),
      Contains("trainer.max_epochs") && Contains("\"three\"") && Contains("an integer"));
}

TEST_CASE("default callbacks come after the user's, checkpoints last", "[trainer]") {
  const auto callbacks =
      make_callbacks(options().callbacks({"ModelCheckpoint", "LearningRateMonitor"}));
  REQUIRE(callbacks.size() == 4);
  CHECK(callbacks[0]->role() == CallbackRole::kOther);
  CHECK(callbacks[1]->role() == CallbackRole::kProgressBar);
  CHECK(callbacks[2]->role() == CallbackRole::kModelSummary);
  CHECK(callbacks[3]->role() == CallbackRole::kCheckpoint);
  CHECK(make_callbacks(options().barebones(true)).empty());
}

TEST_CASE("a flag left at its default is taken from PL_TRAINER_ in the environment", "[trainer]") {
  const auto with = [](const char* name, const char* value, const TrainerOptions& given) {
    setenv(name, value, 1);
    const auto options = [&] {
      try {
        return with_environment(given);
      } catch (...) {
        unsetenv(name);
        throw;
      }
    }();
    unsetenv(name);
    return options;
  };
  CHECK(with("PL_TRAINER_MAX_EPOCHS", "7", options()).max_epochs() == 7);
  CHECK(with("PL_TRAINER_MAX_EPOCHS", "7", options().max_epochs(2)).max_epochs() == 2);
  CHECK(with("PL_TRAINER_PRECISION", "bf16-true", options()).precision()->name() == "bf16-true");
  CHECK(with("PL_TRAINER_DEVICES", "[0]", options()).devices() ==
        DevicesFlag(std::vector<int64_t>{0}));
  CHECK_THROWS_WITH(with("PL_TRAINER_MAX_STEPS", "many", options()),
                    Contains("PL_TRAINER_MAX_STEPS") && Contains("an integer"));
}
