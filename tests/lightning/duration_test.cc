#include "lightning/duration.h"

#include <catch2/catch.hpp>
#include <sstream>

#include "lightning/errors.h"
#include "tests/support/python.h"

using namespace lightning;
using Catch::Contains;

namespace {

const std::vector<std::string> kTexts = {
    "00:00:00:00", "00:00:00:01",    "00:12:00:00",  "01:02:03:04",  "123:00:00:00", "1:00:00:00",
    "00:99:99:99", "  00:00:01:00 ", "00:00:00:60",  "1:30",         "00:1:00:00",   "00:00:00",
    "a:00:00:00",  "00:00:00:0",     "00:00:00:000", "00:00:00:00:", "-1:00:00:00",  "",
    "00:00 :00:00"};

// Seconds, or "refused" where it is an error.
std::string parsed(const std::string& text) {
  try {
    return str(parse_duration(text, "Timer.duration").count());
  } catch (const MisconfigurationError&) {
    return "refused";
  }
}

}  // namespace

TEST_CASE("durations are read, and refused, as the original's Timer does", "[duration]") {
  const std::string printed = testing::run_python(R"(
import sys
from lightning.pytorch.callbacks import Timer
for text in sys.argv[1:]:
    try:
        print(f"{Timer(duration=text)._duration:g}")
    except Exception as e:
        print("refused")
)",
                                                  kTexts);
  std::istringstream lines(printed);
  for (const auto& text : kTexts) {
    std::string expected;
    REQUIRE(std::getline(lines, expected));
    CAPTURE(text);
    CHECK(parsed(text) == expected);
  }
}

TEST_CASE("a duration in another format says what to write", "[duration]") {
  const auto parse = [](const char* text) { parse_duration(text, "Timer.duration"); };
  CHECK_THROWS_WITH(parse("1:30"),
                    "Timer got duration \"1:30\", expected DD:HH:MM:SS. For an hour and a half "
                    "write \"00:01:30:00\".");
  CHECK_THROWS_WITH(parse("1:30:00"), Contains("Did you mean \"00:01:30:00\"?"));
  CHECK_THROWS_WITH(parse("1:2:3:4"), Contains("Did you mean \"01:02:03:04\"?"));
  CHECK_THROWS_WITH(parse_duration(std::string("soon"), "Trainer.max_time"),
                    Contains("Trainer got max_time \"soon\", expected DD:HH:MM:SS"));
}

TEST_CASE("a duration may be a map of units, as for Python's timedelta", "[duration]") {
  using Units = std::map<std::string, int64_t>;
  const auto seconds = [](const Units& units) {
    return parse_duration(units, "Timer.duration").count();
  };
  CHECK(seconds({{"weeks", 1}, {"days", 2}}) == 9 * 86400);
  CHECK(seconds({{"hours", 1}, {"minutes", -30}}) == 1800);
  CHECK(seconds({{"milliseconds", 250}, {"microseconds", 1}}) == Approx(0.250001));
  CHECK(seconds({}) == 0);
  CHECK_THROWS_WITH(seconds({{"minute", 3}}),
                    Contains("the unit \"minute\"") && Contains("Did you mean \"minutes\"?"));
  CHECK_THROWS_WITH(seconds({{"hours", -1}}), Contains("-3600 seconds"));
  CHECK(parse_duration(Duration(Units{{"days", 1}}), "x").count() == 86400);
  CHECK(parse_duration(Duration("00:00:00:05"), "x").count() == 5);
}

TEST_CASE("durations print as Python's timedelta prints", "[duration]") {
  const std::vector<std::pair<double, std::string>> microseconds = {{0, "0"},
                                                                    {5, "5000000"},
                                                                    {5400, "5400000000"},
                                                                    {86405.25, "86405250000"},
                                                                    {172800, "172800000000"},
                                                                    {0.000001, "1"}};
  std::vector<std::string> arguments;
  std::string ours;
  for (const auto& [seconds, text] : microseconds) {
    arguments.push_back(text);
    ours += format_duration(Seconds(seconds)) + "|" + python_timedelta(Seconds(seconds)) + "\n";
  }
  CHECK(ours == testing::run_python(R"(
import sys
from datetime import timedelta
for text in sys.argv[1:]:
    d = timedelta(microseconds=int(text))
    print(f"{d}|{d!r}")
)",
                                    arguments));
}
