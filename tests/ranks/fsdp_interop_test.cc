// Python takes up the checkpoints of C++ and the other way round, in the middle of a training:
// torch's own fully_shard and Lightning's ModelParallelStrategy on the CPU, Lightning's
// FSDPStrategy on two GPUs.
#include <torch/cuda.h>
#include <torch/torch.h>

#include <catch2/catch.hpp>
#include <fstream>
#include <iomanip>

#include "lightning.h"
#include "lightning/checkpoint/torch_file.h"
#include "precision/mixed.h"
#include "strategies/fsdp.h"
#include "tests/support/learner.h"
#include "tests/support/python.h"
#include "tests/support/ranks.h"

using namespace lightning;
using namespace lightning::testing;

namespace {

struct Net : LightningModule {
  Net() {
    torch::manual_seed(3);
    net = register_module("net", torch::nn::Sequential(torch::nn::Linear(8, 13), torch::nn::GELU(),
                                                       torch::nn::Linear(13, 8)));
  }
  StepOutput training_step(const Batch& batch, int64_t) override {
    const auto loss = (net->forward(batch.tensor()) - batch.tensor()).square().mean();
    losses.push_back(loss.item<float>());
    return loss;
  }
  Optimizers configure_optimizers() override {
    return torch::optim::AdamW(parameters(), torch::optim::AdamWOptions(0.01));
  }
  torch::nn::Sequential net{nullptr};
  std::vector<float> losses;
};

// A line each, of both ranks.
std::vector<std::vector<float>> losses_of(const std::string& folder, const std::string& name) {
  std::vector<std::vector<float>> all(2);
  for (size_t rank = 0; rank < all.size(); ++rank) {
    std::ifstream file(str(folder, "/", name, ".", rank));
    for (float loss = 0; file >> loss;) all[rank].push_back(loss);
  }
  return all;
}

// What both scripts begin with. Four batches an epoch on each rank.
const std::string kPython = R"(
import os, sys, torch
folder = sys.argv[1]
rows = torch.load(folder + "/rows.pt")
def make():
    return torch.nn.Sequential(torch.nn.Linear(8, 13), torch.nn.GELU(), torch.nn.Linear(13, 8))
def note(name, rank, losses):
    with open(f"{folder}/{name}.{rank}", "w") as file:
        file.writelines(f"{loss!r}\n" for loss in losses)
)";

const std::string kFullyShard = kPython + R"(
import shutil, subprocess
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
rank = int(sys.argv[2])
if rank == 0:
    other = subprocess.Popen([sys.executable, __file__, folder, "1"])
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
model = torch.nn.Module()
model.net = make()
fully_shard(model.net, mesh=init_device_mesh("cpu", (2,)))
optimizer = torch.optim.AdamW(model.parameters(), 0.5)
def state():
    of_model, of_optimizer = get_state_dict(model, optimizer)
    return {"model": of_model, "optimizer_0": of_optimizer}
loaded = state()
dcp.load(loaded, checkpoint_id=folder + "/first")
set_state_dict(model, optimizer, model_state_dict=loaded["model"],
               optim_state_dict=loaded["optimizer_0"])
losses = []
for batch in rows[rank::2].split(3):
    loss = (model.net(batch) - batch).square().mean()
    losses.append(loss.item())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
note("fully_shard", rank, losses)
dcp.save(state(), checkpoint_id=folder + "/second")
if rank == 0:
    shutil.copy(folder + "/first/meta.pt", folder + "/second/meta.pt")
dist.destroy_process_group()
if rank == 0:
    assert other.wait() == 0
)";

const std::string kModelParallel = kPython + R"(
import logging, lightning
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import fully_shard
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
class Net(lightning.LightningModule):
    losses = []
    def configure_model(self):
        if not hasattr(self, "net"):
            self.net = fully_shard(make(), mesh=self.device_mesh["data_parallel"])
    def training_step(self, batch, batch_idx):
        loss = (self.net(batch[0]) - batch[0]).square().mean()
        self.losses.append(loss.item())
        return loss
    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 0.5)
trainer = lightning.Trainer(
    accelerator="cpu", devices=2, max_epochs=2, logger=False, enable_progress_bar=False,
    enable_model_summary=False, enable_checkpointing=False, default_root_dir=folder,
    use_distributed_sampler=False,
    strategy=ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1))
module = Net()
data = torch.utils.data.TensorDataset(rows[trainer.global_rank::2])
loader = torch.utils.data.DataLoader(data, batch_size=3)
trainer.fit(module, loader, ckpt_path=folder + "/first")
assert trainer.global_step == 8
note("model_parallel", trainer.global_rank, module.losses)
trainer.save_checkpoint(folder + "/second")
)";

}  // namespace

