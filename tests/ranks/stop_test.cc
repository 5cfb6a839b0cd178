// One rank that ends training: by should_stop, for which all meet at one place; by an exception,
// after which it saves what it can without the others.
#include <torch/torch.h>

#include <algorithm>
#include <array>
#include <catch2/catch.hpp>
#include <chrono>
#include <filesystem>
#include <fstream>
#include <random>
#include <thread>

#include "callbacks/model_checkpoint.h"
#include "callbacks/on_exception_checkpoint.h"
#include "callbacks/timer.h"
#include "lightning.h"
#include "lightning/checkpoint/torch_file.h"
#include "lightning/distributed/watch.h"
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
DataLoader rows(int64_t ranks, int64_t steps = kStepsAnEpoch) {
  return DataLoader(TensorDataset(Batch(torch::ones({2 * steps * ranks, 4}))),
                    DataLoaderOptions(2));
}

TrainerOptions options(const std::string& dir) {
  return TrainerOptions()
      .accelerator(Ranks::accelerator())
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
std::vector<int64_t> stopped_at(Trainer& trainer, const std::string& place, bool stops,
                                const RunArguments& arguments = {}) {
  auto net = std::make_shared<Stopping>(place, stops);
  trainer.fit(net, rows(trainer.world_size()), rows(trainer.world_size()), arguments);
  return {trainer.global_step(), trainer.current_epoch(), net->times};
}

bool alike_on_all(Trainer& trainer, const std::vector<int64_t>& values) {
  const auto all = trainer.strategy().all_gather_states(State::List(values.begin(), values.end()));
  return std::all_of(all.begin(), all.end(),
                     [&](const State& one) { return one.repr() == all[0].repr(); });
}

}  // namespace

TEST_CASE("program: is stopped by its ranks", "[.program]") {
  for (const char* strategy : {"ddp", "fsdp"}) {
    for (const auto& place : places()) {
      for (const int64_t who : {0, 1, 2}) {  // 2: both
        CAPTURE(strategy, place, who);
        Trainer alone(options(Ranks::folder()).devices(1).strategy("single_device"));
        const auto expected = stopped_at(alone, place, true);
        Trainer trainer(options(Ranks::folder()).devices(2).strategy(strategy));
        const bool stops = who == 2 || who == trainer.global_rank();
        const auto found = stopped_at(trainer, place, stops);
        CHECK(alike_on_all(trainer, found));
        CHECK(trainer.should_stop());
        if (who == 2) {
          CHECK(found == expected);
          continue;
        }
        // The other may have passed that place, and be on its way to the next collective. Over NCCL
        // it does not wait there, and may be further.
        for (size_t i = 0; i < found.size(); ++i) {
          CAPTURE(i);
          CHECK(found[i] >= expected[i]);
          if (Ranks::on_cpu()) CHECK(found[i] <= expected[i] + 2);
        }
      }
    }
  }
}

TEST_CASE("ranks that stop end where one process would, and with one that does, at one place",
          "[ranks]") {
  Ranks program;
  const auto ended =
      program.run("program: is stopped by its ranks", {}, {}, nullptr, std::chrono::seconds(180));
  INFO(ended.output);
  CHECK(ended.status == 0);
  CHECK(ended.still_running == 0);
}

TEST_CASE("program: is resumed and stopped", "[.program]") {
  const auto both = options(Ranks::folder()).devices(2).strategy("ddp");
  const auto own = str("alone on ", Trainer(both).global_rank());
  const auto resumed_at = [](TrainerOptions flags, const std::string& file, const char* place) {
    auto short_flags = flags;
    Trainer first(short_flags.max_steps(3));
    first.fit(std::make_shared<Net>(), rows(first.world_size()), rows(first.world_size()));
    first.save_checkpoint(file);
    Trainer resumed(flags);
    const auto found = stopped_at(resumed, place, true, RunArguments().ckpt_path(file));
    CHECK(alike_on_all(resumed, found));
    return found;
  };
  for (const char* place : {"on_train_batch_end", "on_train_epoch_start", "on_validation_end"}) {
    CAPTURE(place);
    const auto file = Ranks::folder() + "/" + place;
    const auto alone = options(Ranks::folder()).devices(1).strategy("single_device");
    const auto expected = resumed_at(alone, file + own, place);
    CHECK(resumed_at(both, file, place) == expected);
  }
}

