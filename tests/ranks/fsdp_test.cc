// FSDP against one process on the same global batch. That one accumulates over the batches of all
// ranks in turn: for two ranks the same sums in the same order, so losses and weights are equal to
// the bit where nothing is rounded on the way; elsewhere within rounding.
#include "strategies/fsdp.h"

#include <torch/torch.h>

#include <catch2/catch.hpp>
#include <iostream>

#include "lightning.h"
#include "lightning/checkpoint/torch_file.h"
#include "lightning/param/touch.h"
#include "tests/ranks/in_turn.h"
#include "tests/support/python.h"
#include "tests/support/ranks.h"

using namespace lightning;
using namespace lightning::testing;
using Catch::Contains;

namespace {

constexpr int64_t kWidth = 6;  // no multiple of 4: a rank has padding, or nothing

struct Config {
  std::string name;
  FSDPStrategyOptions fsdp;
  std::string precision = "32-true";
  int64_t accumulate = 1;
  double clip = 0;
  std::string clip_algorithm = "norm";
  std::string optimizer = "sgd";
  bool manual = false;
  bool born_empty = false;  // constructed in configure_model
  double tolerance = 0;     // beside what four ranks and accumulation cost
};

std::vector<Config> configs(int64_t ranks) {
  using Options = FSDPStrategyOptions;
  std::vector<Config> all{{"plain", Options()}};
  const auto add = [&](const char* name, Options options, auto change) {
    all.push_back({name, options});
    change(all.back());
  };
  const auto nothing = [](Config&) {};
  add("accumulation", Options(), [](Config& c) { c.accumulate = 2; });
  add("clipping by norm", Options(), [](Config& c) {
    c.clip = 0.05;
    c.tolerance = 1e-5;  // the norm is a sum over shards
  });
  add("clipping by value", Options(), [](Config& c) {
    c.clip = 0.01;
    c.clip_algorithm = "value";
  });
  // Their kernels compute the last elements of a tensor otherwise than those before them, and a
  // slice ends elsewhere.
  for (const char* optimizer : {"adamw", "adagrad"}) {
    add(optimizer, Options(), [&](Config& c) {
      c.optimizer = optimizer;
      c.tolerance = 1e-5;
    });
  }
  add("by hand", Options(), [](Config& c) { c.manual = true; });
  add("born empty", Options(), [](Config& c) { c.born_empty = true; });
  add("born empty, bf16-true", Options(), [](Config& c) {
    c.born_empty = true;
    c.precision = "bf16-true";
    c.tolerance = 4e-2;
  });
  add("born empty, bf16-mixed", Options(), [](Config& c) {
    c.born_empty = true;
    c.precision = "bf16-mixed";
    c.tolerance = 2e-2;
  });
  add("16-mixed", Options(), [](Config& c) {
    c.precision = "16-mixed";
    c.tolerance = 4e-3;
  });
  add("16-mixed, born empty, clipping, accumulation, activation checkpointing",
      Options().activation_checkpointing_policy({"Block"}), [](Config& c) {
        c.precision = "16-mixed";
        c.born_empty = true;
        c.accumulate = 2;
        c.clip = 0.05;
        c.tolerance = 4e-3;
      });
  add("born empty, NO_SHARD", Options().sharding_strategy("NO_SHARD"),
      [](Config& c) { c.born_empty = true; });
  add("64-true", Options(), [](Config& c) { c.precision = "64-true"; });
  add("units by type", Options().auto_wrap_policy({"Linear"}), nothing);
  add("units by name", Options().auto_wrap_policy({"blocks.1", "head"}), nothing);
  add("SHARD_GRAD_OP", Options().sharding_strategy("SHARD_GRAD_OP"), nothing);
  add("NO_SHARD", Options().sharding_strategy("NO_SHARD"), nothing);
  add("NO_SHARD, accumulation, clipping", Options().sharding_strategy("NO_SHARD"), [](Config& c) {
    c.accumulate = 2;
    c.clip = 0.05;
  });
  const auto hybrid = Options().sharding_strategy("HYBRID_SHARD");
  add("HYBRID_SHARD", Options(hybrid).device_mesh({ranks / 2, 2}), [](Config& c) {
    c.clip = 0.05;
    c.tolerance = 1e-5;
  });
  add("cpu_offload", Options().cpu_offload(true), [](Config& c) { c.born_empty = true; });
  add("HYBRID_SHARD, one rank in a group", Options(hybrid).device_mesh({ranks, 1}), nothing);
  for (const char* sharding : {"FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD"}) {
    const auto options = Options().sharding_strategy(sharding);
    add(sharding, options, [&](Config& c) {
      c.name = str("bf16-mixed, ", sharding);
      c.precision = "bf16-mixed";
      c.tolerance = 2e-2;
    });
    add(sharding, options, [&](Config& c) {
      c.name = str("bf16-true, ", sharding);
      c.precision = "bf16-true";
      c.tolerance = 4e-2;
    });
    add(sharding, Options(options).activation_checkpointing_policy({"Block"}), [&](Config& c) {
      c.name = str("activation checkpointing, ", sharding);
      c.accumulate = 2;
    });
  }
  add("bf16-mixed, activation checkpointing, accumulation",
      Options().activation_checkpointing_policy({"Block"}), [](Config& c) {
        c.precision = "bf16-mixed";
        c.accumulate = 2;
        c.tolerance = 2e-2;
      });
  return all;
}

DataLoader rows(std::shared_ptr<Sampler> sampler, int64_t batch = kBatch) {
  return rows_of(kWidth, std::move(sampler), batch);
}

struct BlockImpl : torch::nn::Module {
  BlockImpl() {
    up = register_module("up", torch::nn::Linear(kWidth, 9));
    down = register_module("down", torch::nn::Linear(9, kWidth));
    norm = register_module("norm", torch::nn::LayerNorm(torch::nn::LayerNormOptions({kWidth})));
  }
  at::Tensor forward(const at::Tensor& x) {
    return x + down(torch::gelu(up(norm(x.to(norm->weight.dtype())))));
  }
  torch::nn::Linear up{nullptr}, down{nullptr};
  torch::nn::LayerNorm norm{nullptr};
};
TORCH_MODULE(Block);

// Tied, frozen and unused parameters, one without dims, one of a single row, a block used twice.
// Ranks begin with other weights; rank 0's are to hold.
struct Net : LightningModule {
  Net(const Config& config, int64_t manual_window, int64_t rank)
      : config(config), window(manual_window), rank(rank) {
    set_automatic_optimization(!config.manual);
    if (config.born_empty) return;
    seed();
    build();
  }
  void seed() { torch::manual_seed(static_cast<uint64_t>(7 + rank)); }
  void build() {
    head = register_module("head", torch::nn::Linear(kWidth, kWidth));
    tied = register_module("tied", head.ptr());
    blocks = register_module("blocks", torch::nn::ModuleList(Block(), Block(), Block()));
    blocks[1]->as<Block>()->up->weight.requires_grad_(false);
    scale = register_parameter("scale", torch::full({}, 1.5 + static_cast<double>(rank)));
    row = register_parameter("row", torch::randn({1, kWidth}));
    unused = register_parameter("unused", torch::randn({3}));
    offset = register_buffer("offset", torch::full({kWidth}, 0.25 + static_cast<double>(rank)));
  }
  void setup(Stage) override {
    if (config.born_empty && !head) seed();
  }
  void configure_model() override {
    if (!config.born_empty) return;
    build();
    was_empty = head->weight.is_meta() && offset.is_meta();
  }
  at::Tensor loss_of(const at::Tensor& x) {
    auto hidden = head(x) + row;
    for (const size_t i : {0, 1, 0, 2}) hidden = blocks[i]->as<Block>()->forward(hidden);
    return (tied(hidden) * scale - (x * 0.1 + offset).sum(1, true)).square().mean();
  }
  StepOutput training_step(const Batch& batch, int64_t batch_idx) override {
    auto loss = loss_of(batch.tensor());
    losses.push_back(loss.detach().to(at::kDouble));
    if (!config.manual) return loss;
    manual_backward(loss / window);
    if ((batch_idx + 1) % window == 0) {
      optimizers()[0]->step();
      optimizers()[0]->zero_grad();
    }
    return loss;
  }
  StepOutput validation_step(const Batch& batch, int64_t) override {
    log("val_loss", loss_of(batch.tensor()).to(at::kDouble), LogOptions().sync_dist(true));
    return {};
  }
  StepOutput test_step(const Batch& batch, int64_t) override {
    log("test_loss", loss_of(batch.tensor()).to(at::kDouble), LogOptions().sync_dist(true));
    return {};
  }
  Optimizers configure_optimizers() override {
    using namespace torch::optim;
    if (config.optimizer == "adamw") return AdamW(parameters(), AdamWOptions(0.01));
    if (config.optimizer == "adagrad") {
      return Adagrad(parameters(), AdagradOptions(0.02).initial_accumulator_value(0.1));
    }
    return SGD(parameters(), SGDOptions(0.02).momentum(0.9));
  }

