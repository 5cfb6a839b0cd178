// A training that saves at every step is killed with SIGKILL at random moments and started again
// from "last", until it comes to its end: bit for bit the end of a run that was left alone.
//
// The program runs itself as the one that is killed ([.victim]). LIGHTNING_KILLS says how often:
// 10 where nothing else is said, 100 in `make test-kill`.
#include <dirent.h>
#include <fcntl.h>
#include <signal.h>
#include <spawn.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <catch2/catch.hpp>
#include <chrono>
#include <random>
#include <thread>

#include "callbacks/model_checkpoint.h"
#include "lightning/checkpoint/async_io.h"
#include "lightning/checkpoint/checkpoint_file.h"
#include "lightning/files.h"
#include "tests/support/learner.h"
#include "tests/support/temp_dir.h"

using namespace lightning;
using namespace lightning::testing;

namespace {

std::string variable(const char* name, const std::string& otherwise) {
  const char* value = std::getenv(name);
  return value == nullptr ? otherwise : value;
}

bool exists(const std::string& path) {
  struct stat found {};
  return ::stat(path.c_str(), &found) == 0;
}

// Ways to train and to save, each with its own number.
constexpr int kSettings = 4;

// Tells the test that training has begun.
struct Marker : Callback {
  explicit Marker(std::string path) : path(std::move(path)) {}
  void on_train_start(Trainer&, LightningModule&) override { write_file(path, ""); }
  std::string path;
};

void train(const std::string& folder, int setting) {
  torch::manual_seed(exists(folder + "/checkpoints") ? ::getpid() : 7);
  auto options = TrainerOptions()
                     .default_root_dir(folder)
                     .max_epochs(3)
                     .accelerator("cpu")
                     .logger(false)
                     .enable_progress_bar(false)
                     .enable_model_summary(false)
                     .accumulate_grad_batches(setting == 1 ? 2 : 1);
  if (setting == 1) options.val_check_interval(3);
  if (setting == 2) options.plugins({Plugin(std::make_shared<AsyncCheckpointIO>())});
  const auto saver = ModelCheckpointOptions()
                         .dirpath(folder + "/checkpoints")
                         .monitor("loss_step")
                         .save_top_k(3)
                         .every_n_train_steps(1)
                         .save_last(SaveLast(true));
  Trainer trainer(options.callbacks(
      {std::make_shared<ModelCheckpoint>(saver), std::make_shared<Marker>(folder + "/started")}));
  const auto loader = [&](int64_t rows, uint64_t seed) {
    return DataLoader(TensorDataset(noise(rows, seed)),
                      DataLoaderOptions().batch_size(4).shuffle(true).num_workers(setting % 2));
  };
  trainer.fit(std::make_shared<Learner>(setting == 3), loader(26, 1), loader(10, 3),
              RunArguments().ckpt_path("last"));
  trainer.save_checkpoint(folder + "/end.ckpt");
}

pid_t start(const std::string& folder, int setting) {
  setenv("LIGHTNING_KILL_FOLDER", folder.c_str(), 1);
  setenv("LIGHTNING_KILL_SETTING", std::to_string(setting).c_str(), 1);
  ::unlink((folder + "/started").c_str());
  const auto log = folder + "/log.txt";
  posix_spawn_file_actions_t files;
  posix_spawn_file_actions_init(&files);
  posix_spawn_file_actions_addopen(&files, 1, log.c_str(), O_WRONLY | O_CREAT | O_APPEND, 0644);
  posix_spawn_file_actions_adddup2(&files, 1, 2);
  char name[] = "/proc/self/exe", tag[] = "[.victim]";
  char* const arguments[] = {name, tag, nullptr};
  pid_t child = 0;
  REQUIRE(::posix_spawn(&child, name, &files, nullptr, arguments, environ) == 0);
  posix_spawn_file_actions_destroy(&files);
  return child;
}

// True when it has ended; `status` is how.
bool ended(pid_t child, int& status) { return ::waitpid(child, &status, WNOHANG) == child; }

void finish(pid_t child, const std::string& folder) {
  int status = 0;
  REQUIRE(::waitpid(child, &status, 0) == child);
  INFO(read_file(folder + "/log.txt"));
  REQUIRE(status == 0);
}

std::vector<std::string> names_in(const std::string& folder) {
  std::vector<std::string> names;
  DIR* open = ::opendir(folder.c_str());
  if (open == nullptr) return names;
  while (const dirent* entry = ::readdir(open)) {
    if (entry->d_name[0] != '.') names.emplace_back(entry->d_name);
  }
  ::closedir(open);
  return names;
}

bool ends_with(const std::string& text, const std::string& end) {
  return text.size() >= end.size() && text.compare(text.size() - end.size(), end.size(), end) == 0;
}

// Which files there were last depends on when the run was killed; what was trained does not.
Leaves trained(const std::string& folder) {
  auto state = read_checkpoint_file(folder + "/end.ckpt");
  state.as_dict().erase("callbacks");
  return leaves_of(state);
}

struct Reference {
  TempDir folder;
  Leaves leaves;
  std::chrono::duration<double> length{};
};

void wait_for_start(pid_t child, const std::string& folder, int& status, bool& over) {
  while (!exists(folder + "/started") && !(over = ended(child, status))) {
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
}

}  // namespace

TEST_CASE("victim", "[.victim]") {
  train(variable("LIGHTNING_KILL_FOLDER", "."), std::stoi(variable("LIGHTNING_KILL_SETTING", "0")));
}

TEST_CASE(
    "a training that is killed at any moment resumes from its last checkpoint and ends the "
    "same, bit for bit",
    "[kill]") {
  const int kills = std::stoi(variable("LIGHTNING_KILLS", "10"));
  std::mt19937 random(std::random_device{}());
  Reference references[kSettings];
  for (int setting = 0; setting < kSettings; ++setting) {
    auto& reference = references[setting];
    const auto folder = reference.folder.path();
    const auto child = start(folder, setting);
    int status = 0;
    bool over = false;
    wait_for_start(child, folder, status, over);
    const auto begin = std::chrono::steady_clock::now();
    REQUIRE_FALSE(over);
    finish(child, folder);
    reference.length = std::chrono::steady_clock::now() - begin;
    reference.leaves = trained(folder);
  }

  for (int kill = 0; kill < kills;) {
    const int setting = kill % kSettings;
    const auto& reference = references[setting];
    TempDir dir;
    const auto folder = dir.path();
    std::string moments;
    // Up to three kills on one run, the later ones on what was resumed.
    for (int i = 0; i < 3 && kill < kills; ++i) {
      const auto child = start(folder, setting);
      int status = 0;
      bool over = false;
      wait_for_start(child, folder, status, over);
      const std::chrono::duration<double> wait =
          reference.length * std::uniform_real_distribution<>(0, 0.6)(random);
      moments += str(" ", wait.count());
      if (!over) std::this_thread::sleep_for(wait);
      ::kill(child, SIGKILL);
      if (!over) ::waitpid(child, &status, 0);
      INFO("killed after" << moments << " s\n" << read_file(folder + "/log.txt"));
      REQUIRE((WIFSIGNALED(status) || status == 0));
      ++kill;
      for (const auto& name : names_in(folder + "/checkpoints")) {
        if (ends_with(name, ".ckpt")) {
          CHECK_NOTHROW(read_checkpoint_file(folder + "/checkpoints/" + name));
        }
      }
    }
    finish(start(folder, setting), folder);
    INFO("setting " << setting << ", killed after" << moments << " s");
    CHECK(differences(reference.leaves, trained(folder)) == "");
    for (const auto& name : names_in(folder + "/checkpoints")) {
      CHECK_FALSE(ends_with(name, ".tmp"));  // what the killed runs left behind
    }
  }
}
