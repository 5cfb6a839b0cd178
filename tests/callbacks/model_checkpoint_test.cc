// What the original saves is compared in parity_test.cc.
#include "callbacks/model_checkpoint.h"

#include <sys/resource.h>
#include <unistd.h>

#include <catch2/catch.hpp>
#include <csignal>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <sstream>
#include <thread>

#include "lightning/checkpoint/async_io.h"
#include "lightning/checkpoint/state.h"
#include "lightning/checkpoint/torch_file.h"
#include "lightning/errors.h"
#include "lightning/files.h"
#include "lightning/log.h"
#include "lightning/registry.h"
#include "lightning/trainer.h"
#include "tests/support/boring.h"
#include "tests/support/memory_logger.h"
#include "tests/support/python.h"
#include "tests/support/temp_dir.h"

using namespace lightning;
using namespace lightning::testing;
using Catch::Contains;
namespace fs = std::filesystem;

namespace {

TrainerOptions saving(const TempDir& dir, std::shared_ptr<ModelCheckpoint> checkpoint) {
  return quiet(dir).enable_checkpointing(true).callbacks({std::move(checkpoint)});
}

// The warnings and infos given while alive.
struct Lines {
  Lines() {
    set_log_sink([this](const std::string& line) { all.push_back(line); });
  }
  ~Lines() { set_log_sink(nullptr); }
  bool has(const std::string& part) const {
    return std::any_of(all.begin(), all.end(), [&](const std::string& line) {
      return line.find(part) != std::string::npos;
    });
  }
  std::vector<std::string> all;
};

}  // namespace

TEST_CASE("checkpoint names are formatted as the original formats them", "[callbacks]") {
  const std::vector<std::string> templates = {"{epoch}",
                                              "{epoch:03d}",
                                              "{epoch}-{val_loss:.2f}",
                                              "{epoch:02d}-{step}",
                                              "{val_loss}",
                                              "{missing:d}",
                                              "{missing}",
                                              "{missing:.3f}",
                                              "{val/acc:.1%}",
                                              "a-{epoch}-{epoch}",
                                              "{epoch_test}-{epoch}",
                                              "{epoch}-{epoch_test:.1f}",
                                              "plain",
                                              "{{epoch}}",
                                              "{step:06,}",
                                              "x={epoch}",
                                              "{val_loss:e}",
                                              "{val.loss:.2f}",
                                              "{epoch:>4}",
                                              "e{epoch",
                                              "{val_loss:d}"};
  std::string ours;
  for (const bool insert : {true, false}) {
    const ModelCheckpoint checkpoint(ModelCheckpointOptions().auto_insert_metric_name(insert));
    for (const auto& name : templates) {
      try {
        ours += checkpoint.format_checkpoint_name({{"epoch", int64_t{7}},
                                                   {"step", int64_t{12345}},
                                                   {"epoch_test", 1.25},
                                                   {"val_loss", 0.123456},
                                                   {"val/acc", 0.5},
                                                   {"val.loss", 3.0}},
                                                  name) +
                "\n";
      } catch (const MisconfigurationError&) {
        ours += "refused\n";
      }
    }
    ours += checkpoint.format_checkpoint_name({}, "last", 3) + "\n";
  }
  CHECK(ours == run_python(R"(
import sys
from lightning.pytorch.callbacks import ModelCheckpoint
for insert in (True, False):
    c = ModelCheckpoint(auto_insert_metric_name=insert)
    for name in sys.argv[1:]:
        metrics = {"epoch": 7, "step": 12345, "epoch_test": 1.25, "val_loss": 0.123456, "val/acc": 0.5,
                   "val.loss": 3.0}
        try:
            # The original puts a tensor where a metric is missing; its number is what it prints.
            print(c.format_checkpoint_name(metrics, name))
        except Exception:
            print("refused")
    print(c.format_checkpoint_name({}, "last", 3))
)",
                           templates));
}