  Config config;
  int64_t window, rank;
  bool was_empty = false;
  torch::nn::Linear head{nullptr}, tied{nullptr};
  torch::nn::ModuleList blocks{nullptr};
  at::Tensor scale, row, unused, offset;
  std::vector<at::Tensor> losses;
};

// Losses, mean over the ranks of each step, and final weights.
struct Outcome {
  at::Tensor losses;
  double val_loss = 0, test_loss = 0;
  State weights;
};

Outcome alone(const Config& config, int64_t ranks, const std::string& dir) {
  auto flags = configured(config, dir)
                   .devices(1)
                   .accumulate_grad_batches(config.manual ? 1 : ranks * config.accumulate);
  // What is born empty is drawn on the device, and a GPU draws other numbers than a CPU.
  if (config.born_empty && !Ranks::on_cpu()) flags.strategy(FSDPStrategyOptions());
  Trainer trainer(flags);
  auto net = std::make_shared<Net>(config, ranks, 0);
  trainer.fit(net, rows(std::make_shared<InTurn>(ranks)), rows(nullptr));
  Outcome outcome;
  outcome.losses = at::stack(net->losses).reshape({-1, ranks}).mean(1);
  outcome.val_loss = *trainer.metric("val_loss");
  outcome.weights = trainer.strategy().model_state(*net);
  trainer.test(net, rows(nullptr));
  outcome.test_loss = *trainer.metric("test_loss");
  return outcome;
}

}  // namespace

