// The Trainer's flags as the loops use them: checked, with every default filled in.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <variant>

#include "lightning/strategy.h"

namespace lightning {

using BatchLimit = std::variant<int64_t, double>;  // a count, or a fraction of the loader's length

struct Settings {
  int64_t max_epochs = -1;  // -1: no end
  int64_t min_epochs = 0;
  int64_t max_steps = -1;
  std::optional<int64_t> min_steps;

  BatchLimit limit_train_batches = 1.0;
  BatchLimit limit_val_batches = 1.0;
  BatchLimit limit_test_batches = 1.0;
  BatchLimit limit_predict_batches = 1.0;
  bool overfits = false;
  int64_t fast_dev_run = 0;  // batches; 0: off

  // One of the three decides when validation runs.
  std::optional<int64_t> val_check_batches;
  std::optional<double> val_check_seconds;
  double val_check_fraction = 1.0;
  int64_t check_val_every_n_epoch = 1;  // 0: batches are counted over epochs
  int64_t num_sanity_val_steps = 2;     // -1: all

  int64_t log_every_n_steps = 50;
  int64_t accumulate_grad_batches = 1;
  bool accumulation_changed = false;  // by a callback, from what the flag says
  std::optional<double> gradient_clip_val;
  std::optional<std::string> gradient_clip_algorithm;
  int64_t reload_dataloaders_every_n_epochs = 0;
  bool inference_mode = true;
  bool use_distributed_sampler = true;
  bool detect_anomaly = false;
  std::string sync_debug_mode = "default";
  bool barebones = false;
  bool autolog_hparams = true;
  std::string default_root_dir;

  // Whether fit validates in this epoch at all.
  bool validates_in(int64_t epoch) const {
    return check_val_every_n_epoch == 0 || (epoch + 1) % check_val_every_n_epoch == 0;
  }
};

}  // namespace lightning
