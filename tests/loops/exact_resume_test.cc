// A run is saved wherever it can be; each of these checkpoints is resumed, and the resumed run has
// to end as the first one did: bit for bit in everything a checkpoint holds, row for row in what is
// logged.
#include <catch2/catch.hpp>
#include <csignal>
#include <map>

#include "callbacks/gradient_accumulation_scheduler.h"
#include "lightning/checkpoint/checkpoint_io.h"
#include "lightning/checkpoint_callback.h"
#include "tests/support/learner.h"
#include "tests/support/memory_logger.h"
#include "tests/support/temp_dir.h"

using namespace lightning;
using namespace lightning::testing;

namespace {

// Saves at every place; a plain callback's hooks are places in the middle of something.
struct Saver : Checkpoint {
  explicit Saver(std::string folder) : folder(std::move(folder)) {}

  void save(Trainer& trainer, const std::string& place) {
    if (folder.empty() || trainer.sanity_checking()) return;
    const auto path = str(folder, "/", files.size(), "-", place, ".ckpt");
    trainer.save_checkpoint(path);
    const auto& logger = dynamic_cast<MemoryLogger&>(*trainer.loggers().at(0));
    files.emplace_back(path, logger.rows.size());
  }
  void on_train_epoch_start(Trainer& trainer, LightningModule&) override {
    if (trainer.current_epoch() > 0) save(trainer, "epoch_start");
  }
  void on_train_batch_start(Trainer& trainer, LightningModule&, const Batch&, int64_t) override {
    save(trainer, "batch_start");
  }
  void on_train_batch_end(Trainer& trainer, LightningModule&, const StepOutput&, const Batch&,
                          int64_t) override {
    save(trainer, "batch_end");
  }
  void on_validation_batch_end(Trainer& trainer, LightningModule&, const StepOutput&, const Batch&,
                               int64_t batch_idx, int64_t) override {
    if (batch_idx == 0) save(trainer, "in_validation");
  }
  void on_validation_end(Trainer& trainer, LightningModule&) override {
    save(trainer, "validation_end");
  }
  void on_train_epoch_end(Trainer& trainer, LightningModule&) override {
    save(trainer, "epoch_end");
  }

  void on_exception(Trainer& trainer, LightningModule&, const std::exception&) override {
    save(trainer, "exception");
  }

  std::string folder;
  std::vector<std::pair<std::string, size_t>> files;  // with the rows that were logged before
};

// What ends a run before its time, at a batch counted from 0 through all epochs.
struct End {
  enum class How { kNone, kSigterm, kSigtermInEpochStart, kSigtermInValidation, kException };
  How how = How::kNone;
  int64_t batch = 0;
};

struct Ender : Callback {
  explicit Ender(End end) : end(end) {}
  void on_train_epoch_start(Trainer&, LightningModule&) override {
    if (batches > end.batch && end.how == End::How::kSigtermInEpochStart) std::raise(SIGTERM);
  }
  void on_train_batch_start(Trainer&, LightningModule&, const Batch&, int64_t) override {
    if (batches++ != end.batch) return;
    if (end.how == End::How::kSigterm) std::raise(SIGTERM);
    if (end.how == End::How::kException) throw std::runtime_error("the disk of the data is gone");
  }
  void on_validation_batch_start(Trainer&, LightningModule&, const Batch&, int64_t,
                                 int64_t) override {
    if (batches > end.batch && end.how == End::How::kSigtermInValidation) std::raise(SIGTERM);
  }
  End end;
  int64_t batches = 0;
};

struct Setting {
  std::string name;
  bool by_hand = false;
  bool two_loaders = false;
  int64_t workers = 0;
  std::map<int64_t, int64_t> accumulate;
  TrainerOptions options;
};

Loaders training_data(const Setting& setting) {
  const auto loader = [&](int64_t rows, uint64_t seed) {
    return DataLoader(TensorDataset(noise(rows, seed)),
                      DataLoaderOptions().batch_size(4).shuffle(true).num_workers(setting.workers));
  };
  if (!setting.two_loaders) return loader(26, 1);
  return CombinedLoader(Loaders::map({{"rows", loader(26, 1)}, {"others", loader(9, 2)}}),
                        "max_size_cycle");
}

struct Outcome {
  Leaves state;
  std::vector<std::pair<int64_t, MetricRow>> rows;
  std::vector<std::pair<std::string, size_t>> files;
};

Outcome run(const Setting& setting, const TempDir& dir, int64_t seed, const std::string& resume,
            End end = {}) {
  torch::manual_seed(seed);
  auto logger = std::make_shared<MemoryLogger>();
  auto saver = std::make_shared<Saver>(resume.empty() ? dir.path() : "");
  std::vector<Part<Callback>> callbacks{saver, std::make_shared<Ender>(end)};
  if (!setting.accumulate.empty()) {
    callbacks.emplace_back(std::make_shared<GradientAccumulationScheduler>(setting.accumulate));
  }
  auto options = setting.options;
  Trainer trainer(options.default_root_dir(dir.path())
                      .accelerator("cpu")
                      .enable_progress_bar(false)
                      .enable_model_summary(false)
                      .enable_checkpointing(true)
                      .log_every_n_steps(2)
                      .callbacks(callbacks)
                      .logger(std::vector<Part<Logger>>{logger}));
  const auto fit = [&] {
    trainer.fit(
        std::make_shared<Learner>(setting.by_hand), training_data(setting),
        DataLoader(TensorDataset(noise(10, 3)), DataLoaderOptions().batch_size(4).shuffle(true)),
        RunArguments().ckpt_path(resume));
  };
  Outcome outcome;
  if (end.how != End::How::kNone) {
    CHECK_THROWS(fit());
    outcome.files = {saver->files.back()};
    return outcome;
  }
  fit();
  const auto last = dir.path("end.ckpt");
  trainer.save_checkpoint(last);
  outcome.state = leaves_of(default_checkpoint_io()->load(last));
  outcome.rows = logger->rows;
  outcome.files = saver->files;
  return outcome;
}

// Resumes from a file that was written when `rows` rows were logged, with other random numbers.
void check_resumed(const Setting& setting, const TempDir& dir, const Outcome& whole,
                   const std::string& file, size_t rows) {
  static int64_t seed = 100;
  INFO(setting.name << ": resumed from " << file.substr(file.rfind('/') + 1));
  const auto resumed = run(setting, dir, ++seed, file);
  CHECK(differences(whole.state, resumed.state) == "");
  const decltype(whole.rows) expected(whole.rows.begin() + static_cast<std::ptrdiff_t>(rows),
                                      whole.rows.end());
  CHECK(resumed.rows == expected);
}

void check(const Setting& setting) {
  TempDir dir;
  const auto whole = run(setting, dir, 7, "");
  REQUIRE(whole.files.size() > 20);
  for (const auto& [file, rows] : whole.files) check_resumed(setting, dir, whole, file, rows);
}

}  // namespace

