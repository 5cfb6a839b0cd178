#include "lightning/checkpoint/atomic_file.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <catch2/catch.hpp>
#include <filesystem>
#include <thread>
#include <vector>

#include "lightning/errors.h"
#include "lightning/files.h"
#include "tests/support/temp_dir.h"

using Catch::Matchers::Contains;
using namespace lightning;
using lightning::testing::TempDir;

namespace {

int64_t files_in(const std::string& folder) {
  return std::distance(std::filesystem::directory_iterator(folder), {});
}

// A process that is killed while it writes `path`.
void leave_unfinished(const std::string& path) {
  const pid_t child = fork();
  if (child == 0) {
    AtomicFile file(path, 100);
    file.write("half", 4);
    kill(getpid(), SIGKILL);
  }
  int status = 0;
  REQUIRE(waitpid(child, &status, 0) == child);
  REQUIRE(WIFSIGNALED(status));
}

}  // namespace

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
  CHECK(files_in(dir.path()) == 1);
}

TEST_CASE("what goes through the page cache is there when the file is committed", "[checkpoint]") {
  TempDir dir;
  const std::string text(20 << 20, 'x');
  AtomicFile file(dir.path("a"), text.size(), AtomicFile::Cache::kThrough);
  CHECK_FALSE(file.is_direct());
  for (size_t at = 0; at < text.size(); at += 4 << 20) {
    file.write_at(at, text.data() + at, 4 << 20);
  }
  file.commit();

  const int fd = ::open(dir.path("a").c_str(), O_RDONLY | O_CLOEXEC);
  void* const mapped = ::mmap(nullptr, text.size(), PROT_READ, MAP_PRIVATE, fd, 0);
  std::vector<unsigned char> pages(text.size() / static_cast<size_t>(::sysconf(_SC_PAGESIZE)));
  REQUIRE(::mincore(mapped, text.size(), pages.data()) == 0);
  CHECK(std::count_if(pages.begin(), pages.end(), [](auto page) { return page % 2 == 1; }) > 0);
  ::munmap(mapped, text.size());
  ::close(fd);
  CHECK((read_file(dir.path("a")) == text));
}

TEST_CASE("a process killed while it writes leaves the earlier file, and the next write works",
          "[checkpoint]") {
  TempDir dir;
  const auto path = dir.path("a");
  write_file(path, "earlier");
  leave_unfinished(path);
  CHECK(read_file(path) == "earlier");

  AtomicFile file(path, 5);
  file.write("later", 5);
  file.commit();
  CHECK(read_file(path) == "later");
}

TEST_CASE("several threads write anywhere in a file, and what is left out is zeros",
          "[checkpoint]") {
  TempDir dir;
  AtomicFile file(dir.path("a"), 4 * 1000 + 3);
  std::vector<std::thread> threads;
  for (int i = 3; i >= 0; --i) {
    threads.emplace_back([&file, i] {
      const std::string text(1000, static_cast<char>('0' + i));
      for (uint64_t at = 0; at < 1000; at += 100) file.write_at(i * 1000 + at, &text[at], 100);
    });
  }
  for (auto& thread : threads) thread.join();
  CHECK_THROWS_AS(file.write_at(4000, "four", 4), std::logic_error);
  CHECK_THROWS_AS(file.write_at(~uint64_t{0}, "four", 4), std::logic_error);
  file.commit();
  const std::string expected = std::string(1000, '0') + std::string(1000, '1') +
                               std::string(1000, '2') + std::string(1000, '3') +
                               std::string(3, '\0');
  CHECK((read_file(dir.path("a")) == expected));
}

TEST_CASE("what a killed process left is removed, what is being written stays", "[checkpoint]") {
  TempDir dir;
  leave_unfinished(dir.path("last.ckpt"));
  leave_unfinished(dir.path("epoch=3.ckpt"));
  for (const char* other :
       {"last.ckpt", "a.tmp", "a.1.tmp", ".1.2.tmp", "a.1.x.tmp", "a.1.2.tmp.b"}) {
    write_file(dir.path(other), "of the user");
  }
  AtomicFile file(dir.path("now.ckpt"), 3);
  file.write("new", 3);
  REQUIRE(files_in(dir.path()) == 9);

  CHECK(AtomicFile::remove_unfinished(dir.path()) == 2);
  CHECK(AtomicFile::remove_unfinished(dir.path()) == 0);
  CHECK(files_in(dir.path()) == 7);
  file.commit();
  CHECK(read_file(dir.path("now.ckpt")) == "new");
  CHECK(files_in(dir.path()) == 7);
  CHECK(AtomicFile::remove_unfinished(dir.path("no_folder")) == 0);
  CHECK_THROWS_WITH(AtomicFile::remove_unfinished(dir.path("a.tmp")), Contains("Not a directory"));
}

TEST_CASE("saves go on while another process removes what is unfinished", "[checkpoint]") {
  TempDir dir;
  const pid_t child = fork();
  if (child == 0) {
    for (;;) AtomicFile::remove_unfinished(dir.path());
  }
  for (int i = 0; i < 60; ++i) {
    AtomicFile file(dir.path("a"), 3);
    file.write("new", 3);
    file.commit();
  }
  kill(child, SIGKILL);
  waitpid(child, nullptr, 0);
  CHECK(read_file(dir.path("a")) == "new");
  CHECK(files_in(dir.path()) == 1);
}
