// 16-mixed on several ranks: in each epoch one gradient of rank 0 overflows, in a row that the last
// rank keeps where the model is in shards. All leave that step out, and their scales stay equal.
#include "precision/grad_scaler.h"

#include <torch/torch.h>

#include <catch2/catch.hpp>
#include <cstdio>

#include "lightning.h"
#include "lightning/checkpoint/torch_file.h"
#include "strategies/ddp.h"
#include "strategies/fsdp.h"
#include "tests/ranks/in_turn.h"
#include "tests/support/python.h"
#include "tests/support/ranks.h"

using namespace lightning;
using namespace lightning::testing;
using Catch::Contains;

namespace {

constexpr int64_t kGrowth = 2;                              // steps
constexpr int64_t kWidth = 6, kOutputs = 4, kOverflow = 2;  // the batch of an epoch, on rank 0

struct Net : LightningModule {
  //   turns   ranks whose batches this process takes in turn
  explicit Net(int64_t turns = 1, bool manual = false) : turns(turns) {
    torch::manual_seed(3);
    layer = register_module(
        "layer", torch::nn::Linear(torch::nn::LinearOptions(kWidth, kOutputs).bias(false)));
    set_automatic_optimization(!manual);
  }
  StepOutput training_step(const Batch& batch, int64_t batch_idx) override {
    const auto& x = batch.tensor();
    const auto y = layer(x).to(at::kFloat);
    CHECK(layer(x).scalar_type() == at::kHalf);
    auto loss = (y - x.narrow(1, 0, kOutputs)).square().mean();
    if (batch_idx == kOverflow * turns && global_rank() == 0) {
      loss = loss + y.select(1, kOutputs - 1).sum() * 1e30;
    }
    losses.push_back(loss.detach());
    if (automatic_optimization()) return loss;
    manual_backward(loss);
    optimizers()[0]->step();
    optimizers()[0]->zero_grad();
    return loss;
  }
  void on_before_optimizer_step(torch::optim::Optimizer& optimizer) override {
    const auto& gradient = optimizer.param_groups()[0].params()[0].grad();
    finite.emplace_back(at::isfinite(gradient).all().item<bool>());
    if (!automatic_optimization()) note_scale();
  }
  void on_train_batch_end(const StepOutput&, const Batch&, int64_t batch_idx) override {
    if (automatic_optimization() && (batch_idx + 1) % turns == 0) note_scale();
  }
  void note_scale() {
    const auto state = trainer().precision().state_dict();
    scales.emplace_back(state.at("scale"));
    scales.emplace_back(state.at("_growth_tracker"));
  }
  Optimizers configure_optimizers() override {
    return torch::optim::AdamW(parameters(), torch::optim::AdamWOptions(0.01));
  }

  int64_t turns;
  torch::nn::Linear layer{nullptr};
  std::vector<at::Tensor> losses;
  State::List finite, scales;  // of each step: whether gradients were; the scale, and its tracker
};

DataLoader rows(std::shared_ptr<Sampler> sampler) { return rows_of(kWidth, std::move(sampler)); }

struct Case {
  std::string name;
  std::optional<Part<Strategy>> strategy;
  double clip = 0;
  bool manual = false;
  std::function<bool(int64_t rank)> has_overflow;  // where the row is
};

std::vector<Case> cases(int64_t ranks) {
  const auto fsdp = [](const char* sharding) {
    return FSDPStrategyOptions().sharding_strategy(sharding);
  };
  const auto last = [ranks](int64_t rank) { return rank == ranks - 1; };
  const auto odd = [](int64_t rank) { return rank % 2 == 1; };
  const auto all = [](int64_t) { return true; };
  return {
      {"FULL_SHARD", fsdp("FULL_SHARD"), 0, false, last},
      {"FULL_SHARD, clipping", fsdp("FULL_SHARD"), 0.5, false, last},
      {"FULL_SHARD, by hand", fsdp("FULL_SHARD"), 0, true, last},
      {"SHARD_GRAD_OP", fsdp("SHARD_GRAD_OP"), 0, false, last},
      {"HYBRID_SHARD", fsdp("HYBRID_SHARD").device_mesh({ranks / 2, 2}), 0.5, false, odd},
      {"NO_SHARD", fsdp("NO_SHARD"), 0, false, all},
      {"cpu_offload", FSDPStrategyOptions().cpu_offload(true), 0.5, false, last},
      {"ddp", DDPStrategyOptions(), 0.5, false, all},
      {"ddp, fp16_compress", DDPStrategyOptions().ddp_comm_hook("fp16_compress"), 0, false, all}};
}

TrainerOptions flags_of(const Case& how, const std::string& dir) {
  auto flags = options(dir).plugins({half_mixed(kGrowth)});
  if (how.clip > 0) flags.gradient_clip_val(how.clip);
  return flags;
}

at::Tensor losses_of(const Net& net) { return at::stack(net.losses).cpu(); }

}  // namespace

