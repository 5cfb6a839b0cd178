// A module that draws random numbers and keeps values wherever a user might, and a checkpoint as
// text: for tests that compare an interrupted run with one that was not.
#pragma once

#include <torch/torch.h>

#include <map>
#include <string>

#include "lightning.h"

namespace lightning::testing {

// Every leaf of a tree by its path; tensors with dtype, shape and bytes.
using Leaves = std::map<std::string, std::string>;
Leaves leaves_of(const State& state);
// A line for each leaf that differs; empty where none does.
std::string differences(const Leaves& one, const Leaves& other);

// [rows, 8], the same for a seed.
at::Tensor noise(int64_t rows, uint64_t seed);

// Regression with dropout, batch norm that is frozen from the second epoch on, a moving average
// kept in on_train_batch_end, logged values of all kinds, and three schedules, or two optimizers
// that are stepped by hand after every second and every third batch.
struct Learner : LightningModule {
  explicit Learner(bool by_hand = false);

  at::Tensor loss(const Batch& batch);
  StepOutput training_step(const Batch& batch, int64_t batch_idx) override;
  void on_train_batch_end(const StepOutput& output, const Batch& batch, int64_t batch_idx) override;
  void on_train_epoch_start() override;
  void on_train_epoch_end() override;
  StepOutput validation_step(const Batch& batch, int64_t batch_idx) override;
  void on_validation_epoch_end() override;
  void on_validation_end() override;
  Optimizers configure_optimizers() override;

  bool by_hand;
  torch::nn::Linear first{nullptr}, last{nullptr};
  torch::nn::BatchNorm1d norm{nullptr};
  torch::nn::Dropout dropout{nullptr};
  at::Tensor average;
  Mean mean;
  Mean whole, val_whole, all_along;  // registered; the last is never emptied
};

}  // namespace lightning::testing
