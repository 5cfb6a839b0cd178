#include "lightning/style.h"

#include <catch2/catch.hpp>
#include <cstdlib>

#include "lightning/errors.h"

using namespace lightning;
using Catch::Contains;

namespace {

std::string painted(const std::string& style, ColorSystem colors) {
  return Style::parse(style, "theme.x").paint("hi", colors);
}

}  // namespace

TEST_CASE("styles are written as rich writes them") {
  const auto truecolor = ColorSystem::kTruecolor;
  CHECK(painted("bold magenta", truecolor) == "\x1b[1;35mhi\x1b[0m");
  CHECK(painted("#6206E0", truecolor) == "\x1b[38;2;98;6;224mhi\x1b[0m");
  CHECK(painted("rgb(1,2,3) on grey23", truecolor) == "\x1b[38;2;1;2;3;48;5;237mhi\x1b[0m");
  CHECK(painted("dim underline", truecolor) == "\x1b[2;4mhi\x1b[0m");
  CHECK(painted("bright_red on color(54)", truecolor) == "\x1b[91;48;5;54mhi\x1b[0m");
  CHECK(painted("", truecolor) == "hi");
  CHECK(painted("none", truecolor) == "hi");
}

TEST_CASE("colours that a terminal lacks become the nearest it has") {
  CHECK(painted("#6206E0", ColorSystem::kEightBit) == "\x1b[38;5;56mhi\x1b[0m");
  CHECK(painted("#ff0000", ColorSystem::kStandard) == "\x1b[91mhi\x1b[0m");
  CHECK(painted("#6206E0", ColorSystem::kNone) == "hi");
}

TEST_CASE("a word that is no style is named, with its nearest match") {
  CHECK_THROWS_WITH(painted("bold magneta", ColorSystem::kNone),
                    Contains("theme.x got the style \"bold magneta\"") && Contains("\"magneta\"") &&
                        Contains("Did you mean \"magenta\"?"));
  CHECK_THROWS_AS(painted("#12", ColorSystem::kNone), MisconfigurationError);
  CHECK_THROWS_AS(painted("color(256)", ColorSystem::kNone), MisconfigurationError);
}

TEST_CASE("the environment tells how many colours there are") {
  setenv("TERM", "xterm-256color", 1);
  unsetenv("COLORTERM");
  unsetenv("NO_COLOR");
  CHECK(terminal_colors() == ColorSystem::kEightBit);
  setenv("COLORTERM", "truecolor", 1);
  CHECK(terminal_colors() == ColorSystem::kTruecolor);
  setenv("NO_COLOR", "1", 1);
  CHECK(terminal_colors() == ColorSystem::kNone);
  unsetenv("NO_COLOR");
  unsetenv("COLORTERM");
  setenv("TERM", "xterm", 1);
  CHECK(terminal_colors() == ColorSystem::kStandard);
}
