// Which file ckpt_path stands for.
#include <sys/stat.h>
#include <unistd.h>
#include <utime.h>

#include <algorithm>
#include <catch2/catch.hpp>
#include <filesystem>

#include "callbacks/model_checkpoint.h"
#include "lightning/checkpoint/torch_file.h"
#include "lightning/errors.h"
#include "lightning/files.h"
#include "lightning/log.h"
#include "lightning/trainer.h"
#include "tests/support/boring.h"
#include "tests/support/temp_dir.h"

using namespace lightning;
using namespace lightning::testing;
using Catch::Contains;
namespace fs = std::filesystem;

namespace {

struct Lines {
  Lines() {
    set_log_sink([this](const std::string& line) { text += line + "\n"; });
  }
  ~Lines() { set_log_sink(nullptr); }
  std::string text;
};

TrainerOptions saving(const TempDir& dir, ModelCheckpointOptions options) {
  return quiet(dir).enable_checkpointing(true).callbacks(
      {std::make_shared<ModelCheckpoint>(options.dirpath(dir.path()))});
}

// Runs of a folder; the times of files are set apart, since a clock may not tell them.
void train(const TempDir& dir, ModelCheckpointOptions options, int64_t epochs) {
  Trainer(saving(dir, options).max_epochs(epochs)).fit(std::make_shared<BoringModule>());
}
void set_age(const std::string& path, int seconds) {
  struct stat now {};
  REQUIRE(stat(path.c_str(), &now) == 0);
  const utimbuf times{now.st_atime, now.st_mtime - seconds};
  REQUIRE(utime(path.c_str(), &times) == 0);
}

// Where a run with ckpt_path="last" goes on, and what it said.
std::string last_of(const TempDir& dir, std::string& lines) {
  Trainer trainer(saving(dir, ModelCheckpointOptions()).max_epochs(9).max_steps(1));
  const Lines said;
  trainer.fit(std::make_shared<BoringModule>(), RunArguments().ckpt_path("last"));
  lines = said.text;
  return trainer.ckpt_path();
}

}  // namespace

TEST_CASE("the last checkpoint is the newest that can be opened", "[trainer]") {
  const TempDir dir;
  train(dir, ModelCheckpointOptions().save_last(true).save_top_k(0), 1);
  set_age(dir.path("last.ckpt"), 10);
  const auto whole = read_file(dir.path("last.ckpt"));
  write_file(dir.path("last-v1.ckpt"), whole.substr(0, whole.size() / 2));
  write_file(dir.path("last-v2.ckpt"), "");
  REQUIRE(symlink("gone.ckpt", dir.path("last-v3.ckpt").c_str()) == 0);
  std::string lines;
  CHECK(last_of(dir, lines) == dir.path("last.ckpt"));
  CHECK_THAT(lines, Contains("Passed over") && Contains("last-v1.ckpt") &&
                        Contains("last-v2.ckpt") && Contains("last-v3.ckpt (a link to"));
}

TEST_CASE("without a last.ckpt the newest of the others is the last", "[trainer]") {
  const TempDir dir;
  train(dir, ModelCheckpointOptions().save_top_k(-1), 3);
  set_age(dir.path("epoch=0-step=4.ckpt"), 20);
  set_age(dir.path("epoch=1-step=8.ckpt"), 10);
  std::string lines;
  CHECK(last_of(dir, lines) == dir.path("epoch=2-step=12.ckpt"));
  CHECK_THAT(lines, Contains("there is no last.ckpt"));
}