TEST_CASE("program: trains in float16 where a gradient overflows", "[.program]") {
  const auto ranks = std::stoll(Ranks::variable("DEVICES"));
  for (const auto& how : cases(ranks)) {
    CAPTURE(how.name);
    Trainer trainer(flags_of(how, Ranks::folder()).devices(ranks).strategy(*how.strategy));
    auto net = std::make_shared<Net>(1, how.manual);
    trainer.fit(net, rows(nullptr));
    auto& all = trainer.strategy();
    const auto losses = all.reduce(at::stack(net->losses), ReduceOp::kMean);
    const auto scales = all.all_gather_states(net->scales);
    const auto finite = all.all_gather_states(net->finite);
    auto weights = all.model_state(*net);
    if (!trainer.is_global_zero()) continue;
    write_torch_file(State::dict({{"losses", losses.cpu()},
                                  {"weights", std::move(weights)},
                                  {"scales", State::List(scales.begin(), scales.end())},
                                  {"finite", State::List(finite.begin(), finite.end())}}),
                     file_of(Ranks::folder(), how.name));
  }
}

TEST_CASE("a gradient that overflows on one rank leaves the step out on all", "[ranks]") {
  const auto ranks = GENERATE(from_range(Ranks::counts()));
  Ranks program;
  const auto ended = program.run("program: trains in float16 where a gradient overflows",
                                 {{"DEVICES", str(ranks)}});
  INFO(ended.output);
  REQUIRE(ended.status == 0);
  for (const auto& how : cases(ranks)) {
    CAPTURE(ranks, how.name);
    Trainer trainer(flags_of(how, program.dir().path()).devices(1).accumulate_grad_batches(ranks));
    auto net = std::make_shared<Net>(ranks);
    trainer.fit(net, rows(std::make_shared<InTurn>(ranks)));

    const auto is = read_torch_file(file_of(program.dir().path(), how.name));
    const auto steps = static_cast<size_t>(2 * kRows / kBatch / ranks);
    for (size_t rank = 0; rank < static_cast<size_t>(ranks); ++rank) {
      CAPTURE(rank);
      const auto& finite = is.at("finite").as_list().at(rank).as_list();
      REQUIRE(finite.size() == steps);
      for (size_t step = 0; step < steps; ++step) {
        CAPTURE(step);
        const bool overflows = step % (steps / 2) == kOverflow;
        CHECK(finite[step].as_bool() ==
              !(overflows && how.has_overflow(static_cast<int64_t>(rank))));
      }
      // By hand they are noted before the step.
      auto scales = is.at("scales").as_list().at(rank).as_list();
      auto expected = net->scales;
      if (how.manual) {
        scales.erase(scales.begin(), scales.begin() + 2);
        expected.resize(expected.size() - 2);
      }
      CHECK(State(scales).repr() == State(expected).repr());
    }
    const auto should = losses_of(*net).reshape({-1, ranks}).mean(1);
    CHECK(at::allclose(is.at("losses").as_tensor(), should, 2e-3, 2e-3));
    CHECK(at::allclose(is.at("weights").at("layer.weight").as_tensor(), net->layer->weight.cpu(),
                       2e-3, 2e-3));
  }
}

