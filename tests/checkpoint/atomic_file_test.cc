#include "lightning/checkpoint/atomic_file.h"

#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <catch2/catch.hpp>
#include <filesystem>

#include "lightning/files.h"
#include "tests/support/temp_dir.h"

using namespace lightning;
using lightning::testing::TempDir;

TEST_CASE("a file appears with its content when it is committed, and not before", "[checkpoint]") {
  TempDir dir;
  const auto path = dir.path("a");
  {
    AtomicFile file(path, 6);
    file.write("abc", 3);
    file.write("def", 3);
    CHECK_FALSE(std::filesystem::exists(path));
    file.commit();
    CHECK(read_file(path) == "abcdef");
  }
  { AtomicFile(path, 3).write("xyz", 3); }
  CHECK(read_file(path) == "abcdef");
  CHECK(std::distance(std::filesystem::directory_iterator(dir.path()), {}) == 1);
}

TEST_CASE("a process killed while it writes leaves the earlier file, and the next write works",
          "[checkpoint]") {
  TempDir dir;
  const auto path = dir.path("a");
  write_file(path, "earlier");
  const pid_t child = fork();
  if (child == 0) {
    AtomicFile file(path, 100);
    file.write("half", 4);
    kill(getpid(), SIGKILL);
  }
  int status = 0;
  REQUIRE(waitpid(child, &status, 0) == child);
  REQUIRE(WIFSIGNALED(status));
  CHECK(read_file(path) == "earlier");

  AtomicFile file(path, 5);
  file.write("later", 5);
  file.commit();
  CHECK(read_file(path) == "later");
}