TEST_CASE("the folder of checkpoints comes from the logger, else from the root", "[callbacks]") {
  const TempDir dir;
  auto logged = std::make_shared<ModelCheckpoint>();
  auto logger = std::make_shared<MemoryLogger>();
  Trainer(saving(dir, logged).logger(logger).max_epochs(1)).fit(std::make_shared<BoringModule>());
  CHECK(*logged->dirpath() == dir.path("memory/version_0/checkpoints"));
  CHECK(fs::exists(dir.path("memory/version_0/checkpoints/epoch=0-step=4.ckpt")));
  CHECK(logger->checkpoints == 1);

  auto plain = std::make_shared<ModelCheckpoint>();
  Trainer(saving(dir, plain).max_epochs(1)).fit(std::make_shared<BoringModule>());
  CHECK(plain->best_model_path() == dir.path("checkpoints/epoch=0-step=4.ckpt"));
}

TEST_CASE("a folder that is not empty is told of", "[callbacks]") {
  const TempDir dir;
  write_file(dir.path("old.ckpt"), "");
  const Lines lines;
  auto checkpoint = std::make_shared<ModelCheckpoint>(ModelCheckpointOptions().dirpath(dir.path()));
  Trainer(saving(dir, checkpoint).max_epochs(1)).fit(std::make_shared<BoringModule>());
  CHECK(lines.has("Checkpoint directory " + *checkpoint->dirpath() + " exists and is not empty."));
}

TEST_CASE("checkpoints are saved when the interval has passed", "[callbacks]") {
  const TempDir dir;
  double now = 1000;
  auto module = std::make_shared<BoringModule>();
  module->before_training_step = [&](BoringModule&, int64_t) { now += 4; };
  auto checkpoint =
      std::make_shared<ModelCheckpoint>(ModelCheckpointOptions()
                                            .dirpath(dir.path())
                                            .save_top_k(-1)
                                            .train_time_interval(Duration("00:00:00:10")));
  checkpoint->set_clock([&] { return now; });
  Trainer(saving(dir, checkpoint).max_epochs(2)).fit(module);
  // After 12 and 24 seconds: the third and the sixth step of 8.
  CHECK(fs::exists(dir.path("epoch=0-step=3.ckpt")));
  CHECK(fs::exists(dir.path("epoch=1-step=6.ckpt")));
  CHECK_FALSE(fs::exists(dir.path("epoch=1-step=8.ckpt")));
  CHECK(checkpoint->state_key() ==
        "ModelCheckpoint{'monitor': None, 'mode': 'min', 'every_n_train_steps': 0, "
        "'every_n_epochs': 0, 'train_time_interval': datetime.timedelta(seconds=10)}");
}

TEST_CASE("a resumed run keeps the scores of its folder, and the file it came from",
          "[callbacks]") {
  const TempDir dir;
  const auto options =
      ModelCheckpointOptions().dirpath(dir.path()).monitor("val_loss").save_top_k(2);
  auto module = std::make_shared<BoringModule>();
  module->val_losses = {0.5, 0.7};
  auto first = std::make_shared<ModelCheckpoint>(options);
  Trainer(saving(dir, first).max_epochs(2)).fit(module);
  const auto resumed = dir.path("epoch=1-step=8.ckpt");
  REQUIRE(fs::exists(resumed));

  auto next = std::make_shared<BoringModule>();
  next->val_losses = {0.6, 0.4};
  auto second = std::make_shared<ModelCheckpoint>(options);
  Trainer(saving(dir, second).max_epochs(4)).fit(next, {}, {}, RunArguments().ckpt_path(resumed));
  REQUIRE(second->best_k_models().size() == 2);
  CHECK(second->best_model_path() == dir.path("epoch=3-step=16.ckpt"));
  CHECK(second->best_k_models()[0].first == dir.path("epoch=0-step=4.ckpt"));
  CHECK(fs::exists(resumed));  // 0.7 is out of the best, but the run stands on it
  CHECK_FALSE(fs::exists(dir.path("epoch=2-step=12.ckpt")));
}