TEST_CASE("a checkpoint that was saved after last.ckpt counts when it stands at a later step",
          "[trainer]") {
  const TempDir dir;
  train(dir, ModelCheckpointOptions().save_last(true).save_top_k(-1), 2);
  fs::copy(dir.path("epoch=0-step=4.ckpt"), dir.path("kept.ckpt"));  // newer, but of a past step
  set_age(dir.path("last.ckpt"), 10);
  std::string lines;
  fs::remove(dir.path("epoch=1-step=8.ckpt"));
  CHECK(last_of(dir, lines) == dir.path("last.ckpt"));

  // As a run leaves it that was killed before it could replace last.ckpt.
  fs::remove(dir.path("last.ckpt"));
  fs::copy(dir.path("epoch=0-step=4.ckpt"), dir.path("last.ckpt"));
  set_age(dir.path("last.ckpt"), 10);
  train(dir, ModelCheckpointOptions().save_top_k(-1).every_n_epochs(2), 2);
  CHECK(last_of(dir, lines) == dir.path("epoch=1-step=8.ckpt"));
  CHECK_THAT(lines, Contains("stands at a later step than"));
}

TEST_CASE("weights alone are no last checkpoint to resume from", "[trainer]") {
  const TempDir dir;
  train(dir, ModelCheckpointOptions().save_weights_only(true), 1);
  std::string lines;
  CHECK(last_of(dir, lines).empty());
  CHECK_THAT(lines, Contains("there is none"));
}

TEST_CASE("what cannot be resumed from is told by what it lacks", "[trainer]") {
  const TempDir dir;
  Trainer first(quiet(dir).max_epochs(1));
  first.fit(std::make_shared<BoringModule>());
  first.save_checkpoint(dir.path("whole.ckpt"));
  const auto without = [&](const std::vector<std::string>& lacking) {
    auto some = State::dict();
    const auto whole = read_torch_file(dir.path("whole.ckpt"));
    for (const auto& [key, value] : whole.as_dict()) {
      if (std::count(lacking.begin(), lacking.end(), to_string(key)) == 0) some[key] = value;
    }
    write_torch_file(some, dir.path("some.ckpt"));
    Trainer(quiet(dir).max_epochs(2))
        .fit(std::make_shared<BoringModule>(), RunArguments().ckpt_path(dir.path("some.ckpt")));
  };
  CHECK_THROWS_WITH(without({"optimizer_states", "lr_schedulers"}),
                    Contains("holds the model only") && Contains("save_weights_only=true"));
  // As a sharded folder without its meta.pt gives it.
  CHECK_THROWS_WITH(without({"lr_schedulers", "loops", "callbacks"}),
                    Contains("not how far the run was") && Contains("meta.pt"));
}

TEST_CASE("hpc is the checkpoint with the highest number, and an error where there is none",
          "[trainer]") {
  const TempDir dir;
  Trainer first(quiet(dir).max_epochs(1));
  CHECK_THROWS_WITH(first.fit(std::make_shared<BoringModule>(), RunArguments().ckpt_path("hpc")),
                    Contains("ckpt_path=\"hpc\"") && Contains("no hpc_ckpt_N.ckpt in"));
  first.fit(std::make_shared<BoringModule>());
  for (const char* number : {"2", "9", "10"}) {
    first.save_checkpoint(dir.path(str("hpc_ckpt_", number, ".ckpt")));
  }
  write_file(dir.path("hpc_ckpt_11.ckpt"), "torn");
  write_file(dir.path("hpc_ckpt_x.ckpt"), "");
  Trainer second(quiet(dir).max_epochs(2));
  second.fit(std::make_shared<BoringModule>(), RunArguments().ckpt_path("hpc"));
  CHECK(second.ckpt_path() == dir.path("hpc_ckpt_10.ckpt"));
  CHECK(second.global_step() == 8);
}

TEST_CASE("what killed runs left half-written is removed when fit starts", "[trainer]") {
  const TempDir dir;
  write_file(dir.path("epoch=0-step=4.ckpt.99999.0.tmp"), "half");
  write_file(dir.path("notes.tmp"), "");
  train(dir, ModelCheckpointOptions(), 1);
  CHECK_FALSE(fs::exists(dir.path("epoch=0-step=4.ckpt.99999.0.tmp")));
  CHECK(fs::exists(dir.path("notes.tmp")));
}