TEST_CASE("a resumed run of ranks stops where one process would", "[ranks]") {
  Ranks program;
  const auto ended = program.run("program: is resumed and stopped");
  INFO(ended.output);
  CHECK(ended.status == 0);
  CHECK(ended.still_running == 0);
}

// ---- Ranks that are not at the same batch -------------------------------------------------------

namespace {

constexpr int64_t kRanks = 4;
constexpr int64_t kBatches = 16;
// Between its steps no rank waits for another.
constexpr int64_t kBatchesAStep = 8;

void leave_word(const std::string& what, int64_t rank) {
  std::ofstream(Ranks::folder() + str("/", what, " ", rank));
}

// Until the other ranks have left a word.
void wait_for_word(const std::string& what, int64_t own_rank) {
  const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(40);
  for (int64_t rank = 0; rank < kRanks; ++rank) {
    const auto file = Ranks::folder() + str("/", what, " ", rank);
    while (rank != own_rank && !std::filesystem::exists(file)) {
      if (std::chrono::steady_clock::now() > end) throw std::runtime_error("no " + file);
      std::this_thread::sleep_for(std::chrono::milliseconds(5));
    }
  }
}

// Asks after as many batches, or at the end of the epoch; where it is told to, once the others have
// come to a place of theirs.
struct Asking : Net {
  explicit Asking(int64_t after = -1, std::string once_others = "")
      : after(after), once_others(std::move(once_others)) {}
  void at(const char* here) override {
    const std::string place = here;
    if (place == "training_step" && ++batches == kBatchesAStep) note("in the last batch of a step");
    if (place == "on_train_batch_end" && batches == after) ask();
    if (place != "on_train_epoch_end") return;
    note("at the end of the epoch");
    if (after > kBatches) ask();
  }
  void on_train_end() override { note("at the end of the run"); }

  void note(const std::string& what) const { leave_word(what, global_rank()); }
  void ask() {
    if (!once_others.empty()) wait_for_word(once_others, global_rank());
    trainer().set_should_stop(true);
  }
  int64_t after;
  std::string once_others;
  int64_t batches = 0;
};

TrainerOptions four_ranks() {
  return options(Ranks::folder())
      .accelerator("cpu")  // whose collectives a rank waits for
      .devices(kRanks)
      .strategy("ddp")
      .max_epochs(1)
      .accumulate_grad_batches(kBatchesAStep)
      .val_check_interval(1.0)
      .limit_val_batches(int64_t{0});
}

// Batches until all stopped.
int64_t train(Trainer& trainer, const std::shared_ptr<Asking>& net) {
  trainer.fit(net, rows(kRanks, kBatches));
  CHECK(alike_on_all(trainer, {net->batches, trainer.global_step(), trainer.should_stop()}));
  return net->batches;
}

}  // namespace

TEST_CASE("program: is stopped while others are ahead", "[.program]") {
  Trainer trainer(four_ranks());
  const bool asks = trainer.global_rank() == 2;
  const auto net = std::make_shared<Asking>(asks ? 2 : -1, "in the last batch of a step");
  CHECK(train(trainer, net) == kBatchesAStep);  // there the others wait for rank 2
  CHECK(trainer.should_stop());
}

TEST_CASE("program: is stopped by two ranks", "[.program]") {
  for (const int64_t second : {2, 3, 5}) {
    CAPTURE(second);
    Trainer trainer(four_ranks());
    const auto rank = trainer.global_rank();
    const auto batches = train(trainer, std::make_shared<Asking>(rank == 0   ? 2
                                                                 : rank == 3 ? second
                                                                             : -1));
    CHECK(batches >= 2);
    CHECK(batches <= kBatchesAStep);
    CHECK(trainer.should_stop());
  }
}

