// DDP against one process on the same global batch. That one accumulates over the batches of all
// ranks in turn: for two ranks the same sums in the same order, so losses and weights are equal to
// the bit; for four, or with accumulation on top, within rounding.
#include "strategies/ddp.h"

#include <torch/torch.h>

#include <catch2/catch.hpp>
#include <fstream>
#include <iostream>

#include "lightning.h"
#include "lightning/checkpoint/torch_file.h"
#include "tests/ranks/in_turn.h"
#include "tests/support/ranks.h"

using namespace lightning;
using namespace lightning::testing;
using Catch::Contains;

namespace {

struct Config {
  std::string name;
  DDPStrategyOptions ddp;
  std::string precision = "32-true";
  int64_t accumulate = 1;
  double clip = 0;
  std::string clip_algorithm = "norm";
  bool manual = false, gives_loss = true;
  bool unused = false, by_turns = false;  // every other step uses them
  double tolerance = 0;                   // beside what four ranks and accumulation cost
};

std::vector<Config> configs() {
  using Options = DDPStrategyOptions;
  std::vector<Config> all{{"plain", Options()}};
  const auto add = [&](const char* name, Options options, auto change) {
    all.push_back({name, options});
    change(all.back());
  };
  const auto nothing = [](Config&) {};
  add("accumulation", Options(), [](Config& c) { c.accumulate = 2; });
  add("clipping by norm", Options(), [](Config& c) { c.clip = 0.05; });
  add("clipping by value", Options(), [](Config& c) {
    c.clip = 0.01;
    c.clip_algorithm = "value";
  });
  add("bf16-mixed", Options(), [](Config& c) { c.precision = "bf16-mixed"; });
  add("16-mixed", Options(), [](Config& c) { c.precision = "16-mixed"; });
  add("64-true", Options(), [](Config& c) { c.precision = "64-true"; });
  add("bf16-true", Options(), [](Config& c) {
    c.precision = "bf16-true";
    c.tolerance = 0.02;
  });
  add("static graph", Options().static_graph(true), nothing);
  add("static graph, accumulation", Options().static_graph(true),
      [](Config& c) { c.accumulate = 2; });
  add("bucket views", Options().gradient_as_bucket_view(true), nothing);
  add("many buckets", Options().bucket_cap_mb(0.0001), nothing);
  add("bucket views in many buckets, accumulation",
      Options().bucket_cap_mb(0.0001).gradient_as_bucket_view(true),
      [](Config& c) { c.accumulate = 2; });
  add("unused parameters", Options().find_unused_parameters(true),
      [](Config& c) { c.unused = true; });
  add("parameters that every other step uses", Options().find_unused_parameters(true),
      [](Config& c) { c.unused = c.by_turns = true; });
  add("by hand", Options(), [](Config& c) { c.manual = true; });
  add("by hand, without a loss to return", Options(), [](Config& c) {
    c.manual = true;
    c.gives_loss = false;
  });
  add("bf16_compress", Options().ddp_comm_hook("bf16_compress"),
      [](Config& c) { c.tolerance = 0.02; });
  add("fp16_compress", Options().ddp_comm_hook("fp16_compress"),
      [](Config& c) { c.tolerance = 0.004; });
  return all;
}

DataLoader rows(std::shared_ptr<Sampler> sampler) { return rows_of(8, std::move(sampler)); }

// Ranks begin with other weights; rank 0's are to hold.
struct Net : LightningModule {
  Net(const Config& config, int64_t manual_window, int64_t rank)
      : config(config), window(manual_window) {
    torch::manual_seed(static_cast<uint64_t>(7 + rank));
    first = register_module("first", torch::nn::Linear(8, 16));
    last = register_module("last", torch::nn::Linear(16, 1));
    tied = register_module("tied", last.ptr());
    extra = register_module("extra", torch::nn::Linear(4, 4));
    for (auto& parameter : extra->parameters()) parameter.requires_grad_(config.unused);
    set_automatic_optimization(!config.manual);
  }
  StepOutput training_step(const Batch& batch, int64_t batch_idx) override {
    auto hidden = torch::relu(first(batch.tensor()));
    auto loss = (last(hidden) - batch.tensor().sum(1, true)).square().mean();
    if (config.by_turns && batch_idx / window % 2 == 0) {
      loss = loss + extra(batch.tensor().narrow(1, 0, 4)).square().mean();
    }
    losses.push_back(loss.detach().to(at::kDouble));
    if (!config.manual) return loss;
    manual_backward(loss / window);
    if ((batch_idx + 1) % window == 0) {
      optimizers()[0]->step();
      optimizers()[0]->zero_grad();
    }
    return config.gives_loss ? StepOutput(loss) : skip;
  }
  Optimizers configure_optimizers() override {
    return torch::optim::SGD(parameters(), torch::optim::SGDOptions(0.05).momentum(0.9));
  }

