// What a run is made of: the parts it is fitted with, its counts, and the one place from which
// hooks are called and logged values go out. The loops work on a Run; the Trainer owns it and is
// its public face; a module sees it as its ModuleHost.
#pragma once

#include <chrono>
#include <exception>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "lightning/callback.h"
#include "lightning/data/combined_loader.h"
#include "lightning/datamodule.h"
#include "lightning/hooks.h"
#include "lightning/logger.h"
#include "lightning/loops/progress.h"
#include "lightning/loops/results.h"
#include "lightning/loops/settings.h"
#include "lightning/metric_map.h"
#include "lightning/module.h"
#include "lightning/profiler.h"
#include "lightning/step/executor.h"
#include "lightning/strategy.h"
#include "lightning/trainer_state.h"

namespace lightning {

// The loaders given to a call of fit, validate, test or predict.
struct DataSources {
  Loaders train;
  Loaders val;
  Loaders test;
  Loaders predict;
};

// Where in fit a run is, for a checkpoint that is written there: what of the batch or epoch is done
// and what is still to do when another process goes on.
enum class FitPlace : uint8_t {
  kOutside,           // before the first epoch: there is nothing to go on with
  kEpochBoundary,     // the next epoch is to start
  kBatchBoundary,     // the next batch is to be fetched
  kInBatch,           // the batch is to be done again
  kBatchEnd,          // the hooks of on_train_batch_end are done
  kBeforeValidation,  // validation is to start after the batch
  kValidationEnd,     // the hooks of on_validation_end are done
  kEpochEnd,          // the hooks of on_train_epoch_end are done
};

// Counts of fit, which outlive a single call of it.
struct FitProgress {
  FitPlace place = FitPlace::kOutside;
  Progress<TrackerKind::kProcessed> epoch;
  BatchProgress batch;
  OptimizerProgress optimizer;                         // automatic optimization
  Progress<TrackerKind::kReadyCompleted> manual_step;  // manual optimization
  Progress<TrackerKind::kReadyCompleted> scheduler;
  BatchProgress val_batch;
  int64_t batches_that_stepped = 0;
  std::optional<int64_t> max_batches;  // of an epoch; nullopt: not known
  std::optional<int64_t> val_check_batch;
};

// A call of log() in a step that was recorded, with the tensor that holds the value after each
// replay.
struct LoggedCall {
  std::string name;
  LogValue value;
  LogOptions options;      // as given
  at::Tensor batch_value;  // of a metric
};

class Run : public ModuleHost {
 public:
  explicit Run(Trainer& trainer) : trainer_(trainer) {}
  ~Run() override;

  // Lets go of the module and the data module.
  void detach();

  // ---- Parts ------------------------------------------------------------------------------------

  Settings settings;
  std::shared_ptr<Strategy> strategy_;
  std::shared_ptr<StepExecutor> executor;
  std::shared_ptr<Profiler> profiler;  // null where there is none
  std::vector<std::shared_ptr<Callback>> callbacks;
  std::vector<std::shared_ptr<Logger>> loggers_;
  std::shared_ptr<LightningModule> module;
  std::shared_ptr<LightningDataModule> datamodule;
  DataSources sources;
  std::vector<std::shared_ptr<LightningOptimizer>> optimizers_;
  std::vector<LRSchedulerConfig> schedulers;

  // ---- Where it stands --------------------------------------------------------------------------

  FitProgress fit;
  Stage fn = Stage::kFit;
  RunningStage stage = RunningStage::kNone;
  TrainerStatus status = TrainerStatus::kInitializing;
  bool should_stop = false;
  std::string ckpt_path;  // resumed from
  std::chrono::steady_clock::time_point last_validation{};
  // Batches of each evaluation loader; of the loops that ran last.
  std::vector<std::optional<int64_t>> num_val_batches, num_test_batches, num_predict_batches;
  std::vector<std::vector<Batch>> predictions;
  std::vector<int64_t> predict_batch_indices;
  std::vector<std::vector<std::vector<int64_t>>> predict_epoch_batch_indices;

