#include "lightning/loops/fit_loop.h"

#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

#include "lightning/distributed/watch.h"
#include "lightning/errors.h"
#include "lightning/log.h"
#include "lightning/loops/interrupt.h"
#include "lightning/loops/optimization.h"
#include "lightning/seed.h"
#include "lightning/step/has_step.h"

namespace lightning {

FitLoop::FitLoop(Run& run)
    : run_(run), val_loop_(run, LoaderStage::kVal, run.fit.val_batch, /*inference_mode=*/false) {}

// ---- What there is to do ------------------------------------------------------------------------

bool FitLoop::enable_validation() const {
  return has_step(*run_.module, Stage::kValidate) && has_loaders(run_, LoaderStage::kVal) &&
         !is_zero(run_.settings.limit_val_batches);
}

bool FitLoop::done() {
  const auto& settings = run_.settings;
  auto& epochs = run_.fit.epoch.current;
  if (run_.fit.max_batches && *run_.fit.max_batches == 0) {
    info("`Trainer.fit` stopped: No training batches.");
    return true;
  }
  if (run_.max_steps_reached()) {
    info(str("`Trainer.fit` stopped: `max_steps=", settings.max_steps, "` reached."));
    return true;
  }
  if (settings.max_epochs != -1 && epochs.processed >= settings.max_epochs) {
    epochs.completed = epochs.processed;
    info(str("`Trainer.fit` stopped: `max_epochs=", settings.max_epochs, "` reached."));
    return true;
  }
  return run_.should_stop && run_.can_stop_early();
}

bool FitLoop::validates_this_epoch() const {
  return enable_validation() && run_.settings.validates_in(run_.current_epoch());
}

bool FitLoop::validation_due() const {
  if (!validates_this_epoch()) return false;
  const auto& settings = run_.settings;
  const auto& batch = run_.fit.batch;
  const bool by_time = settings.val_check_seconds.has_value();
  const bool open_end = !run_.fit.val_check_batch && !by_time;  // the length is not known
  if (batch.is_last_batch && open_end) return true;
  if (run_.should_stop && run_.can_stop_early()) return true;
  if (by_time) {
    const std::chrono::duration<double> since =
        std::chrono::steady_clock::now() - run_.last_validation;
    const bool due = since.count() >= *settings.val_check_seconds;
    // The ranks' clocks differ: where it is time for one all validate.
    auto& ranks = *run_.strategy_;
    return meet_here(ranks, Matter::kValidation, due) && ranks.reduce_any(due);
  }
  if (open_end) {
    const auto* limit = std::get_if<int64_t>(&settings.limit_train_batches);
    return limit != nullptr ? batch.current.ready % *limit == 0 : batch.is_last_batch;
  }
  const auto& count = settings.check_val_every_n_epoch == 0 ? batch.total : batch.current;
  return count.ready % *run_.fit.val_check_batch == 0;
}

// ---- Data ---------------------------------------------------------------------------------------

void FitLoop::setup_data() {
  const int64_t every = run_.settings.reload_dataloaders_every_n_epochs;
  const bool reload = every > 0 && run_.current_epoch() - loaded_in_epoch_.value_or(0) >= every;
  if (data_ && !reload) return restore_loader_positions();
  if (is_zero(run_.settings.limit_train_batches)) {
    run_.fit.max_batches = 0;
    return;
  }
  iterator_.reset();
  data_ = setup_stage(run_, LoaderStage::kTrain);
  restore_loader_positions();
  run_.fit.max_batches = data_->loader->size();
  if (run_.fit.max_batches && *run_.fit.max_batches == 0) return;
  loaded_in_epoch_ = run_.current_epoch();
  check_val_interval();
  const auto& batches = run_.fit.max_batches;
  if (!run_.loggers_.empty() && batches && *batches < run_.settings.log_every_n_steps &&
      run_.settings.fast_dev_run == 0) {
    warn(str("There are ", *batches, " training batches in an epoch, fewer than log_every_n_steps=",
             run_.settings.log_every_n_steps,
             ". Set a smaller log_every_n_steps to see the epoch's steps in the logs."));
  }
}

// The loaders may have been asked for before the checkpoint was read, to learn their length.
void FitLoop::restore_loader_positions() {
  const State states = std::exchange(loader_states_, State());
  if (states.is_none()) return;
  if (resumes_in_epoch()) data_->loader->set_epoch(run_.fit.epoch.current.processed);
  if (states.empty()) return;
  const bool goes_on = resumes_in_epoch() && !run_.num_ready_batches_reached();
  if (restarting_ || goes_on) {
    data_->loader->load_state_dict(states);
  } else if (resumes()) {
    try {
      data_->loader->load_state_dict(data_->loader->after_pass(states));
    } catch (const CheckpointError& error) {
      warn(
          str("The training data are not those of the run that was saved, so their order begins "
              "anew: ",
              error.what()));
    }
  }
}

void FitLoop::check_val_interval() {
  const auto& settings = run_.settings;
  const auto& batches = run_.fit.max_batches;
  auto& every = run_.fit.val_check_batch;
  every.reset();
  if (settings.val_check_seconds) {
    run_.last_validation = std::chrono::steady_clock::now();
  } else if (settings.val_check_batches) {
    every = settings.val_check_batches;
    if (batches && *every > *batches && settings.check_val_every_n_epoch != 0 &&
        !is_zero(settings.limit_val_batches)) {
      throw MisconfigurationError(
          str("val_check_interval=", *every, " is larger than the ", *batches,
              " training batches of an epoch. Give at most that, set limit_val_batches=0 to turn "
              "validation off, or check_val_every_n_epoch=null to count batches over epochs."));
    }
  } else if (batches) {
    every = std::max<int64_t>(
        1, static_cast<int64_t>(static_cast<double>(*batches) * settings.val_check_fraction));
  } else if (settings.val_check_fraction != 1.0) {
    throw MisconfigurationError(
        str("val_check_interval=", settings.val_check_fraction,
            " is a fraction of an epoch, but the training loader does not know its length. Give a "
            "count of batches, a time, or 1.0."));
  }
}

// ---- The run ------------------------------------------------------------------------------------

OnSync FitLoop::on_sync() const {
  const auto& mode = run_.settings.sync_debug_mode;
  return mode == "error" ? OnSync::kError : mode == "warn" ? OnSync::kWarn : OnSync::kNothing;
}

void FitLoop::check_sync_debug_mode() const {
  const auto& accelerator = run_.strategy_->accelerator();
  if (on_sync() == OnSync::kNothing || accelerator.sync_debug_scope(on_sync()) != nullptr) return;
  warn(str("sync_debug_mode=\"", run_.settings.sync_debug_mode,
           "\" has no effect with the accelerator \"", accelerator.name(),
           "\": only a GPU, in a LibTorch built with CUDA, works beside the host."));
}

void FitLoop::run_sanity_check() {
  if (!enable_validation() || run_.settings.num_sanity_val_steps == 0 || restarting_) return;
  if (resumes_in_epoch()) return;
  const auto stage = run_.stage;
  const auto progress = run_.fit.val_batch;
  run_.stage = RunningStage::kSanityChecking;
  run_.reset_results();
  run_.reset_metrics();
  run_.call_callbacks(Hook::on_sanity_check_start, [&](Callback& c) {
    c.on_sanity_check_start(run_.trainer_ref(), *run_.module);
  });
  val_loop_.run();
  run_.call_callbacks(Hook::on_sanity_check_end, [&](Callback& c) {
    c.on_sanity_check_end(run_.trainer_ref(), *run_.module);
  });
  run_.reset_results();
  run_.reset_metrics();
  val_loop_.reset_progress();
  if (resumes()) run_.fit.val_batch = progress;
  run_.stage = stage;
}

void FitLoop::run() {
  run_.set_results(&results_);
  run_.agree_on_stop();
  setup_data();
  flags_at_start_ = flags();
  const bool between_epochs = resumes() && !resumes_in_epoch();
  if (between_epochs) resume_between_epochs();
  if (!resumes_in_epoch() && done()) return;
  if (is_zero(run_.settings.limit_train_batches)) return;
  check_sync_debug_mode();
  if (!resumes() && !between_epochs) find_restart();
  const auto generators = generator_states();
  const auto flags_at_boundary = flags();
  start_run();
  if (between_epochs) {  // on_train_start was before that epoch
    set_flags(flags_at_boundary);
    run_.reset_results();
    load_generator_states(generators);
  }
  if (!resumes()) run_.fit.place = FitPlace::kEpochBoundary;
  while (resumes_in_epoch() || !done()) {
    start_epoch();
    run_epoch();
    end_epoch();
    restarting_ = loaded_ = false;
    epoch_restart_ = EpochRestart::kNone;
  }
  restarting_ = false;
  run_.call(Hook::on_train_end, &Callback::on_train_end, &LightningModule::on_train_end);
  run_.strategy_->on_train_end();
  flags_at_end_ = flags();
}

// Where a checkpoint was written decides what is left to do; see the reference's section 1.11.
void FitLoop::find_restart() {
  const auto& epoch = run_.fit.epoch.total;
  const auto& batch = run_.fit.batch.total;
  const bool all_started = epoch.started == epoch.ready;
  const bool none_lost = epoch.completed == epoch.processed;
  if (restarting_ && epoch.started == epoch.ready - 1 && epoch.processed == epoch.started &&
      none_lost) {
    epoch_restart_ = EpochRestart::kOnEpochStart;
  } else if (restarting_ && all_started && epoch.processed == epoch.started - 1 && none_lost) {
    epoch_restart_ = EpochRestart::kMidEpoch;
  } else if (loaded_ && all_started && epoch.processed == epoch.started &&
             epoch.completed == epoch.processed - 1) {
    epoch_restart_ = restarting_ ? EpochRestart::kOnEpochEnd : EpochRestart::kResumedOnEpochEnd;
  }
  if (restarting_ && batch.started == batch.ready && batch.processed == batch.started) {
    if (batch.completed == batch.processed - 1) batch_restart_ = BatchRestart::kOnBatchEnd;
    if (batch.completed == batch.processed) batch_restart_ = BatchRestart::kOnLast;
  }

  auto& progress = run_.fit.epoch;
  if (epoch_restart_ == EpochRestart::kOnEpochStart) progress.reset_on_restart();
  if (epoch_restart_ == EpochRestart::kResumedOnEpochEnd) progress.completed();
  const bool batch_ended_epoch =
      batch_restart_ == BatchRestart::kOnBatchEnd && run_.fit.batch.is_last_batch;
  if (batch_ended_epoch && epoch_restart_ == EpochRestart::kMidEpoch) {
    progress.processed();
    progress.completed();
  } else if (batch_ended_epoch && !run_.fit.val_batch.is_last_batch) {
    progress.completed();
  }
}

void FitLoop::start_run() {
  if (run_.settings.max_steps == -1) {
    run_.fit.epoch.current.completed = run_.fit.epoch.current.processed;
  }
  if (validates_this_epoch() && !val_loop_.has_data()) {
    const auto stage = run_.stage;
    run_.stage = RunningStage::kValidating;
    val_loop_.setup_data();
    run_.stage = stage;
  }

  int64_t in_eval = 0;
  for (const auto& module : run_.module->modules()) in_eval += module->is_training() ? 0 : 1;
  if (in_eval > 0) {
    warn(str("Training starts with ", in_eval,
             " module(s) in eval mode. If that is meant, as for "
             "frozen parts, ignore this warning; else call train()."));
  }
  run_.call(Hook::on_train_start, &Callback::on_train_start, &LightningModule::on_train_start);
  run_.agree_on_stop();
  run_.strategy_->on_train_start();
}

void FitLoop::start_epoch() {
  setup_data();
  if (resumes_in_epoch()) return;
  data_->loader->set_epoch(run_.fit.epoch.current.processed);
  if (epoch_restart_ == EpochRestart::kMidEpoch || epoch_restart_ == EpochRestart::kOnEpochEnd) {
    return;
  }
  if (epoch_restart_ != EpochRestart::kOnEpochStart) run_.fit.epoch.ready();
  run_.call(Hook::on_train_epoch_start, &Callback::on_train_epoch_start,
            &LightningModule::on_train_epoch_start);
  run_.agree_on_stop();
  run_.fit.epoch.started();
}

void FitLoop::end_epoch() {
  run_.epoch_end_reached();
  run_.fit.epoch.processed();
  // Callbacks that monitor a metric come after the module, which may have logged it in this hook.
  const auto callbacks = [&](bool monitoring) {
    run_.call_callbacks(Hook::on_train_epoch_end, [&](Callback& c) {
      if (c.is_monitoring() == monitoring) c.on_train_epoch_end(run_.trainer_ref(), *run_.module);
    });
  };
  callbacks(false);
  run_.call_module(Hook::on_train_epoch_end, [](LightningModule& m) { m.on_train_epoch_end(); });
  run_.fit.place = FitPlace::kEpochEnd;
  callbacks(true);
  run_.agree_on_stop();
  finish_epoch();
  handle_signals(*run_.strategy_);
}

void FitLoop::finish_epoch() {
  run_.on_epoch_end();
  if (!restarting_ && run_.num_ready_batches_reached()) step_schedulers("epoch", /*plateau=*/true);

  // The row of an epoch goes to the step of its last batch.
  --run_.fit.batches_that_stepped;
  run_.update_train_epoch_metrics();
  ++run_.fit.batches_that_stepped;
  run_.fit.epoch.completed();
  run_.fit.place = FitPlace::kEpochBoundary;
}

// ---- The batches of an epoch --------------------------------------------------------------------

void FitLoop::reset_epoch() {
  auto& fit = run_.fit;
  const bool on_batch_end = batch_restart_ == BatchRestart::kOnBatchEnd;
  if (batch_restarting_ && !run_.should_accumulate() &&
      (on_batch_end || batch_restart_ != BatchRestart::kOnLast)) {
    // A checkpoint is written before this is counted.
    ++fit.batches_that_stepped;
  }
  if (on_batch_end) {
    fit.batch.completed();
    if (fit.max_batches && fit.batch.current.completed >= *fit.max_batches) {
      fit.batch.reset_on_run();
      fit.scheduler.reset_on_run();
      fit.optimizer.reset_on_run();
      fit.val_batch.total = Tracker();
    }
  }
  if (batch_restarting_) {
    fit.batch.reset_on_restart();
    fit.scheduler.reset_on_restart();
    fit.optimizer.reset_on_restart();
    if (fit.batch.current.ready > 0) {
      warn(
          "The run resumes in the middle of an epoch, but the checkpoint holds no position in the "
          "training data: they begin again with their first sample. Use a checkpoint from an "
          "epoch's end, or one that this framework saved with a DataLoader.");
    }
  } else {
    fit.batch.reset_on_run();
    fit.scheduler.reset_on_run();
    fit.optimizer.reset_on_run();
    fit.val_batch.total = Tracker();
  }
}

bool FitLoop::epoch_done() {
  const auto& settings = run_.settings;
  const bool validated = !batch_restarting_ || val_loop_.has_run();
  if ((run_.max_steps_reached() || run_.num_ready_batches_reached()) && validated) return true;
  if (!run_.should_stop) return false;
  if (run_.can_stop_early()) return true;
  warn_once(str("The run was told to stop, but min_epochs=", settings.min_epochs,
                settings.min_steps ? str(" or min_steps=", *settings.min_steps) : std::string(),
                " is not reached. Training goes on."));
  return false;
}

void FitLoop::run_epoch() {
  run_.profile([] { return std::string("run_training_epoch"); },
               [&] {
                 const at::AutoGradMode with_gradients(true);
                 const bool in_epoch = resumes_in_epoch();
                 if (!in_epoch) reset_epoch();
                 if (!in_epoch && epoch_done()) return;
                 if (!run_.num_ready_batches_reached()) {
                   iterator_ = data_->loader->iterate_items(run_.fit.batch.current.ready);
                 }
                 if (in_epoch) {
                   resume_epoch();
                 } else {
                   run_.fit.place = FitPlace::kBatchBoundary;  // the order of the epoch is drawn
                 }
                 while (!epoch_done()) {
                   const bool go_on = restart_without_batch() || run_batch();
                   if (go_on) after_batch();
                   batch_restarting_ = false;
                   batch_restart_ = BatchRestart::kNone;
                   if (!go_on) break;
                 }
               });
}

// After a restart the validation of the batch before may be all that is left of it.
bool FitLoop::restart_without_batch() {
  if (!batch_restarting_ || !validation_due()) {
    val_loop_.set_restarting(false);
    return false;
  }
  const auto& val = run_.fit.val_batch.total;
  const bool mid_evaluation = val.started == val.ready && val.processed == val.started - 1 &&
                              val.completed == val.processed;
  if (mid_evaluation) return true;
  if (batch_restart_ == BatchRestart::kOnLast) {
    skip_validation_ = true;
    return true;
  }
  val_loop_.count_as_done();
  val_loop_.set_restarting(false);
  return false;
}

// Ranks whose streams end at different places end their epoch together, with the first.
bool FitLoop::ends_for_all(bool ends) {
  if (!data_->ranks_may_differ) return ends;
  auto& strategy = *run_.strategy_;
  if (!strategy.reduce_any(ends)) return false;
  if (!strategy.reduce_all(ends)) {
    warn_once(str("The training data of some ranks end before those of others, after ",
                  run_.fit.batch.current.ready + 1,
                  " batches: the epoch ends there on all ranks, and leaves the rest out. Give "
                  "all ranks as much, or set limit_train_batches."));
  }
  return true;
}

bool FitLoop::run_batch() {
  auto& fit = run_.fit;
  auto item = run_.profile([] { return std::string("[_TrainingEpochLoop].train_dataloader_next"); },
                           [&] { return iterator_->next(); });
  if (ends_for_all(!item)) {
    fit.batch.is_last_batch = true;
    return false;
  }
  fit.place = FitPlace::kInBatch;
  const int64_t batch_idx = fit.batch.current.ready;
  fit.batch.is_last_batch = ends_for_all(iterator_->done());
  const Batch batch = run_.to_device(std::move(item->batch), 0);
  fit.batch.ready();
  run_.on_batch_start(&batch, std::nullopt);

  StepOutput output;
  bool skip_rest = false;
  if (batch.is_none()) {
    warn_once(
        "The training loader gave a batch that is none. If that is on purpose, ignore this "
        "warning.");
  } else {
    run_.call_callbacks(Hook::on_train_batch_start, [&](Callback& c) {
      c.on_train_batch_start(run_.trainer_ref(), *run_.module, batch, batch_idx);
    });
    skip_rest = run_.call_module(Hook::on_train_batch_start, [&](LightningModule& m) {
      return m.on_train_batch_start(batch, batch_idx);
    }) == -1;
    if (skip_rest) {
      fit.batch.is_last_batch = true;
    } else {
      fit.batch.started();
      output = run_.profile([] { return std::string("run_training_batch"); },
                            [&] {
                              const Scope no_waiting =
                                  run_.strategy_->accelerator().sync_debug_scope(on_sync());
                              return run_.module->automatic_optimization()
                                         ? run_automatic_optimization(run_, batch, batch_idx)
                                         : run_manual_optimization(run_, batch, batch_idx);
                            });
    }
  }
  fit.batch.processed();
  fit.place = FitPlace::kBatchEnd;
  step_schedulers("step", /*plateau=*/false);
  if (run_.num_ready_batches_reached()) step_schedulers("epoch", /*plateau=*/false);
  if (skip_rest) {
    fit.place = FitPlace::kBatchBoundary;
    return false;
  }

  run_.call_then_save(Hook::on_train_batch_end, FitPlace::kBatchEnd, &Callback::on_train_batch_end,
                      &LightningModule::on_train_batch_end, output, batch, batch_idx);
  finish_batch();
  return true;
}

void FitLoop::finish_batch() {
  auto& batch = run_.fit.batch;
  run_.agree_on_stop();
  run_.on_batch_end();
  if (batch.current.completed < batch.current.processed) batch.completed();
  run_.update_train_step_metrics();
  run_.strategy_->on_step_end();
}

void FitLoop::after_batch() {
  const bool due = validation_due() && !std::exchange(skip_validation_, false);
  if (due) validate();
  finish_validation();
}

void FitLoop::validate() {
  place_in_batches_ = run_.save_batch_place();
  generators_before_validation_ = generator_states();
  flags_before_validation_ = flags();
  val_loop_before_validation_ = val_loop_.state_dict();
  metrics_before_validation_ = registered_metrics_state();
  run_.fit.place = FitPlace::kBeforeValidation;
  run_.stage = RunningStage::kValidating;
  if (!run_.should_accumulate()) {
    run_.call_module(Hook::on_validation_model_zero_grad,
                     [](LightningModule& m) { m.on_validation_model_zero_grad(); });
  }
  val_loop_.run();
  run_.agree_on_stop();
  run_.stage = RunningStage::kTraining;
  run_.restore_batch_place(place_in_batches_);
}

void FitLoop::finish_validation() {
  step_schedulers("step", /*plateau=*/true);
  if (!run_.should_accumulate()) ++run_.fit.batches_that_stepped;
  if (run_.should_stop) {
    for (const auto& logger : run_.loggers_) logger->save();
  }
  run_.fit.place = FitPlace::kBatchBoundary;
  run_.strategy_->checkpoint_io().check();
  if (!run_.max_steps_reached() && !run_.num_ready_batches_reached())
    handle_signals(*run_.strategy_);
}

void FitLoop::step_schedulers(const std::string& interval, bool plateau) {
  const bool by_step = interval == "step";
  if (!run_.module->automatic_optimization() || (by_step && run_.should_accumulate())) return;
  for (const auto& config : run_.schedulers) {
    if (config.reduce_on_plateau != plateau || config.interval != interval) continue;
    const int64_t count = by_step ? run_.fit.batch.current.ready : run_.current_epoch() + 1;
    if (count % config.frequency != 0) continue;
    std::optional<double> metric;
    if (plateau) {
      const auto& metrics = run_.callback_metrics();
      const auto found = metrics.find(*config.monitor);
      if (found == metrics.end()) {
        std::vector<std::string> names;
        for (const auto& one : metrics) names.push_back(one.first);
        const auto message = str("ReduceLROnPlateau watches \"", *config.monitor,
                                 "\", which was not logged.", did_you_mean(*config.monitor, names),
                                 " Logged: ", names.empty() ? "nothing" : join(names), ".");
        if (config.strict) throw MisconfigurationError(message);
        warn(message + " The learning rate stays as it is.");
        continue;
      }
      metric = found->second.item().toDouble();
    }
    run_.fit.scheduler.ready();
    run_.call_module(Hook::lr_scheduler_step,
                     [&](LightningModule& m) { m.lr_scheduler_step(*config.scheduler, metric); });
    run_.fit.scheduler.completed();
  }
}

void FitLoop::teardown() {
  iterator_.reset();
  run_.executor->reset();  // what it recorded holds memory of the device
  val_loop_.teardown();
  if (run_.results() == &results_) run_.set_results(nullptr);
}

}  // namespace lightning