  Config config;
  int64_t window;
  torch::nn::Linear first{nullptr}, last{nullptr}, tied{nullptr}, extra{nullptr};
  std::vector<at::Tensor> losses;
};

// Losses, mean over the ranks of each step, and final weights.
struct Outcome {
  at::Tensor losses;
  std::map<std::string, at::Tensor> weights;
};

std::map<std::string, at::Tensor> weights_of(const torch::nn::Module& module) {
  std::map<std::string, at::Tensor> weights;
  for (const auto& item : module.named_parameters()) {
    weights[item.key()] = item.value().detach().clone();
  }
  return weights;
}

Outcome alone(const Config& config, int64_t ranks, const std::string& dir) {
  Trainer trainer(configured(config, dir)
                      .devices(1)
                      .accumulate_grad_batches(config.manual ? 1 : ranks * config.accumulate));
  auto net = std::make_shared<Net>(config, ranks, 0);
  trainer.fit(net, rows(std::make_shared<InTurn>(ranks)));
  const auto losses = at::stack(net->losses).reshape({-1, ranks}).mean(1);
  return {losses, weights_of(*net)};
}

}  // namespace

TEST_CASE("program: trains in every way", "[.program]") {
  const auto ranks = std::stoll(Ranks::variable("DEVICES"));
  for (const auto& config : configs()) {
    Trainer trainer(configured(config, Ranks::folder())
                        .devices(ranks)
                        .strategy(config.ddp)
                        .accumulate_grad_batches(config.accumulate));
    auto net = std::make_shared<Net>(config, 1, trainer.global_rank());
    trainer.fit(net, rows(nullptr));
    auto& all = trainer.strategy();
    auto result = State::dict({{"losses", all.reduce(at::stack(net->losses), ReduceOp::kMean)}});
    for (const auto& [name, weight] : weights_of(*net)) {
      result[name] = weight;
      const auto others = all.all_gather(weight);
      CAPTURE(config.name, name, others);
      for (int64_t rank = 1; rank < ranks; ++rank) CHECK(at::equal(others[0], others[rank]));
    }
    if (trainer.is_global_zero()) write_torch_file(result, file_of(Ranks::folder(), config.name));
  }
}

TEST_CASE("ddp trains as one process does on the same global batch", "[ranks]") {
  const auto ranks = GENERATE(from_range(Ranks::counts()));
  Ranks program;
  const auto ended = program.run("program: trains in every way", {{"DEVICES", str(ranks)}});
  INFO(ended.output);
  REQUIRE(ended.status == 0);
  CHECK(ended.still_running == 0);
  for (const auto& config : configs()) {
    CAPTURE(ranks, config.name);
    const auto expected = alone(config, ranks, program.dir().path());
    const auto result = read_torch_file(file_of(program.dir().path(), config.name));
    const bool exact =
        Ranks::on_cpu() && ranks == 2 && config.accumulate == 1 && config.tolerance == 0;
    const bool is_mixed = config.precision.find("mixed") != std::string::npos;
    const auto tolerance = config.tolerance > 0 ? config.tolerance
                           : is_mixed           ? 1e-3
                           : Ranks::on_cpu()    ? 1e-5
                                                : 1e-4;
    const auto compare = [&](const at::Tensor& is, const at::Tensor& on_device) {
      const auto should = on_device.cpu();
      CAPTURE(is, should);
      if (exact) CHECK(at::equal(is, should));
      if (!exact) CHECK(at::allclose(is, should, tolerance, tolerance));
    };
    compare(result.at("losses").as_tensor(), expected.losses);
    for (const auto& [name, weight] : expected.weights) {
      INFO(name);
      compare(result.at(name).as_tensor(), weight);
    }
    if (config.name.find("compress") == std::string::npos) continue;
    CHECK_FALSE(at::equal(result.at("first.weight").as_tensor(),
                          expected.weights.at("first.weight").cpu()));  // it does compress
  }
}

// ---- What goes wrong ----------------------------------------------------------------------------

namespace {

struct Faulty : LightningModule {
  explicit Faulty(std::string fault, int64_t rank) : fault(std::move(fault)), rank(rank) {
    used = register_module("used", torch::nn::Linear(8, 1));
    const bool other = this->fault == "another shape" && rank == 1;
    extra = register_module("extra", torch::nn::Linear(8, other ? 2 : 1));
    if (this->fault == "another layer" && rank == 1) {
      register_module("surplus", torch::nn::Linear(2, 2));
    }
    if (this->fault == "frozen" && rank == 1) extra->weight.requires_grad_(false);
    if (this->fault == "nothing to train") {
      for (auto& parameter : parameters()) parameter.requires_grad_(false);
    }
  }
  StepOutput training_step(const Batch& batch, int64_t batch_idx) override {
    const bool here = batch_idx == 1 && rank == 1;
    if (here && fault == "skips") return skip;
    auto loss = used(batch.tensor()).mean();
    if (here && fault == "detached") return loss.detach();
    const bool leaves_out = fault == "leaves out" || (here && fault == "leaves out once");
    return leaves_out ? loss : loss + extra(batch.tensor()).mean();
  }
  Optimizers configure_optimizers() override {
    if (fault != "another model's") return torch::optim::SGD(parameters(), 0.1);
    return torch::optim::SGD(torch::nn::Linear(8, 3)->parameters(), 0.1);
  }