TEST_CASE("a resumed run with another folder takes the best path only", "[callbacks]") {
  const TempDir dir;
  ModelCheckpoint before(ModelCheckpointOptions().dirpath(dir.path("a")).monitor("x"));
  State state = before.state_dict();
  std::vector<std::string> keys;
  for (const auto& item : state.as_dict()) keys.push_back(std::get<std::string>(item.first));
  CHECK(keys == std::vector<std::string>{"monitor", "best_model_score", "best_model_path",
                                         "current_score", "dirpath", "best_k_models",
                                         "kth_best_model_path", "kth_value", "last_model_path"});
  CHECK(state.at("best_model_score").is_none());
  CHECK(state.at("kth_value").as_tensor().scalar_type() == at::kFloat);
  state["best_model_path"] = "somewhere.ckpt";
  state["last_model_path"] = "last.ckpt";

  const Lines lines;
  ModelCheckpoint after(ModelCheckpointOptions().dirpath(dir.path("b")).monitor("x"));
  after.load_state_dict(state);
  CHECK(after.best_model_path() == "somewhere.ckpt");
  CHECK(after.last_model_path().empty());
  CHECK(lines.has("The dirpath has changed"));

  ModelCheckpoint same(ModelCheckpointOptions().dirpath(dir.path("a")).monitor("x"));
  same.load_state_dict(state);
  CHECK(same.last_model_path() == "last.ckpt");
}

TEST_CASE("the scores of the best go to YAML as PyYAML reads them", "[callbacks]") {
  const TempDir dir;
  auto module = std::make_shared<BoringModule>();
  module->val_losses = {1.0, 0.25};
  auto checkpoint = std::make_shared<ModelCheckpoint>(ModelCheckpointOptions()
                                                          .dirpath(dir.path())
                                                          .monitor("val_loss")
                                                          .save_top_k(2)
                                                          .filename("{epoch}"));
  Trainer(saving(dir, checkpoint).max_epochs(2)).fit(module);
  checkpoint->to_yaml();
  CHECK(run_python(R"(
import os, sys, yaml
scores = yaml.safe_load(open(sys.argv[1]))
print({os.path.basename(k): v for k, v in scores.items()})
)",
                   {dir.path("best_k_models.yaml")}) ==
        "{'epoch=0.ckpt': 1.0, 'epoch=1.ckpt': 0.25}\n");
}

TEST_CASE("a verbose checkpoint tells what it saves and what not", "[callbacks]") {
  const TempDir dir;
  auto module = std::make_shared<BoringModule>();
  module->val_losses = {0.5, 0.75};
  const Lines lines;
  auto checkpoint = std::make_shared<ModelCheckpoint>(
      ModelCheckpointOptions().dirpath(dir.path()).monitor("val_loss").verbose(true));
  Trainer(saving(dir, checkpoint).max_epochs(2)).fit(module);
  CHECK(
      lines.has("Epoch 0, global step 4: 'val_loss' reached 0.50000 (best 0.50000), saving model "
                "to '" +
                dir.path("epoch=0-step=4.ckpt") + "' as top 1"));
  CHECK(lines.has("Epoch 1, global step 8: 'val_loss' was not in top 1"));
}

TEST_CASE("the newest of the last checkpoints is found", "[callbacks]") {
  const TempDir dir;
  for (const std::string name : {"last.ckpt", "last-v1.ckpt", "best.ckpt", "last.txt"}) {
    write_file(dir.path(name), "");
  }
  auto checkpoint = std::make_shared<ModelCheckpoint>(ModelCheckpointOptions().dirpath(dir.path()));
  Trainer trainer(saving(dir, checkpoint));
  CHECK(checkpoint->last_checkpoints(trainer) ==
        std::set<std::string>{dir.path("last-v1.ckpt"), dir.path("last.ckpt")});
}

