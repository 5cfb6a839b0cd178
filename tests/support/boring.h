// The smallest module that trains, and data for it.
//
//   auto module = std::make_shared<BoringModule>();
//   module->val_losses = {1.0, 0.9, 0.9};  // logged as val_loss, one for each validation
//   Trainer trainer(quiet(dir).max_epochs(3));
//   trainer.fit(module);
#pragma once

#include <torch/nn/modules/linear.h>

#include <functional>
#include <vector>

#include "lightning/data/loader.h"
#include "lightning/module.h"
#include "lightning/trainer_options.h"
#include "tests/support/temp_dir.h"

namespace lightning::testing {

// A Trainer on the CPU that adds nothing of its own: no logger, progress bar, summary, checkpoints.
TrainerOptions quiet(const TempDir& dir);

// `rows` random rows of `columns`, the same in every run, in batches of tensors [batch_size,
// columns], in order.
Loaders random_loader(int64_t rows = 8, int64_t batch_size = 2, int64_t columns = 32);

// Linear(32, 2) with SGD at 0.1. Its own data: 4 batches to train, 2 each to validate, test and
// predict. Logs train_loss in each step.
class BoringModule : public LightningModule {
 public:
  BoringModule();

  StepOutput training_step(const Batch& batch, int64_t batch_idx) override;
  StepOutput validation_step(const Batch& batch, int64_t batch_idx) override;
  void on_validation_epoch_end() override;
  StepOutput test_step(const Batch& batch, int64_t batch_idx) override;
  Batch predict_step(const Batch& batch, int64_t batch_idx) override;
  Optimizers configure_optimizers() override;
  Loaders train_dataloader() override { return random_loader(); }
  Loaders val_dataloader() override { return random_loader(4); }
  Loaders test_dataloader() override { return random_loader(4); }
  Loaders predict_dataloader() override { return random_loader(4); }

  at::Tensor forward(const at::Tensor& rows) { return layer(rows); }
  // Mean square of the distance to ones.
  at::Tensor loss(const Batch& batch);

  torch::nn::Linear layer{nullptr};
  // Logged as val_loss at the end of the n-th validation, the last again beyond the end, sanity
  // checks not counted; empty for the loss itself.
  std::vector<double> val_losses;
  // Called at the start of each training step.
  std::function<void(BoringModule&, int64_t batch_idx)> before_training_step;

 private:
  size_t validations_ = 0;
};

}  // namespace lightning::testing