  std::string fault;
  int64_t rank;
  torch::nn::Linear used{nullptr}, extra{nullptr};
};

}  // namespace

TEST_CASE("program: has a fault", "[.program]") {
  try {
    Trainer trainer(options(Ranks::folder()).devices(2));
    trainer.fit(std::make_shared<Faulty>(Ranks::variable("FAULT"), trainer.global_rank()),
                rows(nullptr));
  } catch (const std::exception& error) {
    std::cerr << "This rank got: " << error.what() << std::endl;
    throw;
  }
}

TEST_CASE("what is wrong on one rank ends all ranks with an error that says so", "[ranks]") {
  struct Case {
    const char* fault;
    const char* error;
  };
  const auto [fault, error] = GENERATE(values<Case>({
      {"skips", "failed: training_step returned no loss for batch 1 on rank 1 of 2"},
      {"leaves out",
       "the loss does not depend on these trained parameters: extra.weight, extra.bias. The other "
       "ranks wait for their gradients. Use them in every training_step, freeze them with "
       "requires_grad_(false), or give strategy=\"ddp_find_unused_parameters_true\"."},
      {"leaves out once",
       "On rank 1 the loss does not depend on these trained parameters: extra.weight, extra.bias"},
      {"another shape", "The model of rank 1 has \"extra.weight\" as a parameter [2, 8] of float"},
      {"another layer", "The model of rank 1 has \"surplus.weight\", which rank 0 has not"},
      {"frozen",
       "The model of rank 1 has \"extra.weight\" as a parameter [1, 8] of float, rank 0 "},
      {"nothing to train", "a model without a parameter that is trained"},
      {"detached", "The loss does not depend on a parameter that is trained"},
      {"another model's", "The optimizer's parameter 0 of shape [3, 8] is not one of this model"},
  }));
  CAPTURE(fault);
  Ranks ranks;
  const auto ended = ranks.run("program: has a fault", {{"FAULT", fault}});
  INFO(ended.output);
  CHECK(ended.status == 1);
  CHECK(ended.still_running == 0);
  CHECK_THAT(ended.output, Contains(error));
  const std::string name = fault;
  if (name.find("another") == 0 || name == "frozen") {  // before training, each rank its own error
    CHECK_THAT(ended.output, !Contains("All processes of the run end"));
  }
}

TEST_CASE("program: keeps a buffer", "[.program]") {
  struct Counting : Faulty {
    explicit Counting(int64_t rank) : Faulty("", rank) {
      count = register_buffer("count", torch::full({1}, 100 * rank));
    }
    StepOutput training_step(const Batch& batch, int64_t batch_idx) override {
      seen.push_back(count.item<int64_t>());
      count.add_(1 + rank);
      return Faulty::training_step(batch, batch_idx);
    }
    at::Tensor count;
    std::vector<int64_t> seen;
  };
  const bool broadcast = Ranks::variable("BROADCAST") == "1";
  Trainer trainer(options(Ranks::folder())
                      .max_steps(3)
                      .devices(2)
                      .strategy(DDPStrategyOptions().broadcast_buffers(broadcast)));
  auto module = std::make_shared<Counting>(trainer.global_rank());
  trainer.fit(module, rows(nullptr));
  std::ofstream file(Ranks::folder() + str("/seen", trainer.global_rank()));
  for (const auto value : module->seen) file << value << " ";
}

TEST_CASE("rank 0's buffers go to all ranks before each training step", "[ranks]") {
  const bool broadcast = GENERATE(true, false);
  Ranks ranks;
  const auto ended = ranks.run("program: keeps a buffer", {{"BROADCAST", broadcast ? "1" : "0"}});
  INFO(ended.output);
  CHECK(ended.status == 0);
  const auto seen = [&](const char* name) {
    std::ifstream file(ranks.dir().path(name));
    std::string line;
    std::getline(file, line);
    return line;
  };
  CHECK(seen("seen0") == "0 1 2 ");
  CHECK(seen("seen1") == (broadcast ? "0 1 2 " : "0 2 4 "));  // equal at the start in any case
}

TEST_CASE("a ddp option that makes no sense is an error with what to write", "[ranks]") {
  const auto made = [](const DDPStrategyOptions& options) {
    return Part<Strategy>(options).make("strategy");
  };
  CHECK_THROWS_WITH(made(DDPStrategyOptions().ddp_comm_hook("bf16")),
                    Contains("got \"bf16\"") && Contains("\"bf16_compress\""));
  CHECK_THROWS_WITH(made(DDPStrategyOptions().bucket_cap_mb(0)), Contains("got 0"));
  CHECK_THROWS_WITH(made(DDPStrategyOptions().timeout(std::string("1:30"))),
                    Contains("got timeout \"1:30\"") && Contains("DD:HH:MM:SS"));
  CHECK(registry<Strategy>().has("ddp_spawn"));
}