TEST_CASE("program: trains in shards in every way", "[.program]") {
  const auto ranks = std::stoll(Ranks::variable("DEVICES"));
  for (const auto& config : configs(ranks)) {
    CAPTURE(config.name);
    Trainer trainer(configured(config, Ranks::folder())
                        .devices(ranks)
                        .strategy(config.fsdp)
                        .accumulate_grad_batches(config.accumulate));
    auto net = std::make_shared<Net>(config, 1, trainer.global_rank());
    trainer.fit(net, rows(nullptr), rows(nullptr));
    CHECK(net->was_empty == config.born_empty);
    auto& all = trainer.strategy();
    const auto val_loss = *trainer.metric("val_loss");
    auto weights = all.model_state(*net);
    trainer.test(net, rows(nullptr));
    if (config.fsdp.sharding_strategy() == "FULL_SHARD") {
      CHECK_THROWS_WITH(net->head->weight.sum().item<float>(),
                        Contains("\"head.weight\"") && Contains(str("in ", ranks, " shards")));
    }
    auto result = State::dict({{"losses", all.reduce(at::stack(net->losses), ReduceOp::kMean)},
                               {"val_loss", val_loss},
                               {"test_loss", *trainer.metric("test_loss")},
                               {"weights", std::move(weights)}});
    if (trainer.is_global_zero()) write_torch_file(result, file_of(Ranks::folder(), config.name));
  }
}

