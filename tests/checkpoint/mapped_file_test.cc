#include "lightning/checkpoint/mapped_file.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <catch2/catch.hpp>
#include <functional>
#include <string>
#include <vector>

#include "lightning/errors.h"
#include "lightning/files.h"
#include "tests/support/temp_dir.h"

using Catch::Matchers::Contains;
using namespace lightning;
using lightning::testing::TempDir;

namespace {

constexpr uint64_t kPage = 4096;

// Runs `work` in another process whose stderr goes to the file; gives its status.
int run_apart(const std::string& err, const std::function<void()>& work) {
  const pid_t child = fork();
  if (child == 0) {
    dup2(open(err.c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0666), STDERR_FILENO);
    work();
    _exit(0);
  }
  int status = 0;
  REQUIRE(waitpid(child, &status, 0) == child);
  return status;
}

bool exited_well(int status) { return WIFEXITED(status) && WEXITSTATUS(status) == 0; }

// An address whose touch raises SIGBUS, in no file of ours.
volatile char* beyond_a_file(const std::string& path) {
  write_file(path, "x");
  const int fd = open(path.c_str(), O_RDONLY);
  void* data = mmap(nullptr, 2 * kPage, PROT_READ, MAP_PRIVATE, fd, 0);
  close(fd);
  return static_cast<volatile char*>(data) + kPage;
}

}  // namespace

TEST_CASE("a file is mapped with its bytes, and writing to them leaves the file as it is",
          "[checkpoint]") {
  TempDir dir;
  write_file(dir.path("a"), "some bytes");
  const auto file = MappedFile::open(dir.path("a"));
  CHECK(file->path() == dir.path("a"));
  CHECK(std::string(file->data(), file->data() + file->size()) == "some bytes");
  file->data()[0] = 'S';
  CHECK(file->data()[0] == 'S');
  CHECK(read_file(dir.path("a")) == "some bytes");
  file->check();

  write_file(dir.path("a"), "replaced");  // by renaming: the mapping keeps what it has
  CHECK(file->data()[1] == 'o');
  CHECK_NOTHROW(check_mapped_files());
}

TEST_CASE("an empty file has no bytes", "[checkpoint]") {
  TempDir dir;
  write_file(dir.path("a"), "");
  const auto file = MappedFile::open(dir.path("a"));
  CHECK(file->size() == 0);
  CHECK_NOTHROW(file->check());
}

TEST_CASE("what is no file is refused by its name and the reason", "[checkpoint]") {
  TempDir dir;
  CHECK_THROWS_AS(MappedFile::open(dir.path("no")), CheckpointError);
  CHECK_THROWS_WITH(MappedFile::open(dir.path("no")),
                    Contains(dir.path("no")) && Contains("No such file"));
  CHECK_THROWS_WITH(MappedFile::open(dir.path()), Contains("Is a directory"));
  REQUIRE(mkfifo(dir.path("pipe").c_str(), 0666) == 0);
  CHECK_THROWS_WITH(MappedFile::open(dir.path("pipe")), Contains("a pipe or a device"));
}

TEST_CASE("a file cut short while it is mapped reads as zeros, is named once, and fails check()",
          "[checkpoint]") {
  TempDir dir;
  const auto path = dir.path("cut.ckpt");
  write_file(path, std::string(5 * kPage, 'x'));
  write_file(dir.path("whole"), "whole");
  const int status = run_apart(dir.path("err"), [&] {
    const auto file = MappedFile::open(path);
    const auto whole = MappedFile::open(dir.path("whole"));
    file->data()[3 * kPage] = 'y';
    if (truncate(path.c_str(), kPage + 10) != 0) _exit(2);
    const volatile uint8_t* const data = file->data();
    if (data[0] != 'x' || data[kPage + 9] != 'x' || data[kPage + 10] != 0) _exit(3);
    try {
      file->check();  // whole pages were there so far
    } catch (const CheckpointError&) {
      _exit(4);
    }
    for (uint64_t i = 2 * kPage; i < 5 * kPage; i += 100) {
      if (data[i] != 0) _exit(5);
    }
    file->data()[2 * kPage] = 'z';  // still memory
    whole->check();
    bool named = false;
    try {
      check_mapped_files();
    } catch (const CheckpointError& error) {
      named = Contains(path).match(error.what());
    }
    if (!named) _exit(6);
    try {
      file->check();
    } catch (const CheckpointError& error) {
      _exit(Contains(path).match(error.what()) ? 0 : 7);
    }
    _exit(8);
  });
  CHECK(exited_well(status));
  const auto said = read_file(dir.path("err"));
  CHECK_THAT(said, Contains("lightning: " + path + " was cut short"));
  CHECK(std::count(said.begin(), said.end(), '\n') == 1);
}