namespace {

// From one of the folder's checkpoints, if named, to another, and the losses on the way.
void train(TrainerOptions flags, const std::string& from, const std::string& to) {
  Trainer trainer(flags.devices(2)
                      .max_epochs(std::stoll(Ranks::variable("EPOCHS")))
                      .logger(false)
                      .enable_progress_bar(false)
                      .enable_model_summary(false)
                      .enable_checkpointing(false)
                      .use_distributed_sampler(false)
                      .default_root_dir(Ranks::folder()));
  auto module = std::make_shared<Net>();
  const auto in_folder = [](const std::string& name) { return Ranks::folder() + "/" + name; };
  RunArguments arguments;
  if (!from.empty()) arguments.ckpt_path(in_folder(from));
  const auto rows = noise(24, 3).slice(0, trainer.global_rank(), std::nullopt, 2);
  trainer.fit(module, DataLoader(TensorDataset(Batch(rows)), DataLoaderOptions(3)), {}, arguments);
  std::ofstream file(in_folder(str(to, "_losses.", trainer.global_rank())));
  for (const float loss : module->losses) file << std::setprecision(9) << loss << "\n";
  trainer.save_checkpoint(in_folder(to));
}

}  // namespace

TEST_CASE("program: trains a part of an epoch after epoch", "[.program]") {
  const auto fsdp =
      FSDPStrategyOptions().state_dict_type("sharded").checkpoint_layout(Ranks::variable("LAYOUT"));
  train(TrainerOptions().accelerator("cpu").strategy(fsdp), Ranks::variable("FROM"),
        Ranks::variable("TO"));
}

TEST_CASE("a sharded run goes on in Python and back as if it had never left", "[ranks][python]") {
  struct Case {
    const char *name, *layout, *last_epochs;
    const std::string& script;
  };
  // torch's own loop copies the counters of the first epoch.
  const auto [name, layout, last_epochs, script] =
      GENERATE(values<Case>({{"fully_shard", "fsdp", "2", kFullyShard},
                             {"model_parallel", "model_parallel", "3", kModelParallel}}));
  CAPTURE(name);
  Ranks program;
  const auto folder = program.dir().path();
  const auto run = [&, layout = layout](const char* from, const char* to, const char* epochs) {
    const auto ended =
        program.run("program: trains a part of an epoch after epoch",
                    {{"LAYOUT", layout}, {"FROM", from}, {"TO", to}, {"EPOCHS", epochs}});
    INFO(ended.output);
    REQUIRE(ended.status == 0);
  };
  write_torch_file(noise(24, 3), folder + "/rows.pt");
  run("", "first", "1");
  run_python(script, {folder, "0"});
  run("second", "third", last_epochs);
  run("", "at_once", "3");

  const auto expected = losses_of(folder, "at_once_losses");
  for (size_t rank = 0; rank < 2; ++rank) {
    CAPTURE(rank);
    auto parts = losses_of(folder, "first_losses")[rank];
    for (const auto& part :
         {losses_of(folder, name)[rank], losses_of(folder, "third_losses")[rank]}) {
      CHECK(part.size() == 4);
      parts.insert(parts.end(), part.begin(), part.end());
    }
    CHECK(parts == expected[rank]);
  }
}

// ---- Lightning's FSDPStrategy -------------------------------------------------------------------

namespace {

struct Way {
  std::string type, precision;
  double tolerance;  // Python computes with biases in 16 bits where ours are in float32
  std::string named(const std::string& what) const { return str(type, ",", precision, ",", what); }
};
const std::vector<Way> kWays{{"sharded", "32-true", 1e-5},
                             {"full", "32-true", 1e-5},
                             {"sharded", "bf16-mixed", 3e-2},
                             {"sharded", "16-mixed", 5e-3}};

// Takes up "first" of each way, on two GPUs, and saves "second".
const std::string kFSDPStrategy = kPython + R"(
import faulthandler, logging, lightning
from lightning.pytorch.strategies import FSDPStrategy
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
faulthandler.dump_traceback_later(240, exit=True)  # where each thread of a rank that hangs is
print(f"torch {torch.__version__}, lightning {lightning.__version__}, "
      f"{torch.cuda.device_count()} GPUs", file=sys.stderr, flush=True)
class Net(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.net, self.losses = make(), []
    def training_step(self, batch, batch_idx):
        loss = (self.net(batch[0]) - batch[0]).square().mean()
        self.losses.append(loss.item())
        return loss
    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 0.5)
for way in sys.argv[2:]:
    print(f"begins {way}", file=sys.stderr, flush=True)
    kind, precision = way.split(",")
    trainer = lightning.Trainer(
        accelerator="cuda", devices=2, max_epochs=2, precision=precision, logger=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
        default_root_dir=folder, use_distributed_sampler=False,
        strategy=FSDPStrategy(state_dict_type=kind, auto_wrap_policy={torch.nn.Linear}))
    module = Net()
    data = torch.utils.data.TensorDataset(rows[trainer.global_rank::2])
    loader = torch.utils.data.DataLoader(data, batch_size=3)
    trainer.fit(module, loader, ckpt_path=f"{folder}/{way},first")
    assert trainer.global_step == 8, trainer.global_step
    note(f"{way},second_losses", trainer.global_rank, module.losses)
    trainer.save_checkpoint(f"{folder}/{way},second")
)";