  Trainer& trainer_ref() const { return trainer_; }
  bool sanity_checking() const { return stage == RunningStage::kSanityChecking; }
  bool can_stop_early() const;
  // One rank that was told to stop stops all. Called by all ranks at the same places, before
  // anything is decided by should_stop: it changes at the place where all ranks meet, which is this
  // one where they were all told, and a later one where others have passed it.
  void agree_on_stop();
  // A call of fit begins.
  void forget_stop() { should_stop = stop_agreed_ = stop_asked_ = false; }
  bool fitting() const { return fn == Stage::kFit; }
  // Whether gradients go on accumulating after the batch that runs.
  bool should_accumulate() const;
  bool num_ready_batches_reached() const;
  bool max_steps_reached() const;

  // ---- Hooks ------------------------------------------------------------------------------------

  // Calls a hook of every callback, in their order; `f` takes the callback.
  template <class F>
  void call_callbacks(Hook hook, F&& f) {
    const HookScope scope(*this, hook);
    for (size_t i = 0; i < callbacks.size(); ++i) {
      const auto& callback = callbacks[i];
      const ProfileScope timed(profiler.get(), [&] {
        return "[Callback]" + callback->state_key() + "." + to_string(hook);
      });
      f(*callback);
    }
  }
  // Calls a hook of the module; `f` takes the module.
  template <class F>
  decltype(auto) call_module(Hook hook, F&& f) {
    const HookScope scope(*this, hook);
    const ProfileScope timed(profiler.get(), [&] { return module_action(hook); });
    module->attach(this);  // another Trainer may have run it in between
    return f(*module);
  }
  template <class F>
  void call_datamodule(Hook hook, F&& f) {
    if (datamodule == nullptr) return;
    const ProfileScope timed(profiler.get(), [&] { return datamodule_action(hook); });
    f(*datamodule);
  }
  // Callbacks first, then the module: the order of most hooks. Both take (trainer, module, args...)
  // and (args...) respectively.
  template <class... CallbackArgs, class... ModuleArgs, class... Args>
  void call(Hook hook, void (Callback::*of_callback)(Trainer&, LightningModule&, CallbackArgs...),
            void (LightningModule::*of_module)(ModuleArgs...), Args&&... args) {
    call_callbacks(hook, [&](Callback& c) { (c.*of_callback)(trainer_, *module, args...); });
    call_module(hook, [&](LightningModule& m) { (m.*of_module)(args...); });
  }
  // As call(), but callbacks that save checkpoints come after the module, when fit has come to
  // `place`: what they save has seen all of the hook, so that a resumed run need not repeat it.
  template <class... CallbackArgs, class... ModuleArgs, class... Args>
  void call_then_save(Hook hook, FitPlace place,
                      void (Callback::*of_callback)(Trainer&, LightningModule&, CallbackArgs...),
                      void (LightningModule::*of_module)(ModuleArgs...), Args&&... args) {
    const auto callbacks_of = [&](bool saving) {
      call_callbacks(hook, [&](Callback& c) {
        if ((c.role() == CallbackRole::kCheckpoint) != saving) return;
        (c.*of_callback)(trainer_, *module, args...);
      });
    };
    callbacks_of(false);
    call_module(hook, [&](LightningModule& m) { (m.*of_module)(args...); });
    if (fitting() && !sanity_checking()) fit.place = place;
    callbacks_of(true);
  }
  // Times an action of the engine itself.
  template <class MakeName, class F>
  decltype(auto) profile(MakeName&& name, F&& f) {
    const ProfileScope timed(profiler.get(), name);
    return f();
  }

  // ---- A batch's way to the device --------------------------------------------------------------

  Batch to_device(Batch batch, int64_t dataloader_idx);

  // ---- Logged values ----------------------------------------------------------------------------

