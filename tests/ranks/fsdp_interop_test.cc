// Python takes up the sharded checkpoints of C++ and the other way round, in the middle of a
// training: torch's own fully_shard, and Lightning's ModelParallelStrategy on the CPU.
#include <torch/torch.h>

#include <catch2/catch.hpp>
#include <fstream>
#include <iomanip>

#include "lightning.h"
#include "lightning/checkpoint/torch_file.h"
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

TEST_CASE("program: trains a part of an epoch after epoch", "[.program]") {
  Trainer trainer(TrainerOptions()
                      .accelerator("cpu")
                      .devices(2)
                      .strategy(FSDPStrategyOptions().state_dict_type("sharded").checkpoint_layout(
                          Ranks::variable("LAYOUT")))
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
  const auto from = Ranks::variable("FROM");
  if (!from.empty()) arguments.ckpt_path(in_folder(from));
  const auto rows = noise(24, 3).slice(0, trainer.global_rank(), std::nullopt, 2);
  trainer.fit(module, DataLoader(TensorDataset(Batch(rows)), DataLoaderOptions(3)), {}, arguments);
  std::ofstream file(in_folder(str(Ranks::variable("TO"), "_losses.", trainer.global_rank())));
  for (const float loss : module->losses) file << std::setprecision(9) << loss << "\n";
  trainer.save_checkpoint(in_folder(Ranks::variable("TO")));
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
