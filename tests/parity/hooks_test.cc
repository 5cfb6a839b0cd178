// Hook for hook: every configuration of hooks.json runs under Python Lightning (hooks.py) and here
// (recorder.cc), and the two sequences of calls must be equal, line for line.
#include <algorithm>
#include <catch2/catch.hpp>
#include <fstream>
#include <functional>
#include <nlohmann/json.hpp>
#include <regex>
#include <string>
#include <utility>
#include <vector>

#include "lightning/errors.h"
#include "tests/parity/recorder.h"
#include "tests/support/python.h"
#include "tests/support/temp_dir.h"

namespace lightning::testing {
namespace {

using Lines = std::vector<std::string>;

bool starts_with(const std::string& line, const std::string& prefix) {
  return line.compare(0, prefix.size(), prefix) == 0;
}

// The calls of a configuration's last fit.
Lines::iterator last_fit(Lines& lines) {
  auto begin = lines.begin();
  for (auto line = lines.begin(); line != lines.end(); ++line) {
    if (starts_with(*line, "run.fit(") && line + 1 != lines.end()) begin = line + 1;
  }
  return begin;
}

void keep_first_configure_model(Lines& lines) {
  bool called = false;
  const auto again = [&](const std::string& line) {
    return starts_with(line, "module.configure_model(") && std::exchange(called, true);
  };
  lines.erase(std::remove_if(lines.begin(), lines.end(), again), lines.end());
}

void leave_out_optimizer_hooks(Lines& lines) {
  const auto has_none = [](const std::string& line) {
    return line.find("no optimizer") != std::string::npos;
  };
  lines.erase(std::remove_if(lines.begin(), lines.end(), has_none), lines.end());
}

// "batch 0" and "batch 1" of a resumed epoch become "batch 2" and "batch 3".
void continue_with_third_batch(Lines& lines) {
  for (auto line = last_fit(lines); line != lines.end(); ++line) {
    if (line->find(".on_train_epoch_end(") != std::string::npos) return;
    *line = std::regex_replace(*line, std::regex("batch 0, "), "batch 2, ");
    *line = std::regex_replace(*line, std::regex("batch 1, "), "batch 3, ");
  }
}

// In these hooks the module's call comes before what saving callbacks do: their own call, and all
// that a save calls.
void save_after_the_module(Lines& lines) {
  for (const char* hook : {"on_train_batch_end(", "on_validation_end(", "on_test_end("}) {
    auto after_callbacks = lines.begin();
    for (auto line = lines.begin(); line != lines.end(); ++line) {
      if (line->find(hook) == std::string::npos) continue;
      if (starts_with(*line, "callback")) after_callbacks = line + 1;
      if (starts_with(*line, "module.")) std::rotate(after_callbacks, line, line + 1);
    }
  }
}

// Where C++ must differ from Python, and why. A function makes Python's lines ours.
struct Difference {
  std::string why;
  std::string configurations;  // a regular expression
  std::function<void(Lines& python)> apply;
};

const std::vector<Difference>& differences() {
  static const std::vector<Difference> all = {
      {"configure_model is called once in the life of a module; Python calls it in each run and "
       "asks users to make the second call harmless",
       "fit_.*|validate_from_a_checkpoint|logged", keep_first_configure_model},
      {"callbacks that save checkpoints come after the module where the run could not call the "
       "module's hook again when it resumes",
       ".*checkpoint.*|resume_.*", save_after_the_module},
      {"without an optimizer the hooks that take one are not called, where Python hands them a "
       "mock",
       "no_optimizer", leave_out_optimizer_hooks},
      {"our DataLoader keeps its place in a checkpoint, so a run that resumes inside an epoch goes "
       "on with the batches still to come; Python's begins with the first batch again",
       "resume_inside_an_epoch|resume_at_a_validation_inside_an_epoch", continue_with_third_batch},
  };
  return all;
}

Json read_json(const std::string& path) {
  std::ifstream in(path);
  if (!in) throw std::runtime_error("cannot open " + path);
  return Json::parse(in);
}

const Json& configurations() {
  static const Json all = read_json("tests/parity/hooks.json");
  return all;
}

// All configurations in one Python process: importing Lightning takes seconds.
const Json& recorded_in_python() {
  static const Json all = [] {
    TempDir dir;
    run_python(
        "import runpy, sys; sys.argv = sys.argv[1:]; "
        "runpy.run_path(sys.argv[0], run_name='__main__')",
        {"tests/parity/hooks.py", "tests/parity/hooks.json", dir.path("hooks.json")});
    return read_json(dir.path("hooks.json"));
  }();
  return all;
}

// The first place where two sequences part, with what leads up to it and follows.
std::string first_difference(const Lines& expected, const Lines& actual) {
  const size_t shorter = std::min(expected.size(), actual.size());
  const size_t at = static_cast<size_t>(
      std::mismatch(expected.begin(), expected.begin() + shorter, actual.begin()).first -
      expected.begin());
  if (at == expected.size() && at == actual.size()) return "";
  std::string text = str("call ", at, " of ", expected.size(), " differs:\n");
  for (size_t i = at < 8 ? 0 : at - 8; i < at; ++i) text += "    both    " + expected[i] + "\n";
  const auto follow = [&](const char* who, const Lines& lines) {
    if (at == lines.size()) text += str("    ", who, "  (the end)\n");
    for (size_t i = at; i < std::min(at + 6, lines.size()); ++i) {
      text += str("    ", who, "  ", lines[i], "\n");
    }
  };
  follow("python", expected);
  follow("c++   ", actual);
  return text;
}

std::vector<std::string> names() {
  std::vector<std::string> all;
  for (const auto& one : configurations().items()) all.push_back(one.key());
  return all;
}

TEST_CASE("hooks are called as in Python Lightning, line for line", "[parity]") {
  const std::string name = GENERATE(from_range(names()));
  DYNAMIC_SECTION(name) {
    Lines python = recorded_in_python().at(name);
    for (const Difference& difference : differences()) {
      if (std::regex_match(name, std::regex(difference.configurations))) difference.apply(python);
    }
    TempDir dir;
    const Lines ours = record_hooks(configurations().at(name), dir.path());

    const std::string difference = first_difference(python, ours);
    INFO(name << ": " << difference);
    CHECK(difference.empty());
  }
}

}  // namespace
}  // namespace lightning::testing
