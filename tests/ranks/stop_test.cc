// One rank alone that ends training: by should_stop, on which all agree; by an exception, after
// which it saves what it can without the others.
#include <torch/torch.h>

#include <catch2/catch.hpp>
#include <filesystem>

#include "callbacks/model_checkpoint.h"
#include "callbacks/on_exception_checkpoint.h"
#include "lightning.h"
#include "lightning/checkpoint/torch_file.h"
#include "strategies/fsdp.h"
#include "tests/support/ranks.h"

using namespace lightning;
using namespace lightning::testing;
using Catch::Contains;

namespace {

constexpr int64_t kStepsAnEpoch = 6;

struct Net : LightningModule {
  Net() {
    torch::manual_seed(3);
    layer = register_module("layer", torch::nn::Linear(4, 4));
  }
  virtual void at(const char* /*place*/) {}

  void on_fit_start() override { at("on_fit_start"); }
  void on_train_start() override { at("on_train_start"); }
  void on_train_epoch_start() override { at("on_train_epoch_start"); }
  StepOutput training_step(const Batch& batch, int64_t) override {
    at("training_step");
    return layer(batch.tensor()).square().mean();
  }
  void on_train_batch_end(const StepOutput&, const Batch&, int64_t) override {
    at("on_train_batch_end");
  }
  StepOutput validation_step(const Batch& batch, int64_t) override {
    log("val_loss", layer(batch.tensor()).square().mean(), LogOptions().sync_dist(true));
    return {};
  }
  void on_validation_epoch_end() override { at("on_validation_epoch_end"); }
  void on_validation_end() override { at("on_validation_end"); }
  void on_train_epoch_end() override { at("on_train_epoch_end"); }
  Optimizers configure_optimizers() override {
    return torch::optim::SGD(parameters(), torch::optim::SGDOptions(0.1).momentum(0.9));
  }

  torch::nn::Linear layer{nullptr};
};

// Stops at a place, the second time that it comes there in training.
struct Stopping : Net {
  Stopping(std::string place, bool stops) : place(std::move(place)), stops(stops) {}
  void at(const char* here) override {
    if (here != place || trainer().sanity_checking()) return;
    const bool once = place == "on_fit_start" || place == "on_train_start";
    if (++times == (once ? 1 : 2) && stops) trainer().set_should_stop(true);
  }
  std::string place;
  bool stops;
  int times = 0;
};

// What of the data set does not matter: the same for one process as for all.
DataLoader rows(int64_t ranks) {
  return DataLoader(TensorDataset(Batch(torch::ones({2 * kStepsAnEpoch * ranks, 4}))),
                    DataLoaderOptions(2));
}

TrainerOptions options(const std::string& dir) {
  return TrainerOptions()
      .accelerator("cpu")
      .max_epochs(4)
      .val_check_interval(int64_t{2})
      .logger(false)
      .enable_progress_bar(false)
      .enable_model_summary(false)
      .enable_checkpointing(false)
      .default_root_dir(dir);
}

const std::vector<std::string>& places() {
  static const std::vector<std::string> all{"on_fit_start",         "on_train_start",
                                            "on_train_epoch_start", "training_step",
                                            "on_train_batch_end",   "on_validation_epoch_end",
                                            "on_validation_end",    "on_train_epoch_end"};
  return all;
}

// Steps, epochs, and how often the place was come to.
std::vector<int64_t> stopped_at(Trainer& trainer, const std::string& place, bool stops) {
  auto net = std::make_shared<Stopping>(place, stops);
  trainer.fit(net, rows(trainer.world_size()), rows(trainer.world_size()));
  return {trainer.global_step(), trainer.current_epoch(), net->times};
}

}  // namespace

TEST_CASE("program: is stopped by one of its ranks", "[.program]") {
  for (const char* strategy : {"ddp", "fsdp"}) {
    for (const auto& place : places()) {
      for (const int64_t who : {0, 1, 2}) {  // 2: both
        CAPTURE(strategy, place, who);
        Trainer alone(options(Ranks::folder()).devices(1).strategy("single_device"));
        const auto expected = stopped_at(alone, place, true);
        Trainer trainer(options(Ranks::folder()).devices(2).strategy(strategy));
        CHECK(stopped_at(trainer, place, who == 2 || who == trainer.global_rank()) == expected);
        CHECK(trainer.should_stop());
      }
    }
  }
}