TEST_CASE("fsdp trains as one process does on the same global batch", "[ranks]") {
  const auto ranks = GENERATE(from_range(Ranks::counts()));
  Ranks program;
  const auto ended = program.run("program: trains in shards in every way",
                                 {{"DEVICES", str(ranks)}}, {}, nullptr, std::chrono::seconds(240));
  INFO(ended.output);
  REQUIRE(ended.status == 0);
  CHECK(ended.still_running == 0);
  for (const auto& config : configs(ranks)) {
    CAPTURE(ranks, config.name);
    const auto expected = alone(config, ranks, program.dir().path());
    const auto result = read_torch_file(file_of(program.dir().path(), config.name));
    const bool exact =
        Ranks::on_cpu() && ranks == 2 && config.accumulate == 1 && config.tolerance == 0;
    const auto rounding = Ranks::on_cpu() ? 1e-5 : 1e-4;
    const auto tolerance = config.tolerance > 0 ? config.tolerance : rounding;
    const auto compare = [&](const at::Tensor& is, const at::Tensor& on_device) {
      const auto should = on_device.cpu();
      CAPTURE(is, should);
      CHECK(is.scalar_type() == should.scalar_type());
      if (exact) CHECK(at::equal(is, should));
      if (!exact) CHECK(at::allclose(is, should, tolerance, tolerance));
    };
    compare(result.at("losses").as_tensor(), expected.losses);
    CHECK(result.at("val_loss").as_double() ==
          Approx(expected.val_loss).epsilon(std::max(tolerance, 1e-6)));
    CHECK(result.at("test_loss").as_double() ==
          Approx(expected.test_loss).epsilon(std::max(tolerance, 1e-6)));
    CHECK(result.at("weights").as_dict().size() == expected.weights.as_dict().size());
    for (const auto& [name, weight] : expected.weights.as_dict()) {
      INFO(to_string(name));
      compare(result.at("weights").at(name).as_tensor(), weight.as_tensor());
    }
  }
}

TEST_CASE("program: trains by the names of both", "[.program]") {
  struct Case {
    const char* precision;
    int64_t accumulate;
    double clip;
  };
  for (const auto& how : {Case{"32-true", 1, 0}, {"bf16-mixed", 2, 0.05}, {"bf16-true", 1, 0}}) {
    CAPTURE(how.precision);
    std::vector<State> weights;
    std::vector<at::Tensor> losses;
    for (const char* name : {"fsdp", "fsdp_cpu_offload"}) {
      Config config;
      config.optimizer = "adamw";
      auto flags = options(Ranks::folder())
                       .devices(2)
                       .strategy(name)
                       .precision(how.precision)
                       .accumulate_grad_batches(how.accumulate);
      if (how.clip > 0) flags.gradient_clip_val(how.clip);
      Trainer trainer(flags);
      auto net = std::make_shared<Net>(config, 1, trainer.global_rank());
      trainer.fit(net, rows(nullptr), rows(nullptr));
      losses.push_back(at::stack(net->losses));
      weights.push_back(trainer.strategy().model_state(*net));
    }
    CHECK(losses[0].numel() > 10);
    CHECK(at::equal(losses[0], losses[1]));
    if (Ranks::variable("LOCAL_RANK") != "0") continue;
    for (const auto& [name, weight] : weights[0].as_dict()) {
      INFO(to_string(name));
      CHECK(at::equal(weights[1].at(name).as_tensor(), weight.as_tensor()));
    }
  }
}

TEST_CASE("on a CPU fsdp_cpu_offload is fsdp, to the bit", "[ranks]") {
  if (!Ranks::on_cpu()) {
    WARN("needs LIGHTNING_TEST_ACCELERATOR=cpu: Adam rounds otherwise on a GPU");
    return;
  }
  Ranks program;
  const auto ended = program.run("program: trains by the names of both");
  INFO(ended.output);
  CHECK(ended.status == 0);
}

namespace {

// Two optimizers of which each steps its own part of what both compute.
struct Taking : Net {
  explicit Taking(int64_t rank) : Net(manual(), 1, rank) {}
  static Config manual() {
    Config config;
    config.manual = true;
    return config;
  }
  StepOutput training_step(const Batch& batch, int64_t) override {
    const auto both = optimizers();
    for (const auto& one : both) {
      const Scope toggled = one->toggle_model();
      const auto loss = loss_of(batch.tensor());
      manual_backward(loss);
      one->step();
      one->zero_grad();
    }
    return loss_of(batch.tensor());
  }
  Optimizers configure_optimizers() override {
    using namespace torch::optim;
    return {std::make_shared<SGD>(head->parameters(), SGDOptions(0.02).momentum(0.9)),
            std::make_shared<SGD>(blocks->parameters(), SGDOptions(0.01))};
  }
};

}  // namespace

TEST_CASE("program: takes turns with two optimizers", "[.program]") {
  Trainer trainer(options(Ranks::folder()).devices(2).strategy(FSDPStrategyOptions()));
  auto module = std::make_shared<Taking>(trainer.global_rank());
  trainer.fit(module, rows(nullptr));
  auto weights = trainer.strategy().model_state(*module);
  if (trainer.is_global_zero()) write_torch_file(weights, Ranks::folder() + "/weights.pt");
}