TEST_CASE("a place in the table that was free again knows nothing of the file before",
          "[checkpoint]") {
  TempDir dir;
  const auto path = dir.path("a");
  write_file(path, std::string(2 * kPage, 'x'));
  const int status = run_apart(dir.path("err"), [&] {
    auto file = MappedFile::open(path);
    if (truncate(path.c_str(), 1) != 0 || file->data()[kPage] != 0) _exit(2);
    file.reset();
    check_mapped_files();
    write_file(path, "again");
    file = MappedFile::open(path);
    file->check();
  });
  CHECK(exited_well(status));
}

TEST_CASE("SIGBUS from elsewhere ends the program as before", "[checkpoint]") {
  TempDir dir;
  write_file(dir.path("a"), "mapped");
  const int touched = run_apart(dir.path("err"), [&] {
    signal(SIGBUS, SIG_DFL);  // sanitizers have a handler of their own
    const auto file = MappedFile::open(dir.path("a"));
    static_cast<void>(*beyond_a_file(dir.path("b")));
  });
  CHECK(WIFSIGNALED(touched));
  CHECK(WTERMSIG(touched) == SIGBUS);
  const int sent = run_apart(dir.path("err"), [&] {
    signal(SIGBUS, SIG_DFL);
    const auto file = MappedFile::open(dir.path("a"));
    raise(SIGBUS);
  });
  CHECK(WIFSIGNALED(sent));
  CHECK(WTERMSIG(sent) == SIGBUS);
}

TEST_CASE("SIGBUS from elsewhere goes to the handler that was there before", "[checkpoint]") {
  TempDir dir;
  write_file(dir.path("a"), "mapped");
  const int plain = run_apart(dir.path("err"), [&] {
    signal(SIGBUS, [](int number) { _exit(number == SIGBUS ? 42 : 1); });
    const auto file = MappedFile::open(dir.path("a"));
    static_cast<void>(*beyond_a_file(dir.path("b")));
  });
  CHECK(WEXITSTATUS(plain) == 42);
  const int with_address = run_apart(dir.path("err"), [&] {
    static volatile char* address = nullptr;
    struct sigaction action {};
    action.sa_flags = SA_SIGINFO;
    action.sa_sigaction = [](int, siginfo_t* about, void*) {
      _exit(about->si_addr == address ? 43 : 1);
    };
    sigaction(SIGBUS, &action, nullptr);
    const auto file = MappedFile::open(dir.path("a"));
    address = beyond_a_file(dir.path("b"));
    static_cast<void>(*address);
  });
  CHECK(WEXITSTATUS(with_address) == 43);
  const int ignored = run_apart(dir.path("err"), [&] {
    signal(SIGBUS, SIG_IGN);
    const auto file = MappedFile::open(dir.path("a"));
    raise(SIGBUS);
  });
  CHECK(exited_well(ignored));
}

TEST_CASE("more files than the table holds are read instead", "[checkpoint]") {
  TempDir dir;
  std::vector<std::shared_ptr<MappedFile>> files;
  write_file(dir.path("a"), "content");
  for (int i = 0; i < 4200; ++i) files.push_back(MappedFile::open(dir.path("a")));
  for (const auto& file : files) {
    if (std::string(file->data(), file->data() + file->size()) != "content") FAIL("another text");
  }
  files.back()->data()[0] = 'C';
  CHECK(files[0]->data()[0] == 'c');
  CHECK_NOTHROW(files.back()->check());
  files.clear();
  CHECK_NOTHROW(MappedFile::open(dir.path("a"))->check());
}