TEST_CASE("a run that is resumed from any place ends bit for bit as one that was not interrupted",
          "[loops]") {
  check({"epochs, workers", false, false, 2, {}, TrainerOptions().max_epochs(3)});
}

TEST_CASE("a resumed run goes on in the middle of accumulation and of validation in the epoch",
          "[loops]") {
  check({"accumulation",
         false,
         false,
         0,
         {},
         TrainerOptions().max_epochs(2).accumulate_grad_batches(3).val_check_interval(2)});
}

TEST_CASE("a resumed run goes on with several optimizers stepped by hand", "[loops]") {
  check({"by hand", true, false, 0, {}, TrainerOptions().max_epochs(2)});
}

TEST_CASE("a resumed run of a number of steps validates and ends where the first one did",
          "[loops]") {
  check(
      {"steps",
       false,
       false,
       2,
       {},
       TrainerOptions().max_steps(11).val_check_interval(3).check_val_every_n_epoch(std::nullopt)});
}

TEST_CASE(
    "a resumed run goes on in two loaders, one of which goes round, under a schedule of "
    "accumulation",
    "[loops]") {
  check({"two loaders",
         false,
         true,
         1,
         {{0, 1}, {1, 2}},
         TrainerOptions().max_epochs(3).limit_train_batches(5)});
}

TEST_CASE("a run that a signal or an exception ended goes on from what was saved then", "[loops]") {
  std::signal(SIGTERM, SIG_DFL);  // without Catch's handler, which ours would call
  const Setting setting{"ended", false, false,
                        1,       {},    TrainerOptions().max_epochs(2).val_check_interval(3)};
  TempDir whole_dir;
  const auto whole = run(setting, whole_dir, 7, "");
  const std::vector<End> ends{{End::How::kSigterm, 1},
                              {End::How::kSigterm, 6},
                              {End::How::kSigterm, 9},
                              {End::How::kSigtermInEpochStart, 2},
                              {End::How::kSigtermInValidation, 2},
                              {End::How::kException, 0},
                              {End::How::kException, 6},
                              {End::How::kException, 8}};
  for (const auto& end : ends) {
    TempDir dir;
    const auto ended = run(setting, dir, 7, "", end).files.at(0);
    INFO("ended at batch " << end.batch);
    check_resumed(setting, dir, whole, ended.first, ended.second);
  }
}