// ---- Checkpoints --------------------------------------------------------------------------------

TEST_CASE("program: goes on in float16", "[.program]") {
  const auto fsdp = FSDPStrategyOptions()
                        .state_dict_type(Ranks::variable("TYPE"))
                        .checkpoint_layout(Ranks::variable("LAYOUT"));
  Trainer trainer(options(Ranks::folder())
                      .plugins({half_mixed(kGrowth)})
                      .devices(2)
                      .strategy(fsdp)
                      .max_epochs(std::stoll(Ranks::variable("EPOCHS"))));
  auto net = std::make_shared<Net>();
  trainer.fit(net, rows(nullptr), {}, RunArguments().ckpt_path(Ranks::variable("FROM")));
  trainer.save_checkpoint(Ranks::folder() + "/" + Ranks::variable("TO"));
  auto& all = trainer.strategy();
  const auto losses = all.reduce(at::stack(net->losses), ReduceOp::kMean);
  const auto scales = all.all_gather_states(net->scales);
  for (const auto& one : scales) CHECK(one.repr() == scales[0].repr());
  if (!trainer.is_global_zero()) return;
  write_torch_file(State::dict({{"losses", losses.cpu()}, {"scales", net->scales}}),
                   file_of(Ranks::folder(), Ranks::variable("TO") + "_seen"));
}

TEST_CASE("a sharded run in float16 goes on with its scale, on one device too", "[ranks]") {
  Ranks program;
  const auto in_folder = [&](const std::string& name) { return program.dir().path(name); };
  const auto run = [&](const char* type, const char* layout, const std::string& from,
                       const std::string& to, int64_t epochs) {
    const auto ended =
        program.run("program: goes on in float16", {{"TYPE", type},
                                                    {"LAYOUT", layout},
                                                    {"FROM", from.empty() ? "" : in_folder(from)},
                                                    {"TO", to},
                                                    {"EPOCHS", str(epochs)}});
    INFO(ended.output);
    REQUIRE(ended.status == 0);
    return read_torch_file(file_of(program.dir().path(), to + "_seen"));
  };
  const auto at_once = run("full", "fsdp", "", "at_once", 2);
  run("full", "fsdp", "", "first.ckpt", 1);
  run("sharded", "model_parallel", "", "first", 1);
  const auto& scales = at_once.at("scales").as_list();
  const State::List second(scales.begin() + static_cast<std::ptrdiff_t>(scales.size()) / 2,
                           scales.end());
  CHECK(second[0].as_double() == 8192);  // what one step made of 4096 and a count of 1
  const auto losses = at_once.at("losses").as_tensor().chunk(2)[1];
  for (const auto& [from, type, key] : {std::tuple("first.ckpt", "sharded", "FSDPPrecision"),
                                        {"first", "full", "MixedPrecision"}}) {
    CAPTURE(from);
    const auto saved = default_checkpoint_io()->load(in_folder(from));
    CHECK(saved.at(key).at("scale").as_double() == 4096);
    CHECK(saved.at(key).at("_growth_tracker").as_int() == 1);
    const auto is = run(type, "fsdp", from, str("from_", from), 2);
    CHECK(is.at("scales").repr() == State(second).repr());
    const double rounding = Ranks::on_cpu() ? 0 : 1e-3;
    CHECK(at::allclose(is.at("losses").as_tensor(), losses, rounding, rounding));

    Trainer alone(options(program.dir().path())
                      .devices(1)
                      .plugins({half_mixed(kGrowth)})
                      .accumulate_grad_batches(2));
    auto net = std::make_shared<Net>(2);
    alone.fit(net, rows(std::make_shared<InTurn>(2)), {},
              RunArguments().ckpt_path(in_folder(from)));
    CHECK(State(net->scales).repr() == State(second).repr());
  }
}

// ---- The original -------------------------------------------------------------------------------

