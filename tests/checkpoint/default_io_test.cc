#include <torch/torch.h>

#include <catch2/catch.hpp>
#include <cmath>
#include <filesystem>
#include <limits>

#include "lightning/checkpoint/checkpoint_io.h"
#include "lightning/checkpoint/safetensors.h"
#include "lightning/errors.h"
#include "lightning/files.h"
#include "tests/support/python.h"
#include "tests/support/temp_dir.h"

using Catch::Matchers::Contains;
using namespace lightning;
using lightning::testing::run_python;
using lightning::testing::TempDir;

namespace {

// The tree in text, with types, order and values; tensors by dtype, shape and content.
std::string shown(const State& state) {
  if (state.is_none()) return "None";
  if (state.is<bool>()) return state.as_bool() ? "True" : "False";
  if (state.is<int64_t>()) return str("int ", state.as_int());
  if (state.is<double>()) return str("float ", std::hexfloat, state.as_double());
  if (state.is<std::string>()) return '"' + state.as_string() + '"';
  if (state.is<TensorState>()) {
    const auto& tensor = state.as_tensor();
    return str(tensor.scalar_type(), tensor.sizes(), tensor.contiguous().view(-1));
  }
  std::string text = state.type_name() + "(";
  if (!state.is_dict()) {
    for (const auto& item : state.as_list()) text += shown(item) + ", ";
    return text + ")";
  }
  for (const auto& [key, value] : state.as_dict()) {
    const auto* name = std::get_if<std::string>(&key);
    text += (name ? '"' + *name + '"' : str(std::get<int64_t>(key))) + ": " + shown(value) + ", ";
  }
  return text + ")";
}

State::Tuple tuple(State::List items) { return {std::move(items)}; }

// What a run keeps, and every odd value a tree may hold.
State checkpoint() {
  const auto base = torch::arange(12, torch::kFloat).view({3, 4});
  State optimizer;
  optimizer["state"] = State::dict(
      {{int64_t{0}, State::dict({{"step", torch::scalar_tensor(3)}, {"exp_avg", base.t()}})},
       {int64_t{-7}, State::dict()}});
  optimizer["param_groups"] = State::List{
      State::dict({{"lr", 1e-3}, {"betas", tuple({0.9, 0.999})}, {"foreach", State()}})};
  State state;
  state["epoch"] = 3;
  state["version"] = "2.6 \"größe\"\n大";
  state["state_dict"] = State::dict({{"net.0.weight", base}, {"net.0.bias", torch::zeros({0})}});
  state["optimizer_states"] = State::List{optimizer};
  state["numbers"] = State::List{0.1,
                                 1.0,
                                 -0.0,
                                 1e300,
                                 5e-324,
                                 INFINITY,
                                 -INFINITY,
                                 std::numeric_limits<int64_t>::min(),
                                 std::numeric_limits<int64_t>::max(),
                                 true,
                                 false,
                                 State(),
                                 "",
                                 tuple({}),
                                 State::List{}};
  // Two paths that read alike.
  state["a"] = State::dict({{"b", torch::ones(1)}});
  state["a.b"] = torch::zeros(1);
  state["__metadata__"] = torch::ones({2}, torch::kBool);
  state["flags"] = torch::tensor({1, 2}, torch::kShort);
  return state;
}

}  // namespace

TEST_CASE("a checkpoint comes back as it was saved", "[checkpoint]") {
  TempDir dir;
  const auto io = default_checkpoint_io();
  const auto state = checkpoint();
  io->save(state, dir.path("run/epoch=3.ckpt"));
  io->save(state, dir.path("run/epoch=3.ckpt"));  // over the earlier one
  CHECK(shown(io->load(dir.path("run/epoch=3.ckpt"))) == shown(state));
}

TEST_CASE("a state of one value, and one that is not a number, come back too", "[checkpoint]") {
  TempDir dir;
  const auto io = default_checkpoint_io();
  const auto back = [&](const State& state) {
    io->save(state, dir.path("a"));
    return io->load(dir.path("a"));
  };
  CHECK(back(State()).is_none());
  CHECK(back(7).as_int() == 7);
  CHECK(std::isnan(back(std::nan("")).as_double()));
  CHECK(torch::equal(back(torch::ones(2)).as_tensor(), torch::ones(2)));
}

