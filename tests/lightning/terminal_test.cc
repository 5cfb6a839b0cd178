#include "lightning/terminal.h"

#include <fcntl.h>
#include <pty.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include <catch2/catch.hpp>
#include <csignal>
#include <cstdlib>

#include "tests/support/temp_dir.h"

using namespace lightning;

TEST_CASE("width counts columns, not bytes") {
  CHECK(display_width("abc") == 3);
  CHECK(display_width("███▌") == 4);
  CHECK(display_width("学習") == 4);
  CHECK(display_width("e\u0301") == 1);
  CHECK(display_width("🚀") == 2);
  CHECK(display_width("\x1b[1;35mbold\x1b[0m") == 4);
  CHECK(display_width("") == 0);
}

TEST_CASE("trimming cuts between characters and ends what is coloured") {
  CHECK(trim_to_width("███▌", 2) == "██");
  CHECK(trim_to_width("学習", 3) == "学");
  CHECK(trim_to_width("abc", 5) == "abc");
  CHECK(trim_to_width("\x1b[1mabc", 2) == "\x1b[1mab\x1b[0m");
  CHECK(trim_to_width("abc", 0).empty());
}

TEST_CASE("padding fills up to a width and never cuts") {
  CHECK(pad_right("学", 4) == "学  ");
  CHECK(pad_left("7", 3) == "  7");
  CHECK(center("ab", 5) == " ab  ");
  CHECK(pad_right("abcdef", 3) == "abcdef");
}

TEST_CASE("a file is no terminal and has no size of its own") {
  testing::TempDir dir;
  unsetenv("COLUMNS");
  const int fd = open(dir.path("out").c_str(), O_CREAT | O_WRONLY, 0600);
  FileOutput output(fd);
  CHECK_FALSE(output.is_terminal());
  CHECK(output.columns() == 0);
  setenv("COLUMNS", "93", 1);
  CHECK(output.columns() == 93);
  unsetenv("COLUMNS");
  close(fd);
}

TEST_CASE("a terminal's size is that of now") {
  int master = -1, slave = -1;
  winsize size{24, 80, 0, 0};
  REQUIRE(openpty(&master, &slave, nullptr, nullptr, &size) == 0);
  setenv("TERM", "xterm", 1);
  FileOutput output(slave);
  CHECK(output.is_terminal());
  CHECK(output.columns() == 80);
  CHECK(output.rows() == 24);
  size.ws_col = 132;
  REQUIRE(ioctl(master, TIOCSWINSZ, &size) == 0);
  CHECK(output.columns() == 132);
  setenv("TERM", "dumb", 1);
  CHECK_FALSE(output.is_terminal());
  unsetenv("TERM");
  close(slave);
  close(master);
}

TEST_CASE("a reader that is gone does not stop the writer") {
  int ends[2];
  REQUIRE(pipe(ends) == 0);
  close(ends[0]);
  const auto before = std::signal(SIGPIPE, SIG_IGN);
  FileOutput(ends[1]).write("to nobody");
  std::signal(SIGPIPE, before);
  close(ends[1]);
}
