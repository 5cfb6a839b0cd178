// Broken files through the readers that make tensors. LibTorch is not compiled for the sanitizers,
// so crashes and exceptions are all that shows here; fuzz_test.cc has the rest.
//
// LIGHTNING_MUTANTS and LIGHTNING_FIRST_MUTANT as there.
#include <ATen/ops/ones.h>
#include <sys/resource.h>
#include <unistd.h>

#include <catch2/catch.hpp>
#include <fstream>
#include <iostream>
#include <iterator>

#include "lightning/checkpoint/dcp.h"
#include "lightning/checkpoint/safetensors.h"
#include "lightning/checkpoint/state.h"
#include "lightning/checkpoint/torch_file.h"
#include "lightning/errors.h"
#include "tests/fuzz/mutate.h"
#include "tests/fuzz/runner.h"
#include "tests/support/temp_dir.h"

using namespace lightning;
using namespace lightning::fuzz;
using lightning::testing::TempDir;

namespace {

// What one mutant may take beside the program, which maps far more than it uses.
constexpr rlim_t kMostBytes = rlim_t{2} << 30;

void limit_memory() {
  uint64_t pages = 0;
  std::ifstream("/proc/self/statm") >> pages;
  const rlim_t bytes = pages * static_cast<rlim_t>(::sysconf(_SC_PAGESIZE)) + kMostBytes;
  const rlimit limit{bytes, bytes};
  ::setrlimit(RLIMIT_AS, &limit);
}

RunOptions options() {
  RunOptions options;
  options.stack_bytes = uint64_t{8} << 20;  // as the main thread has; copying a State recurses
  options.most_seconds = 20;
  return options;
}

// A copy of a mapped file's old content stays with who mapped it.
void write_file(const std::string& path, const std::string& bytes) {
  ::unlink(path.c_str());
  std::ofstream(path, std::ios::binary) << bytes;
}

std::string content_of(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

void touch(const at::Tensor& tensor) {
  // Strides of 0 let a few bytes be any number of elements.
  constexpr int64_t kMostElements = 1 << 20;
  if (tensor.defined() && tensor.numel() <= kMostElements) tensor.clone();
}

void touch(const State& state) {
  if (state.is<TensorState>()) {
    for (const auto& chunk : state.as_tensor_state().chunks) touch(chunk.tensor);
  } else if (state.is<State::List>() || state.is<State::Tuple>()) {
    for (const State& item : state.as_list()) touch(item);
  } else if (state.is<State::Dict>()) {
    for (const auto& [key, value] : state.as_dict()) touch(value);
  }
}

void read(const Input& input, const TempDir& dir) {
  const auto path = dir.path("mutant");
  const bool verify = input.bytes.size() % 2 == 0;
  if (input.format == Format::kSafetensors) {
    write_file(path, input.bytes);
    for (const auto& [name, tensor] : read_safetensors(path).tensors) touch(tensor);
    return;
  }
  const bool is_pickle = input.format != Format::kTorchFile;
  write_file(path, is_pickle ? make_zip({{"data.pkl", input.bytes}}) : input.bytes);
  const State state = read_torch_file(path, verify);
  touch(state);
  state.repr();
  if (!verify) return;
  // What was read is written, or refused for what torch.load would refuse.
  write_torch_file(state, dir.path("again"));
  touch(read_torch_file(dir.path("again")));
}

// Whether it was refused by a CheckpointError; any other exception goes on.
template <class Work>
Outcome outcome_of(const Work& work) {
  Outcome outcome;
  try {
    work();
    outcome.read = true;
  } catch (const CheckpointError&) {
  }
  return outcome;
}

void check(const Report& report, uint64_t count) {
  std::cout << report.words() << "\n";
  INFO("Mutant N alone: LIGHTNING_FIRST_MUTANT=N LIGHTNING_MUTANTS=1");
  INFO(report.words());
  CHECK(report.failures.empty());
  if (count < 100) return;
  CHECK(report.read > count / 20);
  CHECK(report.refused > count / 10);
}

}  // namespace

TEST_CASE("mutated files become tensors and values, or a CheckpointError",
          "[checkpoint][fuzz][torch]") {
  const Mutator mutator(read_inputs("tests/fuzz/seeds"));
  const TempDir dir;
  const auto count = number_from("LIGHTNING_MUTANTS", 2'000);

  const auto report = run_inputs(
      number_from("LIGHTNING_FIRST_MUTANT", 0), count,
      [&](uint64_t number) { return mutator.make(number); },
      [&](const Input& input) { return outcome_of([&] { read(input, dir); }); }, limit_memory,
      options());

  check(report, count);
}

TEST_CASE("mutated sharded folders become a tree, or a CheckpointError",
          "[checkpoint][fuzz][torch]") {
  const TempDir dir;
  State state = State::dict();
  state["model"]["w"] = at::ones({3, 2});
  state["model"]["steps"] = at::ones({}, at::kLong);
  state["optimizer"]["lr"] = 0.1;
  write_dcp(state, dir.path());
  const auto metadata = content_of(dir.path(".metadata"));
  const auto items = content_of(dir.path("__0_0.distcp"));
  const Mutator mutator({{Format::kDcpMetadata, "folder.metadata", metadata}});
  const auto count = number_from("LIGHTNING_MUTANTS", 2'000);

  const auto make = [&](uint64_t number) {
    auto mutant = mutator.make(number);
    if (number % 2 == 0) return mutant;
    Random random(number);
    const auto name = "mutant " + std::to_string(number) + " of __0_0.distcp";
    return Input{Format::kTorchFile, name, mutator.mutate_bytes(items, random)};
  };
  const auto trial = [&](const Input& input) {
    const bool is_metadata = input.format == Format::kDcpMetadata;
    write_file(dir.path(".metadata"), is_metadata ? input.bytes : metadata);
    write_file(dir.path("__0_0.distcp"), is_metadata ? items : input.bytes);
    return outcome_of([&] {
      const DcpReader reader(dir.path(), input.bytes.size() % 2 == 0);
      touch(reader.read_all(true));
      touch(reader.read_all(false));
    });
  };
  const auto report = run_inputs(number_from("LIGHTNING_FIRST_MUTANT", 0), count, make, trial,
                                 limit_memory, options());

  check(report, count);
}