namespace {

// Two ranks over Gloo, with the batches that ours take.
const char* const kSharded = R"(
import subprocess, sys, torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
folder, rank = sys.argv[1], int(sys.argv[2])
if rank == 0:
    other = subprocess.Popen([sys.executable, __file__, folder, "1"])
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
given = torch.load(folder + "/given.pt")
layer = torch.nn.Linear(6, 4, bias=False)
with torch.no_grad():
    layer.weight.copy_(given["weight"])
half = torch.float16
fully_shard(layer, mesh=init_device_mesh("cpu", (2,)),
            mp_policy=MixedPrecisionPolicy(param_dtype=half, reduce_dtype=half))
optimizer = torch.optim.AdamW(layer.parameters(), 0.01)
scaler = ShardedGradScaler("cpu", init_scale=1024.0, growth_interval=2)
losses, scales = [], []
for index, batches in enumerate(given["batches"]):
    x = batches[rank]
    y = layer(x).float()
    loss = (y - x[:, :4]).square().mean()
    if index % 8 == 2 and rank == 0:
        loss = loss + y[:, 3].sum() * 1e30
    optimizer.zero_grad()
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    torch.nn.utils.clip_grad_norm_(layer.parameters(), 0.5)
    scaler.step(optimizer)
    scaler.update()
    mean = loss.detach().clone()
    dist.all_reduce(mean)
    losses.append(mean / 2)
    scales.append([scaler.get_scale(), scaler._get_growth_tracker()])
weight = layer.weight.full_tensor()
if rank == 0:
    torch.save({"losses": torch.stack(losses), "weight": weight,
                "scales": torch.tensor(scales, dtype=torch.float64)}, folder + "/seen.pt")
dist.destroy_process_group()
if rank == 0:
    assert other.wait() == 0
)";

// [step, rank, row of the batch, column], of both epochs.
at::Tensor batches_of_two_ranks() {
  std::vector<at::Tensor> all;
  for (const int64_t epoch : {0, 1}) {
    auto in_turn = std::make_shared<InTurn>(2);
    in_turn->set_epoch(epoch);
    const auto next = in_turn->iterate();
    auto generator = at::make_generator<at::CPUGeneratorImpl>(3);
    const auto data = at::randn({kRows, kWidth}, generator);
    while (const auto index = next()) all.push_back(data[*index]);
  }
  return at::stack(all).reshape({-1, 2, kBatch, kWidth});
}

}  // namespace

TEST_CASE("shards scale, skip and clip as torch's ShardedGradScaler does", "[ranks][python]") {
  Ranks program;
  const auto ended =
      program.run("program: trains in float16 where a gradient overflows", {{"DEVICES", "2"}});
  INFO(ended.output);
  REQUIRE(ended.status == 0);
  const auto is = read_torch_file(file_of(program.dir().path(), "FULL_SHARD, clipping"));
  write_torch_file(
      State::dict({{"weight", Net().layer->weight.detach()}, {"batches", batches_of_two_ranks()}}),
      program.dir().path("given.pt"));
  run_python(kSharded, {program.dir().path(), "0"});
  const auto should = read_torch_file(program.dir().path("seen.pt"));
  const auto& scales = is.at("scales").as_list().at(0).as_list();
  const auto theirs = should.at("scales").as_tensor().flatten();
  REQUIRE(theirs.numel() == static_cast<int64_t>(scales.size()));
  for (size_t i = 0; i < scales.size(); ++i) {
    CAPTURE(i);
    const auto ours = i % 2 == 0 ? scales[i].as_double() : static_cast<double>(scales[i].as_int());
    CHECK(ours == theirs[static_cast<int64_t>(i)].item<double>());
  }
  CHECK(at::allclose(is.at("losses").as_tensor(), should.at("losses").as_tensor(), 2e-3, 2e-3));
  CHECK(at::allclose(is.at("weights").at("layer.weight").as_tensor(),
                     should.at("weight").as_tensor(), 2e-3, 2e-3));
}