TEST_CASE("only the parameters of a toggled optimizer get gradients from fsdp", "[ranks]") {
  Ranks program;
  const auto ended = program.run("program: takes turns with two optimizers");
  INFO(ended.output);
  REQUIRE(ended.status == 0);
  Trainer trainer(options(program.dir().path()).devices(1));
  auto module = std::make_shared<Taking>(0);
  trainer.fit(module, rows(std::make_shared<InTurn>(2), 2 * kBatch));
  const auto weights = read_torch_file(program.dir().path("weights.pt"));
  for (const auto& item : module->named_parameters()) {
    INFO(item.key());
    const double rounding = Ranks::on_cpu() ? 1e-5 : 1e-4;
    CHECK(at::allclose(weights.at(item.key()).as_tensor(), item.value().cpu(), rounding, rounding));
  }
}

TEST_CASE("program: writes whole parameters", "[.program]") {
  for (const char* precision : {"32-true", "bf16-mixed"}) {
    CAPTURE(precision);
    Config config;
    Trainer trainer(options(Ranks::folder())
                        .devices(2)
                        .strategy(FSDPStrategyOptions())
                        .precision(precision)
                        .max_epochs(1));
    auto net = std::make_shared<Net>(config, 1, trainer.global_rank());
    trainer.fit(net, rows(nullptr));
    const auto before = trainer.strategy().model_state(*net);
    {
      const Scope whole = whole_parameters(trainer.strategy(), /*write=*/true);
      const at::NoGradGuard no_grad;
      if (trainer.is_global_zero()) {
        CHECK(at::equal(net->row, before.at("row").as_tensor().to(net->row.options())));
      }
      net->head->weight[5].fill_(2.5);
      net->scale.fill_(3.5);
    }
    const auto after = trainer.strategy().model_state(*net);
    if (!trainer.is_global_zero()) continue;
    for (const auto& [name, weight] : before.as_dict()) {
      INFO(to_string(name));
      auto expected = weight.as_tensor().clone();
      if (to_string(name) == "scale") expected.fill_(3.5);
      const bool is_head = to_string(name) == "head.weight" || to_string(name) == "tied.weight";
      if (is_head) expected[5].fill_(2.5);
      CHECK(at::equal(after.at(name).as_tensor(), expected));
    }
  }
}

TEST_CASE("what is written into whole parameters holds, and nothing else changes", "[ranks]") {
  Ranks program;
  const auto ended = program.run("program: writes whole parameters");
  INFO(ended.output);
  CHECK(ended.status == 0);
}

// ---- Checkpoints --------------------------------------------------------------------------------

namespace {

Config for_checkpoints(const std::string& type) {
  Config config{"checkpoints", FSDPStrategyOptions().state_dict_type(type)};
  config.optimizer = "adamw";
  return config;
}

// Everything of `is` that a run's state is made of equals that of `should`: to the bit, or within
// what other sums of gradients cost.
void check_same_state(const State& is, const State& should, double rounding = 0) {
  const auto check_equal = [rounding](const State& one, const State& other) {
    if (!other.is<TensorState>()) {
      CHECK(one.repr() == other.repr());
      return;
    }
    CHECK(one.as_tensor().scalar_type() == other.as_tensor().scalar_type());
    CHECK(at::allclose(one.as_tensor(), other.as_tensor(), rounding, rounding));
  };
  CHECK(is.at("global_step").as_int() == should.at("global_step").as_int());
  CHECK(is.at("state_dict").as_dict().size() == should.at("state_dict").as_dict().size());
  for (const auto& [name, weight] : should.at("state_dict").as_dict()) {
    INFO(to_string(name));
    check_equal(is.at("state_dict").at(name), weight);
  }
  const auto& optimizer = is.at("optimizer_states").as_list().at(0);
  const auto& expected = should.at("optimizer_states").as_list().at(0);
  REQUIRE(expected.at("state").as_dict().size() > 10);
  CHECK(optimizer.at("state").as_dict().size() == expected.at("state").as_dict().size());
  for (const auto& [number, entry] : expected.at("state").as_dict()) {
    INFO(to_string(number));
    for (const auto& [key, value] : entry.as_dict()) {
      INFO(to_string(key));
      check_equal(optimizer.at("state").at(number).at(key), value);
    }
  }
  CHECK(optimizer.at("param_groups").repr() == expected.at("param_groups").repr());
}

}  // namespace