TEST_CASE("program: is stopped at its end", "[.program]") {
  const auto end = Ranks::variable("END");
  Trainer trainer(four_ranks());
  const bool asks = trainer.global_rank() == 3;
  const auto first =
      end == "batch" ? std::make_shared<Asking>(asks ? kBatches : -1, "at the end of the epoch")
                     : std::make_shared<Asking>(asks ? kBatches + 1 : -1, "at the end of the run");
  CHECK(train(trainer, first) == kBatches);
  CHECK(trainer.global_step() == kBatches / kBatchesAStep);

  // What was not met any more does not hold for another run.
  Trainer second(four_ranks());
  CHECK(train(second, std::make_shared<Asking>()) == kBatches);
  CHECK(!second.should_stop());
  Trainer third(four_ranks());
  CHECK(train(third, std::make_shared<Asking>(3)) == 3);
}

TEST_CASE("program: changes its mind", "[.program]") {
  struct Fickle : Asking {
    void at(const char* here) override {
      Asking::at(here);
      if (std::string(here) != "on_train_batch_end") return;
      if (batches == 2 && global_rank() == 1) trainer().set_should_stop(true);
      stopped = stopped || trainer().should_stop();
      if (batches == 12) trainer().set_should_stop(false);
    }
    bool stopped = false;
  };
  Trainer trainer(four_ranks().max_epochs(2).min_epochs(2));
  const auto net = std::make_shared<Fickle>();
  CHECK(train(trainer, net) == 2 * kBatches);
  CHECK(net->stopped);
  CHECK(!trainer.should_stop());
}

TEST_CASE("program: is stopped again and again", "[.program]") {
  std::mt19937 random(7);  // the same on all ranks
  for (int run = 0; run < 60; ++run) {
    std::array<int64_t, kRanks> after{};
    for (auto& one : after) one = random() % 3 == 0 ? -1 : 1 + static_cast<int64_t>(random() % 9);
    if (run % 10 == 0) after.fill(after[0]);
    const auto accumulated = int64_t{1} << random() % 4;
    CAPTURE(run, accumulated, after);
    Trainer trainer(four_ranks().accumulate_grad_batches(accumulated));
    const auto own = after.at(trainer.global_rank());
    const auto batches = train(trainer, std::make_shared<Asking>(own));
    int64_t first = kBatches;
    for (const auto one : after) first = one == -1 ? first : std::min(first, one);
    const bool all = std::count(after.begin(), after.end(), first) == kRanks;
    CHECK(batches >= first);
    CHECK(batches <= (all ? first : std::min(first + accumulated, kBatches)));
  }
}

TEST_CASE("program: stops after errors of all ranks", "[.program]") {
  struct Throwing : Asking {
    void at(const char* here) override {
      Asking::at(here);
      if (batches == 1 + global_rank()) throw std::runtime_error("a sample that nobody can read");
    }
  };
  Trainer failing(four_ranks());
  CHECK_THROWS(failing.fit(std::make_shared<Throwing>(), rows(kRanks, kBatches)));
  Trainer all(four_ranks());
  CHECK(train(all, std::make_shared<Asking>(3)) == 3);
  Trainer one(four_ranks());
  CHECK(train(one, std::make_shared<Asking>(one.global_rank() == 2 ? 2 : -1)) <= kBatchesAStep);
}

TEST_CASE("program: counts its messages", "[.program]") {
  struct Counting : Asking {
    using Asking::Asking;
    void on_fit_start() override { before = Watch::current()->messages(); }
    void on_train_end() override { sent = Watch::current()->messages() - before; }
    int64_t before = 0, sent = -1;
  };
  Trainer quiet(four_ranks());
  const auto net = std::make_shared<Counting>();
  CHECK(train(quiet, net) == kBatches);
  CHECK(net->sent == 0);
  Trainer asked(four_ranks());
  const auto other = std::make_shared<Counting>(asked.global_rank() == 1 ? 2 : -1);
  CHECK(train(asked, other) < kBatches);
  // Rank 0 asks each where it is and tells each where to meet; who asks says so and where it is.
  CHECK(other->sent == std::vector<int64_t>{6, 2, 1, 1}.at(asked.global_rank()));
}