TEST_CASE("a checkpoint callback refuses options that make no sense", "[callbacks]") {
  using Options = ModelCheckpointOptions;
  const auto make = [](const Options& options) { ModelCheckpoint made(options); };
  CHECK_THROWS_WITH(make(Options().mode("mix")), Contains("got mode \"mix\""));
  CHECK_THROWS_WITH(make(Options().save_top_k(-2)), Contains("got save_top_k -2"));
  CHECK_THROWS_WITH(make(Options().save_top_k(3)), Contains("save_top_k 3 without monitor"));
  CHECK_THROWS_WITH(make(Options().every_n_epochs(-1)), Contains("got every_n_epochs -1"));
  CHECK_THROWS_WITH(make(Options().every_n_train_steps(-1)),
                    Contains("got every_n_train_steps -1"));
  CHECK_THROWS_WITH(make(Options().every_n_train_steps(2).every_n_epochs(1)),
                    Contains("expected one of them"));
  CHECK_THROWS_WITH(make(Options().save_last(SaveLast(std::string("copy")))),
                    Contains("got save_last \"copy\""));
  CHECK_THROWS_WITH(make(Options().dirpath("s3://bucket/run")), Contains("s3://bucket/run"));
  CHECK_THROWS_WITH(make(Options().train_time_interval(Duration("10"))),
                    Contains("ModelCheckpoint got train_time_interval \"10\""));
  CHECK_NOTHROW(make(Options().every_n_train_steps(2).every_n_epochs(0)));
}

TEST_CASE("a checkpoint callback is made by its name from options", "[callbacks]") {
  const auto made = registry<Callback>().make(
      "ModelCheckpoint",
      Json{{"save_last", "link"}, {"train_time_interval", Json{{"minutes", 5}}}});
  const auto& checkpoint = dynamic_cast<ModelCheckpoint&>(*made);
  CHECK(*checkpoint.options().save_last() == SaveLast(std::string("link")));
  CHECK(checkpoint.every_n_epochs() == 0);
  CHECK(checkpoint.role() == CallbackRole::kCheckpoint);
}

namespace {

// Files may not grow beyond so many bytes while it is alive: what a full disk is like.
class FullDisk {
 public:
  explicit FullDisk(rlim_t bytes) {
    std::signal(SIGXFSZ, SIG_IGN);
    getrlimit(RLIMIT_FSIZE, &before_);
    const rlimit little{bytes, before_.rlim_max};
    setrlimit(RLIMIT_FSIZE, &little);
  }
  ~FullDisk() { setrlimit(RLIMIT_FSIZE, &before_); }
  FullDisk(const FullDisk&) = delete;
  FullDisk& operator=(const FullDisk&) = delete;

 private:
  rlimit before_{};
};

std::vector<std::string> names_in(const TempDir& dir) {
  std::vector<std::string> names;
  for (const auto& entry : fs::directory_iterator(dir.path())) {
    names.push_back(entry.path().filename().string());
  }
  std::sort(names.begin(), names.end());
  return names;
}

}  // namespace

TEST_CASE("a save that fails leaves the files and what is known of them, and can be tried again",
          "[callbacks]") {
  const TempDir dir;
  const bool background = GENERATE(false, true);
  const bool monitored = GENERATE(false, true);
  const bool linked = GENERATE(false, true);
  CAPTURE(background, monitored, linked);
  auto options = ModelCheckpointOptions()
                     .dirpath(dir.path())
                     .save_last(linked ? SaveLast(std::string("link")) : SaveLast(true));
  if (monitored) options.monitor("val_loss");
  auto checkpoint = std::make_shared<ModelCheckpoint>(options);
  auto module = std::make_shared<BoringModule>();
  module->val_losses = {3, 2, 1, 0.5};
  std::optional<FullDisk> full;
  module->before_training_step = [&](BoringModule& of, int64_t) {
    if (of.global_step() != 5) return;
    while (!fs::exists(dir.path("last.ckpt"))) std::this_thread::yield();
    full.emplace(256);
  };
  auto trainer_options = saving(dir, checkpoint).max_epochs(2);
  if (background) trainer_options.plugins({std::make_shared<AsyncCheckpointIO>()});
  Trainer trainer(trainer_options);
  CHECK_THROWS_AS(trainer.fit(module), CheckpointError);
  full.reset();
  const auto first = dir.path("epoch=0-step=4.ckpt");
  CHECK(names_in(dir) == std::vector<std::string>{"epoch=0-step=4.ckpt", "last.ckpt"});
  CHECK(checkpoint->best_model_path() == first);
  CHECK(checkpoint->last_model_path() == dir.path("last.ckpt"));
  CHECK(checkpoint->best_k_models().size() == (monitored ? 1 : 0));
  CHECK(checkpoint->kth_best_model_path() == (monitored ? first : ""));
  CHECK_NOTHROW(read_torch_file(first));
  CHECK_NOTHROW(read_torch_file(dir.path("last.ckpt")));

  // What was trained meanwhile is not lost either.
  trainer.save_checkpoint(dir.path("rescue.ckpt"));
  trainer.strategy().checkpoint_io().teardown();
  CHECK(read_torch_file(dir.path("rescue.ckpt")).at("global_step").as_int() == 8);
}