TEST_CASE("program: trains from a checkpoint to a checkpoint", "[.program]") {
  const auto ranks = std::stoll(Ranks::variable("DEVICES"));
  const auto config = for_checkpoints(Ranks::variable("TYPE"));
  auto flags = options(Ranks::folder())
                   .devices(ranks)
                   .strategy(config.fsdp)
                   .max_epochs(std::stoll(Ranks::variable("EPOCHS")));
  Trainer trainer(flags);
  auto net = std::make_shared<Net>(config, 1, trainer.global_rank());
  trainer.fit(net, rows(nullptr), {}, RunArguments().ckpt_path(Ranks::variable("FROM")));
  trainer.save_checkpoint(Ranks::folder() + "/" + Ranks::variable("TO"));
}

TEST_CASE("a checkpoint goes from one number of ranks and kind to another, to the bit", "[ranks]") {
  Ranks program;
  const auto run = [&](int64_t ranks, const char* type, const std::string& from,
                       const std::string& to, int64_t epochs) {
    const auto ended = program.run("program: trains from a checkpoint to a checkpoint",
                                   {{"DEVICES", str(ranks)},
                                    {"TYPE", type},
                                    {"FROM", from.empty() ? "" : program.dir().path(from)},
                                    {"TO", to},
                                    {"EPOCHS", str(epochs)}});
    INFO(ended.output);
    REQUIRE(ended.status == 0);
  };
  const auto load = [&](const std::string& name) {
    return default_checkpoint_io()->load(program.dir().path(name));
  };
  {
    Trainer trainer(options(program.dir().path()).devices(1).max_epochs(1));
    trainer.fit(std::make_shared<Net>(for_checkpoints("full"), 1, 0), rows(nullptr));
    trainer.save_checkpoint(program.dir().path("alone.ckpt"));
  }
  const auto first = load("alone.ckpt");
  // Nothing is trained on the way.
  const auto most = Ranks::counts().back();
  run(2, "sharded", "alone.ckpt", "two", 1);
  check_same_state(load("two"), first);
  run(most, "full", "two", "four.ckpt", 1);
  check_same_state(load("four.ckpt"), first);
  run(most, "sharded", "four.ckpt", "four", 1);
  check_same_state(load("four"), first);
  run(2, "sharded", "four", "two", 1);  // in the place of another
  check_same_state(load("two"), first);
  {
    Trainer trainer(options(program.dir().path()).devices(1).max_epochs(1));
    auto net = std::make_shared<Net>(for_checkpoints("full"), 1, 5);
    trainer.fit(net, rows(nullptr), {}, RunArguments().ckpt_path(program.dir().path("two")));
    trainer.save_checkpoint(program.dir().path("back.ckpt"));
  }
  check_same_state(load("back.ckpt"), first);
  // A run that stopped goes on as one that did not.
  run(2, "full", "", "epoch1.ckpt", 1);
  run(2, "sharded", "", "epoch1", 1);
  run(2, "full", "", "epoch2.ckpt", 2);
  const double rounding = Ranks::on_cpu() ? 0 : 1e-5;
  run(2, "sharded", "epoch1.ckpt", "epoch2", 2);
  check_same_state(load("epoch2"), load("epoch2.ckpt"), rounding);
  run(2, "full", "epoch1", "epoch2b.ckpt", 2);
  check_same_state(load("epoch2b.ckpt"), load("epoch2.ckpt"), rounding);

  const auto said = run_python(R"(
import sys, pathlib, torch
from lightning.fabric.utilities.load import _load_distributed_checkpoint
from lightning.pytorch.utilities.consolidate_checkpoint import _format_checkpoint
folder, file = sys.argv[1:]
is_ = _format_checkpoint(_load_distributed_checkpoint(pathlib.Path(folder)))
should = torch.load(file, weights_only=False)
assert is_["global_step"] == should["global_step"] > 0
assert is_["state_dict"].keys() == should["state_dict"].keys(), is_["state_dict"].keys()
for name, weight in should["state_dict"].items():
    assert torch.equal(is_["state_dict"][name], weight), name
optimizer, expected = is_["optimizer_states"][0], should["optimizer_states"][0]
names = [name for group in optimizer["param_groups"] for name in group["params"]]
assert len(expected["state"]) > 10
for number, entry in expected["state"].items():
    for key, value in entry.items():
        assert torch.equal(optimizer["state"][names[number]][key], value), (number, key)
print("the same")
)",
                               {program.dir().path("two"), program.dir().path("alone.ckpt")});
  CHECK_THAT(said, Contains("the same"));
}

