// Broken files through everything that reads checkpoints without LibTorch, under the address and
// the undefined-behaviour sanitizer.
//
//   LIGHTNING_MUTANTS=200000       so many instead of 2,000
//   LIGHTNING_FIRST_MUTANT=1234    from this number on: with LIGHTNING_MUTANTS=1 one that failed
#include "tests/fuzz/fuzz.h"

#include <catch2/catch.hpp>
#include <iostream>

#include "tests/fuzz/mutate.h"
#include "tests/fuzz/runner.h"

using namespace lightning::fuzz;

namespace {

const Mutator& mutator() {
  static const Mutator one(read_inputs("tests/fuzz/seeds"));
  return one;
}

Outcome trial(const Input& input) { return fuzz_one(input.format, input.bytes); }

// What is made at first use and kept is not the mutants' doing.
void warm_up() {
  for (const Format format : kFormats) {
    for (const Input& seed : mutator().seeds()) fuzz_one(format, seed.bytes);
    fuzz_one(format, "");
  }
}

std::string times(size_t count, const std::string& text) {
  std::string out;
  out.reserve(count * text.size());
  for (size_t i = 0; i < count; ++i) out += text;
  return out;
}

std::string text_step(const std::string& text) {
  return std::string("X") + static_cast<char>(text.size()) + std::string(3, '\0') + text;
}

constexpr size_t kDepth = 1'000'000;

// Values inside one another, each with all that a pickle needs but PROTO and STOP.
std::vector<std::pair<std::string, std::string>> deep_values() {
  const std::string call = "cm\nn\n";
  return {
      {"lists", times(kDepth, "]") + times(kDepth - 1, "a")},
      {"lists of MARK", times(kDepth, "(") + times(kDepth, "l")},
      {"tuples", times(kDepth, "(") + "N" + times(kDepth, "t")},
      {"tuples of one", "N" + times(kDepth, "\x85")},
      {"dicts", times(kDepth, "}N") + "N" + times(kDepth, "s")},
      {"keys", "N" + times(kDepth, "\x85") + "q" + '\0' + "0}h" + '\0' + "Ns"},
      {"frozensets", times(kDepth, "(") + "N" + times(kDepth, "\x91")},
      {"calls of calls", call + times(kDepth, ")R")},
      {"objects of objects", call + times(kDepth, ")\x81")},
      {"arguments", call + "q" + '\0' + times(kDepth / 4, std::string("h\0", 2)) + ")" +
                        times(kDepth / 4, "R\x85") + "R"},
      {"states", call + ")Rq" + '\0' + times(kDepth, std::string("h\0)R", 4)) + times(kDepth, "b")},
      {"persistent ids", "N" + times(kDepth, "Q")},
      {"marks", times(kDepth, "(") + times(kDepth, "1") + "N"},
      {"parameters",
       "N" + times(kDepth / 50, "ctorch._utils\n_rebuild_parameter\nq" + std::string(1, '\0') +
                                    "0\x85h" + std::string(1, '\0') + "0\x85")},
  };
}

std::vector<Input> deep_inputs() {
  std::vector<Input> inputs;
  const std::string module = "ctorch.distributed.checkpoint.metadata\n";
  for (const auto& [name, value] : deep_values()) {
    const auto pickle = "\x80\x02" + value + ".";
    inputs.push_back({Format::kPickle, name, pickle});
    if (name != "lists" && name != "tuples" && name != "arguments") continue;
    inputs.push_back({Format::kTorchFile, name + " in a zip", make_zip({{"data.pkl", pickle}})});
    const auto metadata = "\x80\x02" + module + "Metadata\n)\x81}(" +
                          text_step("state_dict_metadata") + "}" + text_step("storage_data") + "}" +
                          text_step("planner_data") + "}" + text_step("x") + value + "s" + "ub.";
    inputs.push_back({Format::kDcpMetadata, name + " in metadata", metadata});
  }
  const std::pair<const char*, std::string> texts[] = {
      {"JSON maps", times(kDepth, "{\"a\":")},
      {"JSON lists", "{\"a\":" + times(kDepth, "[")},
      {"JSON lists in a shape", "{\"a\":{\"shape\":" + times(kDepth, "[") + times(kDepth, "]")},
      {"JSON of spaces", "{" + times(kDepth, " ") + "}"},
      {"a long name", "{\"" + times(kDepth, "a") + "\":{}}"},
      {"a long number", "{\"a\":{\"shape\":[" + times(kDepth, "1") + "]}}"},
  };
  for (const auto& [name, json] : texts) {
    std::string length(8, '\0');
    for (size_t i = 0; i < 8; ++i) length[i] = static_cast<char>(json.size() >> (8 * i));
    inputs.push_back({Format::kSafetensors, name, length + json});
  }
  return inputs;
}

}  // namespace

TEST_CASE("the files that mutants are made of are read", "[checkpoint][fuzz]") {
  for (const Input& seed : mutator().seeds()) {
    INFO(seed.name);
    CHECK(trial(seed).read);
    CHECK(trial(seed).left_bytes == 0);
  }
}

TEST_CASE(
    "mutated files are read or refused by CheckpointError, in memory in proportion to their size",
    "[checkpoint][fuzz]") {
  const auto first = number_from("LIGHTNING_FIRST_MUTANT", 0);
  const auto count = number_from("LIGHTNING_MUTANTS", 2'000);
  const auto make = [](uint64_t number) { return mutator().make(number); };

  const auto report = run_inputs(first, count, make, trial, warm_up);

  std::cout << report.words() << "\n";
  INFO("Mutant N alone: LIGHTNING_FIRST_MUTANT=N LIGHTNING_MUTANTS=1");
  INFO(report.words());
  CHECK(report.failures.empty());
  if (count < 1000) return;
  // Mutants that are all refused would show nothing, nor would those that are all read.
  CHECK(report.read > count / 20);
  CHECK(report.refused > count / 5);
}

TEST_CASE("a million values inside one another take no stack, in any format",
          "[checkpoint][fuzz]") {
  const auto inputs = deep_inputs();
  RunOptions options;
  options.most_seconds = 30;  // megabytes each

  const auto report = run_inputs(
      0, inputs.size(), [&](uint64_t i) { return inputs[i]; }, trial, warm_up, options);

  std::cout << report.words() << "\n";
  INFO(report.words());
  CHECK(report.failures.empty());
  CHECK(report.read > inputs.size() / 2);
}
