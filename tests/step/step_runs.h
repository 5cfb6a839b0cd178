// A module that does what a step may do, and what of a run is compared: for tests of step
// executors.
#pragma once

#include <torch/torch.h>

#include <catch2/catch.hpp>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "lightning.h"
#include "lightning/log.h"
#include "tests/support/memory_logger.h"
#include "tests/support/temp_dir.h"

namespace lightning::testing {

// What is said while it lives.
struct Said {
  Said() {
    before = set_log_sink([this](const std::string& line) { text += line + "\n"; });
  }
  ~Said() { set_log_sink(std::move(before)); }

  int64_t count(const std::string& words) const {
    int64_t found = 0;
    for (auto at = text.find(words); at != std::string::npos; at = text.find(words, at + 1)) {
      ++found;
    }
    return found;
  }

  std::string text;
  LogSink before;
};

// ---- A module that does what a step may do ------------------------------------------------------

struct Net : LightningModule {
  Net() {
    torch::manual_seed(3);
    first = register_module("first", torch::nn::Linear(6, 8));
    dropout = register_module("dropout", torch::nn::Dropout(0.3));
    last = register_module("last", torch::nn::Linear(8, 1));
  }

  StepOutput training_step(const Batch& batch, int64_t batch_idx) override {
    if (in_step) in_step(*this, batch_idx);
    const auto out = last(dropout(torch::relu(first(batch["x"]))));
    const auto loss = torch::mse_loss(out, batch["y"]);
    log("loss", loss, LogOptions().on_step(true).on_epoch(true).prog_bar(true));
    log("largest", out.abs().max(), LogOptions().on_step(false).on_epoch(true).reduce_fx("max"));
    mean(loss.detach());
    log("mean", mean, LogOptions().on_step(true).on_epoch(true));
    return StepOutput(Batch::map({{"loss", loss}, {"out", out}}));
  }
  void on_train_batch_end(const StepOutput& output, const Batch&, int64_t batch_idx) override {
    losses.push_back(output.loss());
    outs.push_back(output.extra()["out"]);
    if (after_batch) after_batch(*this, batch_idx);
  }
  StepOutput validation_step(const Batch& batch, int64_t) override {
    log("val_loss", torch::mse_loss(last(dropout(first(batch["x"]))), batch["y"]));
    return {};
  }
  Optimizers configure_optimizers() override {
    std::shared_ptr<torch::optim::Optimizer> optimizer;
    if (adamw) {
      optimizer =
          std::make_shared<torch::optim::AdamW>(parameters(), torch::optim::AdamWOptions(0.02));
    } else {
      optimizer = std::make_shared<torch::optim::SGD>(parameters(),
                                                      torch::optim::SGDOptions(0.05).momentum(0.9));
    }
    return Optimizers(
        {optimizer},
        {LRSchedulerConfig(std::make_shared<StepLR>(*optimizer, StepLROptions(3).gamma(0.7)))
             .set_interval("step")});
  }

  torch::nn::Linear first{nullptr}, last{nullptr};
  torch::nn::Dropout dropout{nullptr};
  Mean mean;
  bool adamw = false;
  std::vector<at::Tensor> losses, outs;
  std::function<void(Net&, int64_t batch_idx)> in_step, after_batch;
};

// Batches of 4 rows; the last one of an epoch has `rest`.
inline Loaders data(int64_t batches = 6, int64_t rest = 4) {
  auto generator = at::make_generator<at::CPUGeneratorImpl>(1);
  const int64_t rows = 4 * (batches - 1) + rest;
  return DataLoader(TensorDataset(Batch::map({{"x", at::randn({rows, 6}, generator)},
                                              {"y", at::randn({rows, 1}, generator)}})),
                    DataLoaderOptions(4));
}

struct Outcome {
  std::vector<at::Tensor> weights, losses, outs;
  std::vector<std::pair<int64_t, MetricRow>> rows;
  MetricMap metrics;
  int64_t global_step = 0;
};

inline TrainerOptions options_in(const TempDir& dir) {
  return TrainerOptions()
      .accelerator("cpu")
      .max_epochs(3)
      .log_every_n_steps(1)
      .enable_progress_bar(false)
      .enable_model_summary(false)
      .enable_checkpointing(false)
      .default_root_dir(dir.path());
}

inline Outcome outcome(const TrainerOptions& given, const std::shared_ptr<Net>& net,
                       const Loaders& train, const Loaders& val = {}) {
  auto logger = std::make_shared<MemoryLogger>();
  auto options = given;
  Trainer trainer(options.logger(logger));
  torch::manual_seed(11);
  trainer.fit(net, train, val);
  Outcome made;
  for (const auto& parameter : net->parameters()) made.weights.push_back(parameter.detach().cpu());
  for (const auto& loss : net->losses) made.losses.push_back(loss.cpu());
  for (const auto& out : net->outs) made.outs.push_back(out.cpu());
  made.rows = logger->rows;
  made.metrics = trainer.callback_metrics();
  made.global_step = trainer.global_step();
  return made;
}

inline void check_same(const std::vector<at::Tensor>& a, const std::vector<at::Tensor>& b,
                       const char* what) {
  REQUIRE(a.size() == b.size());
  for (size_t i = 0; i < a.size(); ++i) {
    INFO(what << " " << i << ", difference " << (a[i] - b[i]).abs().max().item<double>());
    CHECK(at::equal(a[i], b[i]));
  }
}

inline void check_same(const Outcome& a, const Outcome& b) {
  check_same(a.losses, b.losses, "loss of batch");
  check_same(a.outs, b.outs, "output of batch");
  check_same(a.weights, b.weights, "parameter");
  CHECK(a.global_step == b.global_step);
  REQUIRE(a.rows.size() == b.rows.size());
  for (size_t i = 0; i < a.rows.size(); ++i) {
    INFO("row " << i);
    CHECK(a.rows[i] == b.rows[i]);
  }
  CHECK(a.metrics.size() == b.metrics.size());
  for (const auto& [name, value] : a.metrics) {
    INFO(name);
    REQUIRE(b.metrics.count(name) == 1);
    CHECK(value.item<double>() == b.metrics.at(name).item<double>());
  }
}

}  // namespace lightning::testing