// Losses, weights and the optimizer's state, in one tensor for each.
std::map<std::string, at::Tensor> tensors_of(const State& checkpoint) {
  std::map<std::string, at::Tensor> all;
  for (const auto& [name, weight] : checkpoint.at("state_dict").as_dict()) {
    all[to_string(name)] = weight.as_tensor();
  }
  const auto& optimizer = checkpoint.at("optimizer_states").as_list().at(0);
  for (const auto& [number, entry] : optimizer.at("state").as_dict()) {
    for (const auto& [key, value] : entry.as_dict()) {
      all[to_string(number) + "." + to_string(key)] = value.as_tensor();
    }
  }
  return all;
}

}  // namespace

TEST_CASE("program: trains in each way that Lightning's FSDPStrategy has too", "[.program]") {
  const auto from = Ranks::variable("FROM"), to = Ranks::variable("TO");
  for (const auto& way : kWays) {
    CAPTURE(way.type, way.precision);
    auto flags = TrainerOptions().accelerator("gpu").strategy(
        FSDPStrategyOptions().state_dict_type(way.type).auto_wrap_policy({"Linear"}));
    if (way.precision == "16-mixed") {  // whose scale is not that with which Python's begins
      flags.plugins({std::make_shared<MixedPrecision>(
          way.precision, std::make_shared<GradScaler>(GradScalerOptions().init_scale(1024)))});
    } else {
      flags.precision(way.precision);
    }
    train(flags, from.empty() ? "" : way.named(from), way.named(to));
  }
}

TEST_CASE("Lightning's FSDPStrategy takes up a sharded run and gives it back on two GPUs",
          "[ranks][python][gpu]") {
  if (torch::cuda::device_count() < 2) {
    WARN("needs two GPUs");
    return;
  }
  Ranks program;
  const auto folder = program.dir().path();
  const auto run = [&](const char* from, const char* to, const char* epochs) {
    const auto ended = program.run(
        "program: trains in each way that Lightning's FSDPStrategy has too",
        {{"FROM", from}, {"TO", to}, {"EPOCHS", epochs}}, {}, nullptr, std::chrono::seconds(120));
    INFO(ended.output);
    REQUIRE(ended.status == 0);
  };
  write_torch_file(noise(24, 3), folder + "/rows.pt");
  run("", "first", "1");
  std::vector<std::string> arguments{folder};
  for (const auto& way : kWays) arguments.push_back(way.type + "," + way.precision);
  run_python(kFSDPStrategy, arguments);
  run("second", "third", "3");
  run("", "at_once", "3");

  const auto load = [&](const std::string& name) {
    return default_checkpoint_io()->load(folder + "/" + name);
  };
  for (const auto& way : kWays) {
    CAPTURE(way.type, way.precision);
    const auto expected = losses_of(folder, way.named("at_once_losses"));
    for (size_t rank = 0; rank < 2; ++rank) {
      CAPTURE(rank);
      std::vector<float> losses;
      for (const char* part : {"first_losses", "second_losses", "third_losses"}) {
        const auto some = losses_of(folder, way.named(part))[rank];
        CAPTURE(part);
        CHECK(some.size() == 4);
        losses.insert(losses.end(), some.begin(), some.end());
      }
      CAPTURE(losses, expected[rank]);
      REQUIRE(expected[rank].size() == losses.size());
      for (size_t i = 0; i < losses.size(); ++i) {
        CHECK(losses[i] == Approx(expected[rank][i]).epsilon(way.tolerance));
      }
    }
    const auto third = load(way.named("third")), at_once = load(way.named("at_once"));
    const auto is = tensors_of(third), should = tensors_of(at_once);
    REQUIRE(is.size() == 16);  // four parameters, and three of the optimizer's for each
    for (const auto& [name, tensor] : should) {
      CAPTURE(name, tensor, is.at(name));
      const auto distance = (is.at(name) - tensor).abs().max().item<double>();
      CHECK(distance <= way.tolerance * tensor.abs().max().item<double>());
    }
    if (way.precision != "16-mixed") continue;
    const auto& scaler = third.at("FSDPPrecision");
    CHECK(scaler.at("scale").as_double() == 1024);
    CHECK(scaler.at("_growth_tracker").as_int() == 12);
    CHECK(scaler.repr() == at_once.at("FSDPPrecision").repr());
  }
}
