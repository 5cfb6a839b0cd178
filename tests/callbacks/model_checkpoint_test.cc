// What the original saves is compared in parity_test.cc.
#include "callbacks/model_checkpoint.h"

#include <catch2/catch.hpp>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <sstream>

#include "lightning/checkpoint/state.h"
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