TEST_CASE("an error of a full disk names the file and the bytes", "[callbacks]") {
  const TempDir dir;
  const FullDisk full(256);
  Trainer trainer(saving(dir, std::make_shared<ModelCheckpoint>()).max_epochs(1));
  CHECK_THROWS_WITH(trainer.fit(std::make_shared<BoringModule>()),
                    Contains("checkpoints/epoch=0-step=4.ckpt") && Contains(" bytes"));
}

TEST_CASE("a run that SIGTERM ends saves its state, and goes on from there", "[callbacks]") {
  std::signal(SIGTERM, SIG_DFL);  // without Catch's handler, which ours would call
  const TempDir dir;
  const bool background = GENERATE(false, true);
  const std::string name = GENERATE("latest", "monitored", "last only", "linked");
  CAPTURE(background, name);
  auto options = ModelCheckpointOptions().dirpath(dir.path());
  if (name == "monitored") options.monitor("val_loss");
  if (name == "last only") options.save_top_k(0).save_last(true);
  if (name == "linked") options.save_last(SaveLast(std::string("link")));
  auto trainer_options = [&] {
    auto made = saving(dir, std::make_shared<ModelCheckpoint>(options)).max_epochs(3);
    if (background) made.plugins({std::make_shared<AsyncCheckpointIO>()});
    return made;
  };
  auto module = std::make_shared<BoringModule>();
  module->val_losses = {3, 2, 1};
  module->before_training_step = [](BoringModule& of, int64_t) {
    if (of.global_step() == 5) std::raise(SIGTERM);
  };
  Trainer first(trainer_options());
  CHECK_THROWS_AS(first.fit(module), SIGTERMException);
  const auto saved = dir.path(name == "last only" ? "last.ckpt" : "epoch=1-step=6.ckpt");
  CHECK(fs::exists(saved));
  CHECK(fs::exists(dir.path("epoch=0-step=4.ckpt")) == (name == "monitored"));
  if (name == "linked") CHECK(fs::read_symlink(dir.path("last.ckpt")) == "epoch=1-step=6.ckpt");

  std::vector<int64_t> steps;
  auto resumed = std::make_shared<BoringModule>();
  resumed->before_training_step = [&](BoringModule& of, int64_t) {
    steps.push_back(of.global_step());
  };
  Trainer second(trainer_options());
  second.fit(resumed, RunArguments().ckpt_path("last"));
  REQUIRE(!steps.empty());
  CHECK(steps.front() == 6);
  CHECK(steps.size() == 6);
}

