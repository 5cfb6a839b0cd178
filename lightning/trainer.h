// Drives a LightningModule through fit, validate, test and predict.
//
//   lightning::Trainer trainer(lightning::TrainerOptions().max_epochs(5).precision("bf16-true"));
//   trainer.fit(std::make_shared<Classifier>(), train_loader, val_loader);
//
// All flags are checked when the Trainer is made. It may run many times; one run at a time, on the
// calling thread. An exception of a hook leaves the run after every callback's on_exception().
// Source: Lightning 2.6, `Trainer`.
#pragma once

#include <torch/arg.h>

#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "lightning/batch.h"
#include "lightning/callback.h"
#include "lightning/data/loader.h"
#include "lightning/fwd.h"
#include "lightning/metric_map.h"
#include "lightning/optim/optimizers.h"
#include "lightning/scope.h"
#include "lightning/trainer_options.h"
#include "lightning/trainer_state.h"

namespace lightning {

// Metrics of one data loader after validate or test, by name.
using EvaluationResult = std::map<std::string, double>;

// What a run may be told beside its data.
class RunArguments {
 public:
  TORCH_ARG(std::string, ckpt_path);  // a file, "best", "last", "hpc"; empty for none
  TORCH_ARG(bool, verbose) = true;    // prints the table of results
  // Whether predict gives its batches back; false where they are too many to keep.
  TORCH_ARG(bool, return_predictions) = true;
};

class Trainer {
 public:
  // Errors: MisconfigurationError for a value that makes no sense, with the flag's name.
  explicit Trainer(TrainerOptions options = {});
  ~Trainer();
  Trainer(const Trainer&) = delete;
  Trainer& operator=(const Trainer&) = delete;

  // ---- Runs -------------------------------------------------------------------------------------
  // Data comes from loaders given here, from a data module, or from the module's own hooks.

  void fit(std::shared_ptr<LightningModule> module, Loaders train_dataloaders = {},
           Loaders val_dataloaders = {}, const RunArguments& arguments = {});
  void fit(std::shared_ptr<LightningModule> module, std::shared_ptr<LightningDataModule> datamodule,
           const RunArguments& arguments = {});

  void fit(std::shared_ptr<LightningModule> module, const RunArguments& arguments) {
    fit(std::move(module), Loaders(), Loaders(), arguments);
  }

  // Without a module the last one is used, with its best checkpoint. One result for each loader.
  std::vector<EvaluationResult> validate(std::shared_ptr<LightningModule> module = nullptr,
                                         Loaders dataloaders = {},
                                         const RunArguments& arguments = {});
  std::vector<EvaluationResult> validate(std::shared_ptr<LightningModule> module,
                                         std::shared_ptr<LightningDataModule> datamodule,
                                         const RunArguments& arguments = {});
  std::vector<EvaluationResult> validate(std::shared_ptr<LightningModule> module,
                                         const RunArguments& arguments) {
    return validate(std::move(module), Loaders(), arguments);
  }
  std::vector<EvaluationResult> validate(const RunArguments& arguments) {
    return validate(nullptr, Loaders(), arguments);
  }
  std::vector<EvaluationResult> test(std::shared_ptr<LightningModule> module = nullptr,
                                     Loaders dataloaders = {}, const RunArguments& arguments = {});
  std::vector<EvaluationResult> test(std::shared_ptr<LightningModule> module,
                                     std::shared_ptr<LightningDataModule> datamodule,
                                     const RunArguments& arguments = {});
  std::vector<EvaluationResult> test(std::shared_ptr<LightningModule> module,
                                     const RunArguments& arguments) {
    return test(std::move(module), Loaders(), arguments);
  }
  std::vector<EvaluationResult> test(const RunArguments& arguments) {
    return test(nullptr, Loaders(), arguments);
  }
  // Predictions of each loader, in the order of its batches.
  std::vector<std::vector<Batch>> predict(std::shared_ptr<LightningModule> module = nullptr,
                                          Loaders dataloaders = {},
                                          const RunArguments& arguments = {});
  std::vector<std::vector<Batch>> predict(std::shared_ptr<LightningModule> module,
                                          std::shared_ptr<LightningDataModule> datamodule,
                                          const RunArguments& arguments = {});
  std::vector<std::vector<Batch>> predict(std::shared_ptr<LightningModule> module,
                                          const RunArguments& arguments) {
    return predict(std::move(module), Loaders(), arguments);
  }
  std::vector<std::vector<Batch>> predict(const RunArguments& arguments) {
    return predict(nullptr, Loaders(), arguments);
  }

  // Around the construction of a model that this Trainer will run, beside configure_model, which
  // has it of itself: parameters and buffers are made on this process's device, in the dtype of the
  // precision.
  //   empty_init   true: without memory or draws, in no time; their values, the same bit for bit as
  //                of an ordinary construction on that device, are made when a run sets the model
  //                up, or come from its ckpt_path. Until then they can be neither read nor
  //                written. Under fsdp no process ever holds them all. false: at once, under fsdp
  //                on the host. None: the strategy decides: fsdp as true, the others as false.
  // Source: Lightning 2.6, `Trainer.init_module`.
  Scope init_module(std::optional<bool> empty_init = std::nullopt);
  // Around the creation of tensors: on this process's device, floating point in the precision's
  // dtype. Literals (torch::tensor({1, 2})) stay on the CPU.
  // Source: Lightning 2.6, `Fabric.init_tensor`.
  Scope init_tensor();