TEST_CASE("four ranks stop at one place, wherever they are", "[ranks]") {
  struct Case {
    const char* program;
    const char* end;
  };
  const auto how = GENERATE(values<Case>({{"program: is stopped while others are ahead", ""},
                                          {"program: is stopped by two ranks", ""},
                                          {"program: is stopped at its end", "batch"},
                                          {"program: is stopped at its end", "epoch"},
                                          {"program: is stopped again and again", ""},
                                          {"program: stops after errors of all ranks", ""},
                                          {"program: changes its mind", ""},
                                          {"program: counts its messages", ""}}));
  CAPTURE(how.program, how.end);
  Ranks program;
  const auto ended = program.run(how.program, {{"END", how.end}, {"OMP_NUM_THREADS", "1"}}, {},
                                 nullptr, std::chrono::seconds(120));
  INFO(ended.output);
  CHECK(ended.status == 0);
  CHECK(ended.still_running == 0);
}

// ---- Clocks -------------------------------------------------------------------------------------

namespace {

struct Slow : Net {
  void at(const char* here) override {
    const std::string place = here;
    if (place == "training_step") std::this_thread::sleep_for(std::chrono::milliseconds(20));
    if (place == "on_train_batch_end") ++batches;
    if (place == "on_validation_end" && !trainer().sanity_checking()) {
      validated_after.push_back(batches);
    }
  }
  int64_t batches = 0;
  std::vector<int64_t> validated_after;
};

}  // namespace

TEST_CASE("program: has clocks that differ", "[.program]") {
  const auto rank = Trainer(options(Ranks::folder()).devices(2).strategy("ddp")).global_rank();
  for (const int64_t first : {0, 1}) {
    CAPTURE(first);
    Trainer trainer(options(Ranks::folder())
                        .devices(2)
                        .strategy("ddp")
                        .max_epochs(1)
                        .val_check_interval(rank == first ? "00:00:00:01" : "00:01:00:00"));
    const auto net = std::make_shared<Slow>();
    trainer.fit(net, rows(2, 120), rows(2));
    CHECK(net->batches == 120);
    CHECK(!net->validated_after.empty());
    CHECK(alike_on_all(trainer, net->validated_after));
  }
  // A clock of rank 0's that is ahead ends fit on all.
  const auto timer = std::make_shared<Timer>(
      TimerOptions(rank == 0 ? "00:00:00:01" : "00:01:00:00").verbose(false));
  Trainer trainer(options(Ranks::folder())
                      .devices(2)
                      .strategy("ddp")
                      .val_check_interval(1.0)
                      .callbacks({timer}));
  const auto net = std::make_shared<Slow>();
  trainer.fit(net, rows(2, 1200), rows(2));
  CHECK(net->batches < 1200);
  CHECK(alike_on_all(trainer, {net->batches}));
}

TEST_CASE("ranks whose clocks differ validate and stop at one place", "[ranks]") {
  Ranks program;
  const auto ended = program.run("program: has clocks that differ", {{"OMP_NUM_THREADS", "1"}});
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
  Trainer expected(options(program.dir().path()).devices(1).max_steps(kGoodSteps));
  auto net = std::make_shared<Net>();
  expected.fit(net, rows(1), rows(1));
  const auto weights = expected.strategy().model_state(*net);
  for (const auto& [name, weight] : weights.as_dict()) {
    INFO(to_string(name));
    CHECK(at::allclose(saved.at("state_dict").at(name).as_tensor(), weight.as_tensor().cpu()));
  }
  Trainer resumed(options(program.dir().path()).devices(1).max_epochs(1));
  resumed.fit(std::make_shared<Net>(), rows(1), rows(1), RunArguments().ckpt_path(file));
  CHECK(resumed.global_step() == kStepsAnEpoch);
}
