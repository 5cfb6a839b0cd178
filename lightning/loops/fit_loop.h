// Training over epochs, and over the batches of one.
// Source: Lightning 2.6, `_FitLoop`, `_TrainingEpochLoop`; the reference's sections 1.5 and 11.
#pragma once

#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "lightning/accelerator.h"
#include "lightning/loops/data_setup.h"
#include "lightning/loops/evaluation_loop.h"
#include "lightning/loops/run.h"

namespace lightning {

class FitLoop {
 public:
  explicit FitLoop(Run& run);
  ~FitLoop() { run_.drop_results(&results_); }
  FitLoop(const FitLoop&) = delete;
  FitLoop& operator=(const FitLoop&) = delete;

  void run_sanity_check();
  void run();
  void teardown();

  EvaluationLoop& val_loop() { return val_loop_; }
  std::shared_ptr<CombinedLoader> loader() const { return data_ ? data_->loader : nullptr; }
  // Asks for the training loaders once, or when they are to be reloaded.
  void setup_data();
  // True when a validation loop exists and may run.
  bool enable_validation() const;

  // Counts and positions, under Python's keys.
  State state_dict() const;
  void load_state_dict(const State& state);

  // What Python's keys leave out of a run, so that another process goes on from its place bit for
  // bit: generators, gradients, logged values, modes. None before the first epoch.
  State exact_state();
  // Takes effect in run(), which begins at that place. After load_state_dict().
  void load_exact_state(const State& state);

 private:
  // What a resumed run still has to do of the epoch or of the batch it was saved in.
  enum class EpochRestart { kNone, kOnEpochStart, kMidEpoch, kOnEpochEnd, kResumedOnEpochEnd };
  enum class BatchRestart { kNone, kOnBatchEnd, kOnLast };

  void restore_loader_positions();
  bool done();
  bool validates_this_epoch() const;
  bool validation_due() const;
  void find_restart();
  void start_run();
  void start_epoch();
  void end_epoch();
  void finish_epoch();  // behind the hooks of its end
  void run_epoch();
  void reset_epoch();
  // False when the epoch ends early (the module's on_train_batch_start returned -1).
  bool run_batch();
  bool ends_for_all(bool ends);
  bool restart_without_batch();
  void finish_batch();  // behind the hooks of its end
  void after_batch();
  void validate();
  void finish_validation();  // or its absence: what closes a batch
  bool epoch_done();
  OnSync on_sync() const;
  void check_sync_debug_mode() const;
  void step_schedulers(const std::string& interval, bool plateau);
  void check_val_interval();

  bool resumes() const { return !exact_.is_none(); }
  bool resumes_in_epoch() const;
  const State& rank_state() const;  // of exact_, that of this process
  void rewind_counts();
  void restore_exact_state();
  void resume_epoch();
  void resume_between_epochs();

  // Of each submodule whether it is in training mode, of each parameter whether it takes gradients.
  struct Flags {
    std::map<std::string, bool> training, requires_grad;
  };
  Flags flags() const;
  void set_flags(const Flags& flags);
  // Of the metrics that the module has registered; None for one that the end of the evaluation
  // which runs will empty.
  State registered_metrics_state() const;
  void load_registered_metrics_state(const State& state);

  Run& run_;
  EvaluationLoop val_loop_;
  ResultCollection results_{true};
  std::optional<StageData> data_;
  std::unique_ptr<CombinedIterator> iterator_;
  std::optional<int64_t> loaded_in_epoch_;
  State loader_states_;  // to load once the loaders are there
  State exact_;          // of the run that goes on here, until it does

  // As they were when the validation that runs began.
  int place_in_batches_ = 0;
  std::vector<std::pair<std::string, at::Tensor>> generators_before_validation_;
  Flags flags_before_validation_;
  State val_loop_before_validation_;
  State metrics_before_validation_;

  Flags flags_at_start_, flags_at_end_;  // of run()

  bool restarting_ = false;        // in an epoch that was not finished
  bool batch_restarting_ = false;  // until the first batch after the restart
  bool loaded_ = false;            // from a checkpoint, until the first epoch is done
  bool skip_validation_ = false;
  EpochRestart epoch_restart_ = EpochRestart::kNone;
  BatchRestart batch_restart_ = BatchRestart::kNone;
};

}  // namespace lightning
