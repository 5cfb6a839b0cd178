// What a save of a sharded checkpoint leaves behind when its process is killed.
#include "lightning/checkpoint/unfinished_folder.h"

#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <catch2/catch.hpp>
#include <filesystem>

#include "callbacks/model_checkpoint.h"
#include "lightning/files.h"
#include "lightning/trainer.h"
#include "tests/support/boring.h"
#include "tests/support/temp_dir.h"

using namespace lightning;
using namespace lightning::testing;
namespace fs = std::filesystem;

namespace {

// As a process that was killed leaves it.
void leave(const std::string& path, const std::string& file = "__0_0.distcp") {
  fs::create_directories(unfinished_folder(path));
  write_file(unfinished_folder(path) + "/" + file, "part");
}

}  // namespace

TEST_CASE("folders that killed saves left are removed, others stay", "[checkpoint]") {
  TempDir dir;
  leave(dir.path("last.ckpt"));
  leave(dir.path("epoch=3.ckpt"), "meta.pt.17.0.tmp");
  leave(dir.path("notes"), "thoughts.txt");
  fs::create_directories(dir.path("whole.ckpt"));
  write_file(dir.path("whole.ckpt/__0_0.distcp"), "part");
  CHECK(remove_unfinished_folders(dir.path()) == 2);
  CHECK(!fs::exists(dir.path("last.ckpt.unfinished")));
  CHECK(!fs::exists(dir.path("epoch=3.ckpt.unfinished")));
  CHECK(fs::exists(dir.path("notes.unfinished/thoughts.txt")));
  CHECK(fs::exists(dir.path("whole.ckpt/__0_0.distcp")));
  CHECK(remove_unfinished_folders(dir.path()) == 0);
  CHECK(remove_unfinished_folders(dir.path("no_folder")) == 0);
}

TEST_CASE("a folder that a process writes stays until that ends", "[checkpoint]") {
  TempDir dir;
  const auto path = unfinished_folder(dir.path("last.ckpt"));
  int ready[2];
  REQUIRE(::pipe(ready) == 0);
  const pid_t pid = ::fork();
  if (pid == 0) {
    const Scope held = hold_folder(path);
    write_file(path + "/__0_0.distcp", "part");
    if (::write(ready[1], "x", 1) != 1) ::_exit(1);
    while (true) ::pause();
  }
  char word = 0;
  REQUIRE(::read(ready[0], &word, 1) == 1);
  CHECK(remove_unfinished_folders(dir.path()) == 0);
  CHECK(fs::exists(path + "/__0_0.distcp"));
  ::kill(pid, SIGKILL);
  ::waitpid(pid, nullptr, 0);
  CHECK(remove_unfinished_folders(dir.path()) == 1);
  CHECK(!fs::exists(path));
  ::close(ready[0]);
  ::close(ready[1]);
}

TEST_CASE("fit with a ModelCheckpoint removes what killed saves left in its folder",
          "[checkpoint]") {
  TempDir dir;
  leave(dir.path("last.ckpt"));
  Trainer trainer(quiet(dir).max_epochs(1).enable_checkpointing(true).callbacks(
      {std::make_shared<ModelCheckpoint>(ModelCheckpointOptions().dirpath(dir.path()))}));
  trainer.validate(std::make_shared<BoringModule>());
  CHECK(fs::exists(dir.path("last.ckpt.unfinished")));
  trainer.fit(std::make_shared<BoringModule>());
  CHECK(!fs::exists(dir.path("last.ckpt.unfinished")));
}