  // The collection that `log` adds to just now; null outside loops.
  void set_results(ResultCollection* results);
  ResultCollection* results() const { return results_; }
  // Forgets a collection that is about to end.
  void drop_results(const ResultCollection* results);
  // While alive, calls of log() are noted and not carried out.
  // Errors, in log(): CannotRecord for what a replay could not log.
  Scope record_log(std::vector<LoggedCall>& calls);
  // Logs once more what training_step logged when it was recorded.
  void log_again(const std::vector<LoggedCall>& calls);
  void on_batch_start(const Batch* batch, std::optional<int64_t> dataloader_idx);
  void on_batch_end();
  void epoch_end_reached();
  void on_epoch_end();
  void update_train_step_metrics();
  void update_train_epoch_metrics();
  void update_eval_step_metrics(int64_t step);
  ResultCollection::Values update_eval_epoch_metrics();
  void log_eval_end_metrics(const ResultCollection::Values& values);
  void reset_results();
  void reset_metrics();
  bool should_update_logs() const;
  // Sends a row to every logger; the default x-axis is batches_that_stepped, with "epoch" added.
  void log_row(const ResultCollection::Values& values, std::optional<int64_t> step = std::nullopt);

  const MetricMap& callback_metrics();
  const MetricMap& logged_metrics();
  const MetricMap& progress_bar_metrics();
  void add_callback_metric(const std::string& name, double value);
  // Validation inside an epoch begins and ends: the place in the training batches is kept.
  int save_batch_place() const { return static_cast<int>(in_batches_); }
  void restore_batch_place(int place) { in_batches_ = static_cast<InBatches>(place); }
  // The values that callbacks and loggers have seen, to go on from in another process.
  State metrics_state();
  void load_metrics_state(const State& state);

  // ---- Optimizers -------------------------------------------------------------------------------

  // The gradients, by parameter, that may have a part in an optimizer step still to come: of a
  // window of accumulation that is not complete; all in manual optimization, where only the module
  // knows which it will clear. None elsewhere.
  State gradients_state() const;
  void load_gradients_state(const State& state);
  // Asks the module for its optimizers and wraps them.
  // Errors: MisconfigurationError for several optimizers in automatic optimization.
  std::vector<torch::optim::Optimizer*> configure_optimizers();
  // Runs backward on a loss with the hooks around it.
  void backward(const at::Tensor& loss);

  // ---- ModuleHost -------------------------------------------------------------------------------

  // What changes from step to step is refused to a step that is being recorded.
  Trainer* trainer() override;
  Strategy& strategy() override { return *strategy_; }
  int64_t current_epoch() const override;
  int64_t global_step() const override;
  void log(const std::string& name, const LogValue& value, const LogOptions& options) override;
  void print(const std::string& line) override;
  void manual_backward(const at::Tensor& loss) override;
  void clip_gradients(torch::optim::Optimizer& optimizer, std::optional<double> limit,
                      const std::optional<std::string>& algorithm) override;
  std::vector<std::shared_ptr<LightningOptimizer>> optimizers() override;
  std::vector<std::shared_ptr<LRScheduler>> lr_schedulers() override;
  std::vector<std::shared_ptr<Logger>> loggers() override;

 private:
  enum class InBatches { kNo, kFirst, kLater };

  class HookScope {
   public:
    HookScope(Run& run, Hook hook) : run_(run), previous_(run.hook_) { run.hook_ = hook; }
    ~HookScope() { run_.hook_ = previous_; }
    HookScope(const HookScope&) = delete;
    HookScope& operator=(const HookScope&) = delete;

   private:
    Run& run_;
    Hook previous_;
  };

  void note(const std::string& name, const LogValue& value, const LogOptions& options);
  std::string module_action(Hook hook) const;
  std::string datamodule_action(Hook hook) const;
  // Brings the three stores up to date with the collection. They are merged when somebody looks or
  // before values are forgotten, not at every batch.
  void merge();
  ResultCollection::Metrics current_metrics() {
    return results_->metrics(in_batches_ != InBatches::kNo);
  }

  Trainer& trainer_;
  bool stop_agreed_ = false;  // should_stop of all ranks
  bool stop_asked_ = false;   // of this one
  Hook hook_ = Hook::none;
  Hook last_logging_hook_ = Hook::none;
  ResultCollection* results_ = nullptr;
  std::vector<LoggedCall>* recorded_log_ = nullptr;
  InBatches in_batches_ = InBatches::kNo;
  MetricMap callback_metrics_, logged_metrics_, progress_bar_metrics_;
};

}  // namespace lightning