// ---- Memory -------------------------------------------------------------------------------------

namespace {

struct Deep : LightningModule {
  static constexpr int64_t kSize = 64, kLayers = 16;
  explicit Deep(const FSDPStrategyOptions& options) : sharding(options.sharding_strategy()) {
    layers = register_module("layers", torch::nn::Sequential());
    for (int64_t i = 0; i < kLayers; ++i) {
      layers->push_back(torch::nn::Linear(torch::nn::LinearOptions(kSize, kSize).bias(false)));
    }
  }
  // Parameters that are whole, and the bytes that they take.
  int64_t whole_bytes() const {
    int64_t bytes = 0;
    for (const auto& parameter : parameters()) {
      const auto* backed = backed_parameter(parameter);
      if (backed->is_whole()) bytes += static_cast<int64_t>(backed->allocated_bytes());
    }
    return bytes;
  }
  void note() { most = std::max(most, whole_bytes()); }
  StepOutput training_step(const Batch& batch, int64_t) override {
    auto x = batch.tensor();
    for (auto& layer : *layers) {
      x = layer.forward(x);
      note();
      if (x.requires_grad())
        x.register_hook([this](const at::Tensor& g) {
          note();
          return g;
        });
    }
    return x.square().mean();
  }
  void on_before_backward(const at::Tensor&) override { before_backward = whole_bytes(); }
  void on_after_backward() override { after_backward = whole_bytes(); }
  Optimizers configure_optimizers() override { return torch::optim::SGD(parameters(), 0.1); }

  std::string sharding;
  torch::nn::Sequential layers{nullptr};
  int64_t most = 0, before_backward = -1, after_backward = -1;
};

}  // namespace

TEST_CASE("program: watches its memory", "[.program]") {
  for (const char* precision : {"32-true", "bf16-mixed", "bf16-true"}) {
    for (const char* sharding : {"FULL_SHARD", "SHARD_GRAD_OP"}) {
      CAPTURE(precision, sharding);
      const auto fsdp = FSDPStrategyOptions().sharding_strategy(sharding);
      Trainer trainer(
          options(Ranks::folder()).devices(2).strategy(fsdp).precision(precision).max_steps(3));
      auto deep = std::make_shared<Deep>(fsdp);
      auto generator = at::make_generator<at::CPUGeneratorImpl>(3);
      trainer.fit(deep, DataLoader(TensorDataset(Batch(at::randn({24, Deep::kSize}, generator))),
                                   DataLoaderOptions(4)));
      const int64_t layer =
          Deep::kSize * Deep::kSize * (std::string(precision) == "32-true" ? 4 : 2);
      const bool full = std::string(sharding) == "FULL_SHARD";
      // The one in use, the one after it, and in backward one whose gradient is not there yet.
      CHECK(deep->most <= (full ? 3 : Deep::kLayers) * layer);
      CHECK(deep->most >= (full ? 1 : Deep::kLayers) * layer);
      CHECK(deep->before_backward == (full ? 1 : Deep::kLayers) * layer);
      CHECK(deep->after_backward == 0);
    }
  }
}

TEST_CASE("no rank holds more of the model than two units and its shards", "[ranks]") {
  Ranks program;
  const auto ended = program.run("program: watches its memory");
  INFO(ended.output);
  CHECK(ended.status == 0);
}

// ---- What goes wrong ----------------------------------------------------------------------------