TEST_CASE("a run that one rank stops ends on all ranks where one process would", "[ranks]") {
  Ranks program;
  const auto ended = program.run("program: is stopped by one of its ranks", {}, {}, nullptr,
                                 std::chrono::seconds(180));
  INFO(ended.output);
  CHECK(ended.status == 0);
  CHECK(ended.still_running == 0);
}

// ---- Exceptions ---------------------------------------------------------------------------------

namespace {

constexpr int64_t kGoodSteps = 3;

struct Failing : Net {
  explicit Failing(bool fails) : fails(fails) {}
  void at(const char* here) override {
    const bool is_step = std::string(here) == "training_step";
    if (fails && is_step && trainer().global_step() == kGoodSteps) {
      throw std::runtime_error("a sample that nobody can read");
    }
  }
  bool fails;
};

}  // namespace

TEST_CASE("program: fails on some ranks", "[.program]") {
  const auto who = Ranks::variable("WHO"), how = Ranks::variable("STRATEGY");
  std::shared_ptr<Callback> saver;
  if (Ranks::variable("CALLBACK") == "ModelCheckpoint") {
    saver = std::make_shared<ModelCheckpoint>(ModelCheckpointOptions()
                                                  .dirpath(Ranks::folder())
                                                  .filename("saved")
                                                  .save_top_k(0)
                                                  .save_on_exception(true));
  } else {
    saver = std::make_shared<OnExceptionCheckpoint>(
        OnExceptionCheckpointOptions().dirpath(Ranks::folder()).filename("saved"));
  }
  auto flags = options(Ranks::folder()).devices(2).callbacks({saver});
  flags.enable_checkpointing(true);
  if (how == "ddp") flags.strategy("ddp");
  if (how != "ddp") flags.strategy(FSDPStrategyOptions().sharding_strategy(how));
  Trainer trainer(flags);
  const bool fails = who == "both" || who == str(trainer.global_rank());
  trainer.fit(std::make_shared<Failing>(fails), rows(2), rows(2));
}

TEST_CASE("after an exception of one rank alone it saves what it has, and nothing hangs",
          "[ranks]") {
  struct Case {
    const char* strategy;
    const char* who;
    const char* callback;
    bool saves;
  };
  const auto how = GENERATE(values<Case>({{"ddp", "0", "ModelCheckpoint", true},
                                          {"ddp", "1", "ModelCheckpoint", true},
                                          {"ddp", "both", "ModelCheckpoint", true},
                                          {"ddp", "1", "OnExceptionCheckpoint", true},
                                          {"NO_SHARD", "1", "ModelCheckpoint", true},
                                          {"FULL_SHARD", "0", "ModelCheckpoint", false},
                                          {"FULL_SHARD", "1", "OnExceptionCheckpoint", false},
                                          {"FULL_SHARD", "both", "ModelCheckpoint", true}}));
  CAPTURE(how.strategy, how.who, how.callback);
  Ranks program;
  const auto ended =
      program.run("program: fails on some ranks",
                  {{"STRATEGY", how.strategy}, {"WHO", how.who}, {"CALLBACK", how.callback}});
  INFO(ended.output);
  CHECK(ended.status != 0);
  CHECK(ended.status != -1);  // the deadline
  CHECK(ended.still_running == 0);
  CHECK_THAT(ended.output, Contains("a sample that nobody can read"));
  CHECK_THAT(ended.output, !Contains("onnection closed by peer"));
  const auto file = program.dir().path("saved.ckpt");
  CHECK(std::filesystem::exists(file) == how.saves);
  CHECK((ended.output.find("cannot be saved any more") == std::string::npos) == how.saves);
  if (!how.saves) return;

  const auto saved = read_torch_file(file);
  CHECK(saved.at("global_step").as_int() == kGoodSteps);
  Trainer expected(options(program.dir().path()).max_steps(kGoodSteps));
  auto net = std::make_shared<Net>();
  expected.fit(net, rows(1), rows(1));
  const auto weights = expected.strategy().model_state(*net);
  for (const auto& [name, weight] : weights.as_dict()) {
    INFO(to_string(name));
    CHECK(at::allclose(saved.at("state_dict").at(name).as_tensor(), weight.as_tensor()));
  }
  Trainer resumed(options(program.dir().path()).max_epochs(1));
  resumed.fit(std::make_shared<Net>(), rows(1), rows(1), RunArguments().ckpt_path(file));
  CHECK(resumed.global_step() == kStepsAnEpoch);
}
