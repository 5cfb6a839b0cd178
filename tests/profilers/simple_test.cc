#include "lightning/profilers/simple.h"

#include <catch2/catch.hpp>
#include <fstream>
#include <sstream>
#include <thread>

#include "lightning/log.h"
#include "lightning/registry.h"
#include "tests/support/python.h"
#include "tests/support/temp_dir.h"

namespace lightning {
namespace {

using Catch::Contains;
using Catch::StartsWith;
using testing::TempDir;

void record(Profiler& profiler, const std::string& action, int calls = 1) {
  for (int i = 0; i < calls; ++i) ProfileScope scope(&profiler, [&] { return action; });
}

// Numbers become "#" and what fills their column is cut, so that only the layout is left.
std::string layout(const std::string& summary) {
  std::string out;
  for (size_t i = 0; i < summary.size(); ++i) {
    if (std::isdigit(static_cast<unsigned char>(summary[i])) == 0) {
      out += summary[i];
      continue;
    }
    const size_t end = summary.find('\t', i);
    out += "#\t";
    i = end;
  }
  return out;
}

TEST_CASE("the simple profiler's report is laid out as Python's", "[profilers]") {
  const std::string python = R"(
import sys
from lightning.pytorch.profilers import SimpleProfiler
profiler = SimpleProfiler(extended=sys.argv[1] == "1")
profiler.setup("fit", 0, None)
for name in ["run_training_epoch", "[Callback]A.on_fit_end"]:
    with profiler.profile(name): pass
sys.stdout.write(profiler.summary())
)";
  const bool extended = GENERATE(true, false);
  SimpleProfiler profiler(SimpleProfilerOptions().extended(extended));
  profiler.setup(Stage::kFit, 0, "");
  {
    ProfileScope outer(&profiler, [] { return std::string("run_training_epoch"); });
    std::this_thread::sleep_for(std::chrono::milliseconds(2));
  }
  record(profiler, "[Callback]A.on_fit_end");
  const std::string expected = testing::run_python(python, {extended ? "1" : "0"});
  // Which action was the longer one is chance there.
  const auto sorted = [](const std::string& text) {
    std::vector<std::string> lines;
    std::istringstream in(layout(text));
    for (std::string line; std::getline(in, line);) lines.push_back(line);
    std::sort(lines.begin(), lines.end());
    return lines;
  };
  CHECK(sorted(profiler.summary()) == sorted(expected));
  CHECK_THAT(profiler.summary(), StartsWith("FIT Profiler Report\n"));
}

TEST_CASE("the profiler counts calls and sorts by share", "[profilers]") {
  SimpleProfiler profiler;
  record(profiler, "often", 3);
  {
    ProfileScope scope(&profiler, [] { return std::string("long"); });
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
  }
  CHECK(profiler.durations("often").size() == 3);
  CHECK(profiler.durations("long").at(0) >= 0.005);
  CHECK(profiler.durations("never").empty());
  const std::string summary = profiler.summary();
  CHECK(summary.find("|  long ") < summary.find("|  often"));
  CHECK_THAT(summary, Contains("|  Total\t|  -              \t|  4              \t|"));
}

TEST_CASE("starting twice and stopping unstarted are errors that name the action", "[profilers]") {
  SimpleProfiler profiler;
  profiler.start("a");
  CHECK_THROWS_WITH(profiler.start("a"), Contains("\"a\""));
  profiler.stop("a");
  CHECK_THROWS_AS(profiler.stop("a"), std::invalid_argument);
  CHECK_THROWS_WITH(profiler.stop("b"), Contains("\"b\""));
}

TEST_CASE("the report goes to a file of each stage and rank, or to the log of rank 0",
          "[profilers]") {
  const TempDir dir;
  SimpleProfiler to_file(SimpleProfilerOptions().filename("my/report"));
  to_file.setup(Stage::kFit, 0, dir.path("logs"));
  record(to_file, "a");
  to_file.describe();
  to_file.describe();
  std::ifstream in(dir.path("logs/fit-my_report-0.txt"));
  std::stringstream text;
  text << in.rdbuf();
  const std::string report = text.str();
  CHECK(report.find("FIT Profiler Report") != report.rfind("FIT Profiler Report"));

  std::vector<std::string> lines;
  set_log_sink([&](const std::string& line) { lines.push_back(line); });
  SimpleProfiler first;
  first.setup(Stage::kTest, 0, dir.path());
  first.describe();
  SimpleProfiler second;
  second.setup(Stage::kTest, 1, dir.path());
  second.describe();
  set_log_sink(nullptr);
  REQUIRE(lines.size() == 1);
  CHECK_THAT(lines[0], StartsWith("TEST Profiler Report"));
}

TEST_CASE("\"simple\" names the profiler", "[profilers]") {
  const auto profiler = registry<Profiler>().make("simple");
  CHECK(dynamic_cast<SimpleProfiler*>(profiler.get()) != nullptr);
}

}  // namespace
}  // namespace lightning