namespace {

struct Faulty : Net {
  Faulty(const std::string& fault, int64_t rank) : Net(Config(), 1, rank), fault(fault) {
    if (fault == "another shape" && rank == 1) {
      register_module("surplus", torch::nn::Linear(2, 2));
    }
    other = std::make_shared<torch::nn::LinearImpl>(2, 2);
  }
  StepOutput training_step(const Batch& batch, int64_t batch_idx) override {
    if (fault == "skips" && batch_idx == 1 && global_rank() == 1) return skip;
    if (fault == "writes") {
      const at::NoGradGuard no_grad;
      head->weight.mul_(2);
    }
    return Net::training_step(batch, batch_idx);
  }
  Optimizers configure_optimizers() override {
    if (fault == "other parameters") return torch::optim::SGD(other->parameters(), 0.1);
    if (fault == "LBFGS") return torch::optim::LBFGS(parameters());
    return Net::configure_optimizers();
  }
  std::string fault;
  std::shared_ptr<torch::nn::LinearImpl> other;
};

}  // namespace

TEST_CASE("program: has a fault in shards", "[.program]") {
  try {
    const auto fault = Ranks::variable("FAULT");
    FSDPStrategyOptions fsdp;
    if (fault == "policy") fsdp.auto_wrap_policy({"Blok"});
    if (fault == "checkpointing policy") fsdp.activation_checkpointing_policy({"Blok"});
    auto flags = options(Ranks::folder()).devices(2).strategy(fsdp);
    Trainer trainer(flags);
    trainer.fit(std::make_shared<Faulty>(fault, trainer.global_rank()), rows(nullptr));
  } catch (const std::exception& error) {
    std::cerr << "Rank " << Ranks::variable("LOCAL_RANK") << " got: " << error.what() << std::endl;
    throw;
  }
}

TEST_CASE("what is wrong with a sharded run ends all ranks with an error that says so", "[ranks]") {
  struct Case {
    const char* fault;
    const char* error;
  };
  const auto [fault, error] = GENERATE(values<Case>({
      {"policy", "names \"Blok\", which is neither the type nor the name of a module"},
      {"checkpointing policy",
       "names \"Blok\", which is neither the type nor the name of a module"},
      {"other parameters", "parameter 0 of shape [2, 2] is not one of this model"},
      {"LBFGS", "LBFGS computes with all elements of the model at once"},
      {"another shape", "The model of rank 1 has \"surplus.weight\" where rank 0 has \"offset\""},
      {"skips", "failed: training_step returned no loss for batch 1 on rank 1 of 2"},
      {"writes", "\"head.weight\", which is in 2 shards, is written by"},
  }));
  CAPTURE(fault);
  Ranks ranks;
  const auto ended = ranks.run("program: has a fault in shards", {{"FAULT", fault}});
  INFO(ended.output);
  CHECK(ended.status == 1);
  CHECK(ended.still_running == 0);
  CHECK_THAT(ended.output, Contains(error));
}

TEST_CASE("an fsdp option that makes no sense is an error with what to write", "[ranks]") {
  const auto made = [](const FSDPStrategyOptions& options) {
    return Part<Strategy>(options).make("strategy");
  };
  CHECK_THROWS_WITH(made(FSDPStrategyOptions().sharding_strategy("FULL")),
                    Contains("sharding_strategy=\"FULL\"") && Contains("FULL_SHARD"));
  CHECK_THROWS_WITH(made(FSDPStrategyOptions().sharding_strategy("HYBRID_SHARD")),
                    Contains("\"HYBRID_SHARD\" without a device_mesh"));
  CHECK_THROWS_WITH(made(FSDPStrategyOptions().device_mesh({2, 2})),
                    Contains("\"FULL_SHARD\" and a device_mesh"));
  CHECK_THROWS_WITH(
      Trainer(TrainerOptions().accelerator("cpu").devices(2).logger(false).strategy(
          FSDPStrategyOptions().sharding_strategy("HYBRID_SHARD").device_mesh({2, 2}))),
      Contains("device_mesh=[2, 2] with 2 processes"));
  CHECK_THROWS_WITH(made(FSDPStrategyOptions().state_dict_type("local")),
                    Contains("state_dict_type=\"local\"") && Contains("sharded"));
  CHECK_THROWS_WITH(made(FSDPStrategyOptions().checkpoint_layout("ddp")),
                    Contains("checkpoint_layout=\"ddp\"") && Contains("model_parallel"));
  CHECK_THROWS_WITH(made(FSDPStrategyOptions().timeout(std::string("00:00:00:00"))),
                    Contains("timeout"));
}
