// What the Trainer costs per step over a bare LibTorch loop; the peer is trainer_overhead.py.
//
// A small MLP on one CPU thread, with all default callbacks, a CSV logger and train_loss on the
// progress bar at each step. Wants a terminal for its output and a folder for what it writes
// (--folder); benchmarks/run.py gives it both.
// Prints `overhead_us N`.
#include <torch/torch.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <memory>
#include <string>
#include <vector>

#include "lightning.h"

namespace {

using Clock = std::chrono::steady_clock;

// The framework steps LibTorch's own SGD by a fused kernel. A class of the user's keeps its own
// step, so that the trained and the bare loop do the same work and only the Trainer differs.
struct OwnSGD : torch::optim::SGD {
  using torch::optim::SGD::SGD;
};

struct MLP : lightning::LightningModule {
  MLP() {
    first = register_module("first", torch::nn::Linear(32, 64));
    second = register_module("second", torch::nn::Linear(64, 10));
  }
  at::Tensor loss(const lightning::Batch& batch) {
    return at::cross_entropy_loss(second->forward(at::relu(first->forward(batch["x"]))),
                                  batch["y"]);
  }
  lightning::StepOutput training_step(const lightning::Batch& batch, int64_t) override {
    times.push_back(Clock::now());
    const at::Tensor value = loss(batch);
    log("train_loss", value, lightning::LogOptions().prog_bar(true));
    return value;
  }
  lightning::Optimizers configure_optimizers() override { return OwnSGD(parameters(), 0.01); }

  torch::nn::Linear first{nullptr}, second{nullptr};
  std::vector<Clock::time_point> times;
};

lightning::DataLoader batches(int64_t count) {
  std::vector<lightning::Batch> all;
  for (int64_t i = 0; i < count; ++i) {
    all.push_back(lightning::Batch::map(
        {{"x", torch::randn({32, 32})}, {"y", torch::randint(0, 10, {32}, at::kLong)}}));
  }
  return lightning::DataLoader(
      lightning::FunctionDataset(count, [all](int64_t i) { return all[i]; }),
      lightning::DataLoaderOptions().batch_size(std::nullopt));
}

// Of a step, without the first epoch, which warms up.
double microseconds(const std::vector<Clock::time_point>& times, int64_t steps) {
  const std::chrono::duration<double, std::micro> taken = times.back() - times.at(steps);
  return taken.count() / static_cast<double>(static_cast<int64_t>(times.size()) - 1 - steps);
}

double bare(lightning::DataLoader& loader, int64_t steps, int64_t epochs) {
  MLP module;
  OwnSGD optimizer(module.parameters(), 0.01);
  for (int64_t epoch = 0; epoch < epochs; ++epoch) {
    for (auto pass = loader.iterate(); auto batch = pass->next();) {
      module.times.push_back(Clock::now());
      const at::Tensor loss = module.loss(*batch);
      optimizer.zero_grad();
      loss.backward();
      optimizer.step();
    }
  }
  return microseconds(module.times, steps);
}

double trained(const lightning::DataLoader& loader, int64_t epochs, const std::string& folder) {
  const auto module = std::make_shared<MLP>();
  lightning::Trainer trainer(lightning::TrainerOptions()
                                 .accelerator("cpu")
                                 .max_epochs(epochs)
                                 .default_root_dir(folder)
                                 .logger(lightning::CSVLoggerOptions(folder)));
  trainer.fit(module, loader);
  return microseconds(module->times, static_cast<int64_t>(module->times.size()) / epochs);
}

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

std::string argument(int argc, char** argv, const std::string& name, const std::string& otherwise) {
  for (int i = 1; i + 1 < argc; ++i) {
    if (argv[i] == "--" + name) return argv[i + 1];
  }
  return otherwise;
}

}  // namespace

int main(int argc, char** argv) {
  const int64_t steps = std::stoll(argument(argc, argv, "steps", "500"));
  const int64_t epochs = std::stoll(argument(argc, argv, "epochs", "4"));
  const int64_t repeats = std::stoll(argument(argc, argv, "repeats", "3"));
  const std::string folder = argument(argc, argv, "folder", "/tmp/trainer_overhead");
  torch::set_num_threads(1);
  auto loader = batches(steps);
  std::vector<double> alone, under_trainer, overhead;
  for (int64_t i = 0; i < repeats; ++i) {
    alone.push_back(bare(loader, steps, epochs));
    under_trainer.push_back(trained(loader, epochs, folder));
    overhead.push_back(under_trainer.back() - alone.back());
  }
  std::printf("bare_us %.2f\ntrainer_us %.2f\noverhead_us %.2f\n", median(alone),
              median(under_trainer), median(overhead));
}