TEST_CASE("Python's safetensors reads a checkpoint's tensors under their paths", "[checkpoint]") {
  TempDir dir;
  default_checkpoint_io()->save(checkpoint(), dir.path("a.ckpt"));
  CHECK(run_python(R"(
import json, sys
from safetensors import safe_open
with safe_open(sys.argv[1], "pt") as f:
    for name in sorted(f.keys()):
        print(name, f.get_tensor(name).tolist())
    tree = json.loads(f.metadata()["lightning_state"])
    print(f.metadata()["format"], tree["dict"][0])
)",
                   {dir.path("a.ckpt")}) ==
        "__metadata__~ [True, True]\n"
        "a.b [1.0]\n"
        "a.b~ [0.0]\n"
        "flags [1, 2]\n"
        "optimizer_states.0.state.0.exp_avg [[0.0, 4.0, 8.0], [1.0, 5.0, 9.0], [2.0, 6.0, 10.0], "
        "[3.0, 7.0, 11.0]]\n"
        "optimizer_states.0.state.0.step 3.0\n"
        "state_dict.net.0.bias []\n"
        "state_dict.net.0.weight [[0.0, 1.0, 2.0, 3.0], [4.0, 5.0, 6.0, 7.0], [8.0, 9.0, 10.0, "
        "11.0]]\n"
        "pt ['epoch', 3]\n");
}

TEST_CASE("what a checkpoint cannot hold is refused by its path", "[checkpoint]") {
  TempDir dir;
  const auto io = default_checkpoint_io();
  const auto saving = [&](const State& state) { io->save(state, dir.path("a")); };
  CHECK_THROWS_WITH(
      saving(State::dict({{"x", State::List{torch::zeros(1, torch::kComplexDouble)}}})),
      Contains("\"x.0\" is complex128"));
  CHECK_THROWS_WITH(saving(State::dict({{"x", "\xff"}})), Contains("\"x\" is not UTF-8"));
  TensorState shard;
  shard.sizes = {4};
  shard.chunks.push_back({{0}, {2}, torch::zeros(2)});
  CHECK_THROWS_WITH(saving(State::dict({{"w", shard}})), Contains("\"w\" is here in 1 chunks"));
  State deep;
  for (int i = 0; i < 200; ++i) deep = State::List{deep};
  CHECK_THROWS_WITH(saving(deep), Contains("nested more than 100 deep"));
  CHECK_FALSE(std::filesystem::exists(dir.path("a")));
}

TEST_CASE("a file that is no checkpoint is refused with what to do", "[checkpoint]") {
  TempDir dir;
  const auto io = default_checkpoint_io();
  const auto path = dir.path("a.ckpt");
  CHECK_THROWS_WITH(io->load(path), Contains(path) && Contains("Check the path"));
  CHECK_THROWS_WITH(io->load(dir.path()), Contains("is a folder"));

  write_file(path, "PK\3\4 as Python writes them");
  CHECK_THROWS_WITH(io->load(path), Contains("torch.save"));

  io->save(checkpoint(), path);
  write_file(path, read_file(path).substr(0, 500));
  CHECK_THROWS_AS(io->load(path), CheckpointError);
  CHECK_THROWS_WITH(io->load(path), Contains("cut short") && Contains("load an earlier one"));

  write_safetensors(path, {{{"w", torch::ones(1)}}, {}});
  CHECK_THROWS_WITH(io->load(path), Contains("weights alone"));
}

TEST_CASE("a damaged tree inside a checkpoint is refused", "[checkpoint]") {
  TempDir dir;
  const auto io = default_checkpoint_io();
  const std::vector<std::pair<std::string, std::string>> cases = {
      {"", "broken"},
      {"{", "broken"},
      {R"({"dict":1})", "list of pairs"},
      {R"({"dict":[1]})", "list of pairs"},
      {R"({"dict":[[1,2,3]]})", "list of pairs"},
      {R"({"dict":[[null,2]]})", "neither string nor integer"},
      {R"({"tuple":1})", "tuple"},
      {R"({"tensor":"absent"})", "not in the file"},
      {R"({"tensor":1})", "not in the file"},
      {R"({"float":"x"})", "inf"},
      {R"({"call":"system"})", "\"call\" is not known"},
      {"{}", "one key"},
      {"18446744073709551615", "too large"},
      {std::string(100000, '['), "too deep"},
  };
  for (const auto& [tree, reason] : cases) {
    INFO(tree.substr(0, 100));
    write_safetensors(dir.path("a"), {{}, {{"lightning_state", tree}}});
    CHECK_THROWS_AS(io->load(dir.path("a")), CheckpointError);
    CHECK_THROWS_WITH(io->load(dir.path("a")), Contains(reason) && Contains(dir.path("a")));
  }
}

TEST_CASE("a checkpoint is removed, be it a file, a folder or not there", "[checkpoint]") {
  TempDir dir;
  const auto io = default_checkpoint_io();
  io->save(1, dir.path("a.ckpt"));
  io->save(1, dir.path("sharded/b/c"));
  io->remove(dir.path("a.ckpt"));
  io->remove(dir.path("sharded"));
  CHECK_NOTHROW(io->remove(dir.path("absent")));
  CHECK(std::filesystem::is_empty(dir.path()));
}