TEST_CASE("SIGTERM saves once for all callbacks, and not what was saved already", "[callbacks]") {
  std::signal(SIGTERM, SIG_DFL);
  const TempDir dir;
  const auto add = [&](const char* folder, int64_t steps) {
    return std::make_shared<ModelCheckpoint>(ModelCheckpointOptions()
                                                 .dirpath(dir.path(folder))
                                                 .save_top_k(-1)
                                                 .every_n_train_steps(steps));
  };
  auto module = std::make_shared<BoringModule>();
  module->before_training_step = [](BoringModule& of, int64_t) {
    if (of.global_step() == 1) std::raise(SIGTERM);
  };
  const auto run = [&](std::vector<Part<Callback>> callbacks) {
    Trainer trainer(quiet(dir).enable_checkpointing(true).callbacks(callbacks).max_epochs(1));
    CHECK_THROWS_AS(trainer.fit(module), SIGTERMException);
  };
  run({add("a", 100), add("b", 50)});
  CHECK(fs::exists(dir.path("a/epoch=0-step=2.ckpt")));
  CHECK_FALSE(fs::exists(dir.path("b")));
  run({add("c", 2)});
  CHECK(fs::exists(dir.path("c/epoch=0-step=2.ckpt")));
  CHECK(std::distance(fs::directory_iterator(dir.path("c")), {}) == 1);
}

TEST_CASE("a checkpoint that is due before a validation waits for its metric", "[callbacks]") {
  const TempDir dir;
  const bool waits = GENERATE(true, false);
  auto module = std::make_shared<BoringModule>();
  module->val_losses = {4, 3, 2, 1};
  auto checkpoint = std::make_shared<ModelCheckpoint>(ModelCheckpointOptions()
                                                          .dirpath(dir.path())
                                                          .monitor("val_loss")
                                                          .every_n_train_steps(2)
                                                          .save_top_k(-1)
                                                          .wait_for_validation(waits));
  Trainer(saving(dir, checkpoint).max_epochs(2).val_check_interval(0.5)).fit(module);
  std::vector<double> scores;
  for (const auto& model : checkpoint->best_k_models()) scores.push_back(model.second);
  // At steps 2, 4, 6 and 8; the original takes the metric of step 4 for that of step 6.
  CHECK(scores == (waits ? std::vector<double>{4, 3, 2, 1} : std::vector<double>{4, 3, 3, 1}));
}

TEST_CASE("a checkpoint at an epoch's last step has the metric of that epoch", "[callbacks]") {
  const TempDir dir;
  auto module = std::make_shared<BoringModule>();
  module->val_losses = {4, 3};
  auto checkpoint = std::make_shared<ModelCheckpoint>(ModelCheckpointOptions()
                                                          .dirpath(dir.path())
                                                          .monitor("val_loss")
                                                          .every_n_train_steps(4)
                                                          .save_top_k(-1));
  Trainer(saving(dir, checkpoint).max_epochs(2)).fit(module);
  CHECK(checkpoint->best_k_models() ==
        ModelCheckpoint::Scores{{dir.path("epoch=0-step=4.ckpt"), 4},
                                {dir.path("epoch=1-step=8.ckpt"), 3}});
}

TEST_CASE("saving in the background leaves the files that saving at once leaves", "[callbacks]") {
  const auto files = [](bool background, const ModelCheckpointOptions& options) {
    const TempDir dir;
    auto module = std::make_shared<BoringModule>();
    module->val_losses = {5, 4, 6, 3, 2};
    auto made = options;
    auto checkpoint = std::make_shared<ModelCheckpoint>(made.dirpath(dir.path()));
    auto trainer_options = saving(dir, checkpoint).max_epochs(5);
    if (background) trainer_options.plugins({std::make_shared<AsyncCheckpointIO>()});
    Trainer(trainer_options).fit(module);
    std::string all = join(names_in(dir)) + "; best " +
                      fs::path(checkpoint->best_model_path()).filename().string();
    for (const auto& model : checkpoint->best_k_models()) all += str(" ", model.second);
    return all;
  };
  using Options = ModelCheckpointOptions;
  for (const auto& options :
       {Options(), Options().monitor("val_loss").save_top_k(2).filename("best"),
        Options().save_last(true).every_n_train_steps(1).filename("{epoch}"),
        Options().save_last(SaveLast(std::string("link"))).save_top_k(-1),
        Options().save_top_k(-1).filename("same")}) {
    CHECK(files(true, options) == files(false, options));
  }
}