  // Ends fit after the batch that runs, once min_epochs and min_steps are reached. Where only some
  // of several ranks say so, all end after the first batch that none of them has passed, and
  // should_stop() is false until then.
  void set_should_stop(bool stop);
  bool should_stop() const;

  // Saves the run's state. Errors: CheckpointError; std::runtime_error without a module.
  void save_checkpoint(const std::string& path, bool weights_only = false);

  // ---- What it is made of -----------------------------------------------------------------------

  const TrainerOptions& options() const { return options_; }
  Strategy& strategy() const;
  Precision& precision() const;
  Accelerator& accelerator() const;
  LightningModule& lightning_module() const;
  LightningDataModule* datamodule() const;  // null where there is none
  const std::vector<std::shared_ptr<Callback>>& callbacks() const;
  const std::vector<std::shared_ptr<Logger>>& loggers() const;
  Profiler* profiler() const;  // null where there is none
  std::vector<std::shared_ptr<torch::optim::Optimizer>> optimizers() const;
  const std::vector<LRSchedulerConfig>& lr_scheduler_configs() const;

  // The callbacks of a type, in their order.
  template <class C>
  std::vector<C*> callbacks_of() const {
    std::vector<C*> found;
    for (const auto& callback : callbacks()) {
      if (auto* one = dynamic_cast<C*>(callback.get())) found.push_back(one);
    }
    return found;
  }
  // The first of these, or null.
  Callback* checkpoint_callback() const;
  Callback* early_stopping_callback() const;
  Callback* progress_bar_callback() const;

  // ---- Where it stands --------------------------------------------------------------------------

  int64_t current_epoch() const;  // epochs completed
  int64_t global_step() const;    // optimizer steps
  // Batches after which an optimizer stepped: the loggers' x-axis.
  int64_t batches_that_stepped() const;
  int64_t batch_idx() const;  // of the batch that runs, within the epoch
  bool is_last_batch() const;
  RunningStage stage() const;
  TrainerStatus status() const;
  bool training() const { return stage() == RunningStage::kTraining; }
  bool sanity_checking() const { return stage() == RunningStage::kSanityChecking; }
  bool validating() const { return stage() == RunningStage::kValidating; }
  bool testing() const { return stage() == RunningStage::kTesting; }
  bool predicting() const { return stage() == RunningStage::kPredicting; }
  bool evaluating() const { return validating() || testing(); }
  bool interrupted() const { return status() == TrainerStatus::kInterrupted; }
  // Which of fit, validate, test, predict runs or ran last.
  Stage state_fn() const;

  int64_t global_rank() const;
  int64_t local_rank() const;
  int64_t world_size() const;
  bool is_global_zero() const { return global_rank() == 0; }

  // ---- Limits, as they apply --------------------------------------------------------------------
  // Counts of batches are nullopt where a loader does not know its length and no limit is set.

  int64_t max_epochs() const;  // -1: none
  int64_t min_epochs() const;
  int64_t max_steps() const;
  std::optional<int64_t> min_steps() const;
  int64_t log_every_n_steps() const;
  int64_t accumulate_grad_batches() const;
  void set_accumulate_grad_batches(int64_t batches);
  bool fast_dev_run() const;
  bool barebones() const;
  // Whether a validation loop exists and may run.
  bool enable_validation() const;
  int64_t check_val_every_n_epoch() const;   // 0: counted over epochs (the flag is null)
  bool val_check_interval_is_epoch() const;  // 1.0
  // Batches between two validations; nullopt where it goes by time or by the epoch's unknown end.
  std::optional<int64_t> val_check_batch() const;
  std::optional<int64_t> num_training_batches() const;
  std::vector<std::optional<int64_t>> num_val_batches() const;
  std::vector<std::optional<int64_t>> num_sanity_val_batches() const;
  std::vector<std::optional<int64_t>> num_test_batches() const;
  std::vector<std::optional<int64_t>> num_predict_batches() const;
  // Optimizer steps of the whole fit, as far as known; nullopt: no end.
  std::optional<int64_t> estimated_stepping_batches();
  Loaders train_dataloader() const;

  // ---- What was predicted, for prediction writers -----------------------------------------------

  // Places in the data set of the samples of the batch that runs; empty where nobody asked for
  // them or the loader does not know them.
  const std::vector<int64_t>& predict_batch_indices() const;
  // The same of all batches of each loader, and their predictions on the host, where a writer asked
  // for them.
  const std::vector<std::vector<std::vector<int64_t>>>& predict_epoch_batch_indices() const;
  const std::vector<std::vector<Batch>>& predictions() const;

  // ---- What was logged --------------------------------------------------------------------------

  const MetricMap& callback_metrics() const;
  const MetricMap& logged_metrics() const;
  const MetricMap& progress_bar_metrics() const;
  // callback_metrics()[name] on the host; nullopt where it was not logged. Waits for the device.
  std::optional<double> metric(const std::string& name) const;
  // Sends values to every logger, as a callback does. Adds nothing; `step` is the x-axis.
  void log_metrics(const std::vector<std::pair<std::string, double>>& metrics, int64_t step);
  // Values that callbacks add to callback_metrics.
  void add_callback_metric(const std::string& name, double value);

  const std::string& default_root_dir() const;
  // The first logger's folder; default_root_dir without one.
  std::string log_dir() const;
  // A line on rank 0's terminal, above the progress bar.
  void print(const std::string& line) const;
  // The checkpoint this run was resumed from; empty for none.
  const std::string& ckpt_path() const;

 private:
  struct Engine;

  TrainerOptions options_;
  std::unique_ptr<Engine> engine_;
};

}  // namespace lightning
