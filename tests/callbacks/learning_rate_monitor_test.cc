#include "callbacks/learning_rate_monitor.h"

#include <torch/optim/adam.h>
#include <torch/optim/sgd.h>

#include <catch2/catch.hpp>
#include <nlohmann/json.hpp>
#include <sstream>

#include "lightning/optim/schedulers.h"
#include "lightning/registry.h"
#include "lightning/trainer.h"
#include "tests/support/boring.h"
#include "tests/support/memory_logger.h"
#include "tests/support/python.h"
#include "tests/support/temp_dir.h"

using namespace lightning;
using namespace lightning::testing;
using Catch::Contains;

namespace {

// Adam with a schedule by step, SGD with one by epoch, a second SGD of two groups without one.
struct Module : BoringModule {
  Module() {
    second = register_module("second", torch::nn::Linear(32, 2));
    third = register_module("third", torch::nn::Linear(32, 2));
    set_automatic_optimization(false);
  }
  StepOutput training_step(const Batch& batch, int64_t batch_idx) override {
    for (auto& one : optimizers()) one->step();
    if (lr_schedulers().size() == 2) {
      lr_schedulers()[0]->step();
      if (batch_idx == 3) lr_schedulers()[1]->step();
    }
    return loss(batch);
  }
  Optimizers configure_optimizers() override {
    auto adam = std::make_shared<torch::optim::Adam>(layer->parameters(), 0.01);
    auto sgd = std::make_shared<torch::optim::SGD>(
        second->parameters(), torch::optim::SGDOptions(0.1).momentum(0.5).weight_decay(0.25));
    std::vector<torch::optim::OptimizerParamGroup> groups;
    groups.emplace_back(std::vector<at::Tensor>{third->weight});
    groups.emplace_back(std::vector<at::Tensor>{third->bias},
                        std::make_unique<torch::optim::SGDOptions>(2.0));
    auto grouped = std::make_shared<torch::optim::SGD>(groups, torch::optim::SGDOptions(1.0));
    return {
        {{adam, LRSchedulerConfig(std::make_shared<ExponentialLR>(adam, ExponentialLROptions(0.5)))
                    .set_interval("step")
                    .set_name("fast")},
         {sgd, LRSchedulerConfig(std::make_shared<ExponentialLR>(sgd, ExponentialLROptions(0.1)))},
         {grouped}}};
  }
  torch::nn::Linear second{nullptr}, third{nullptr};
};

const char* const kPython = R"(
import json, logging, sys, warnings
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import Logger
warnings.filterwarnings("ignore")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
options, folder = json.loads(sys.argv[1]), sys.argv[2]

class Module(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer, self.second, self.third = (torch.nn.Linear(32, 2) for _ in range(3))
        self.automatic_optimization = False
    def training_step(self, batch, batch_idx):
        for one in self.optimizers():
            one.step()
        self.lr_schedulers()[0].step()
        if batch_idx == 3:
            self.lr_schedulers()[1].step()
        return self.layer(batch).sum()
    def configure_optimizers(self):
        adam = torch.optim.Adam(self.layer.parameters(), 0.01)
        sgd = torch.optim.SGD(self.second.parameters(), 0.1, momentum=0.5, weight_decay=0.25)
        grouped = torch.optim.SGD([{"params": [self.third.weight]},
                                   {"params": [self.third.bias], "lr": 2.0}], 1.0)
        decay = torch.optim.lr_scheduler.ExponentialLR
        return ([adam, sgd, grouped],
                [{"scheduler": decay(adam, 0.5), "interval": "step", "name": "fast"},
                 {"scheduler": decay(sgd, 0.1)}])

class Memory(Logger):
    name = "memory"
    version = 0
    def log_metrics(self, metrics, step):
        print(json.dumps([step, sorted(metrics.items())]))
    def log_hyperparams(self, *args): pass

trainer = Trainer(accelerator="cpu", logger=Memory(), callbacks=[LearningRateMonitor(**options)],
                  enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
                  default_root_dir=folder, max_epochs=2, log_every_n_steps=2)
trainer.fit(Module(), torch.utils.data.DataLoader(torch.randn(8, 32), batch_size=2))
)";

}  // namespace

TEST_CASE("learning rates are logged under the original's names, when it logs them",
          "[callbacks]") {
  const TempDir dir;
  const auto options = GENERATE(as<std::string>{}, "{}", R"({"logging_interval": "step"})",
                                R"({"logging_interval": "epoch", "log_momentum": true,
                                    "log_weight_decay": true})");
  CAPTURE(options);
  auto logger = std::make_shared<MemoryLogger>();
  Trainer trainer(
      quiet(dir)
          .logger(logger)
          .callbacks({registry<Callback>().make("LearningRateMonitor", Json::parse(options))})
          .limit_val_batches(int64_t{0})
          .max_epochs(2)
          .log_every_n_steps(2));
  trainer.fit(std::make_shared<Module>(), random_loader(8));

  std::istringstream python(run_python(kPython, {options, dir.path("python")}));
  std::string line;
  size_t row = 0;
  for (; std::getline(python, line); ++row) {
    const Json theirs = Json::parse(line);
    REQUIRE(row < logger->rows.size());
    auto [step, ours] = logger->rows[row];
    std::sort(ours.begin(), ours.end());
    CHECK(step == theirs[0].get<int64_t>());
    REQUIRE(ours.size() == theirs[1].size());
    for (size_t i = 0; i < ours.size(); ++i) {
      CHECK(ours[i].first == theirs[1][i][0].get<std::string>());
      CHECK(ours[i].second == Approx(theirs[1][i][1].get<double>()));
    }
  }
  CHECK(row == logger->rows.size());
}

TEST_CASE("learning rates become callback metrics", "[callbacks]") {
  const TempDir dir;
  Trainer trainer(quiet(dir)
                      .logger(std::make_shared<MemoryLogger>())
                      .callbacks({std::make_shared<LearningRateMonitor>()})
                      .max_epochs(1));
  trainer.fit(std::make_shared<BoringModule>());
  CHECK(trainer.metric("lr-SGD") == Approx(0.1));
}

TEST_CASE("a learning rate monitor wants a logger and an interval that there is", "[callbacks]") {
  const TempDir dir;
  Trainer trainer(quiet(dir).callbacks({std::make_shared<LearningRateMonitor>()}).max_epochs(1));
  CHECK_THROWS_WITH(trainer.fit(std::make_shared<BoringModule>()), Contains("without a logger"));
  CHECK_THROWS_WITH(LearningRateMonitor(LearningRateMonitorOptions().logging_interval("batch")),
                    Contains("got logging_interval \"batch\""));
}
