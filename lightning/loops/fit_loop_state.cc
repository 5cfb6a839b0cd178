// What a FitLoop saves and how it goes on from it.
#include <torch/nn/module.h>

#include <algorithm>

#include "lightning/errors.h"
#include "lightning/log.h"
#include "lightning/loops/fit_loop.h"
#include "lightning/seed.h"

namespace lightning {
namespace {

// Of exact_state(). A file of a later one is resumed as Python resumes.
constexpr int64_t kExactVersion = 1;

// In the order of FitPlace.
constexpr const char* kPlaces[] = {"outside",   "epoch_boundary",    "batch_boundary", "in_batch",
                                   "batch_end", "before_validation", "validation_end", "epoch_end"};

// Where only part of an epoch's batches is done.
bool in_epoch(FitPlace place) {
  return place != FitPlace::kOutside && place != FitPlace::kEpochBoundary &&
         place != FitPlace::kEpochEnd;
}

}  // namespace

// ---- Python's keys ------------------------------------------------------------------------------

State FitLoop::state_dict() const {
  const auto& fit = run_.fit;
  auto state = State::dict();
  state["state_dict"] = State::dict();
  state["epoch_loop.state_dict"] =
      State::dict({{"_batches_that_stepped", fit.batches_that_stepped}});
  state["epoch_loop.batch_progress"] = fit.batch.state_dict();
  state["epoch_loop.scheduler_progress"] = fit.scheduler.state_dict();
  state["epoch_loop.automatic_optimization.state_dict"] = State::dict();
  state["epoch_loop.automatic_optimization.optim_progress"] = fit.optimizer.state_dict();
  state["epoch_loop.manual_optimization.state_dict"] = State::dict();
  state["epoch_loop.manual_optimization.optim_step_progress"] = fit.manual_step.state_dict();
  state["epoch_loop.val_loop.state_dict"] = State::dict();
  state["epoch_loop.val_loop.batch_progress"] = fit.val_batch.state_dict();
  state["epoch_progress"] = fit.epoch.state_dict();
  return state;
}

void FitLoop::load_state_dict(const State& state) {
  auto& fit = run_.fit;
  const auto load = [&](const char* key, auto& progress) {
    if (const auto* found = state.find(key)) progress.load_state_dict(*found);
  };
  load("epoch_loop.batch_progress", fit.batch);
  load("epoch_loop.scheduler_progress", fit.scheduler);
  load("epoch_loop.automatic_optimization.optim_progress", fit.optimizer);
  load("epoch_loop.manual_optimization.optim_step_progress", fit.manual_step);
  load("epoch_loop.val_loop.batch_progress", fit.val_batch);
  load("epoch_progress", fit.epoch);
  if (const auto* own = state.find("epoch_loop.state_dict")) {
    if (const auto* stepped = own->find("_batches_that_stepped")) {
      fit.batches_that_stepped = stepped->as_int();
    }
  }
  const auto& epoch = fit.epoch.current;
  restarting_ = epoch.ready != epoch.processed || epoch.started != epoch.processed ||
                run_.settings.max_steps != -1;
  batch_restarting_ = restarting_;
  val_loop_.set_restarting(restarting_);
  loaded_ = true;
}

// ---- What they leave out ------------------------------------------------------------------------

bool FitLoop::resumes_in_epoch() const { return resumes() && in_epoch(run_.fit.place); }

FitLoop::Flags FitLoop::flags() const {
  Flags flags;
  for (const auto& item : run_.module->named_modules()) {
    flags.training[item.key()] = item.value()->is_training();
  }
  for (const auto& item : run_.module->named_parameters()) {
    flags.requires_grad[item.key()] = item.value().requires_grad();
  }
  return flags;
}

// train() of a module sets its children too, so each is set, parents first.
void FitLoop::set_flags(const Flags& flags) {
  for (auto& item : run_.module->named_modules()) {
    const auto training = flags.training.find(item.key());
    if (training != flags.training.end()) item.value()->train(training->second);
  }
  for (auto& item : run_.module->named_parameters()) {
    const auto requires_grad = flags.requires_grad.find(item.key());
    if (requires_grad != flags.requires_grad.end()) {
      item.value().set_requires_grad(requires_grad->second);
    }
  }
}

State FitLoop::registered_metrics_state() const {
  auto* const results = run_.results();
  const bool evaluating = results != nullptr && results != &results_;
  auto all = State::dict();
  for (const auto& [name, metric] : run_.module->registered_metrics()) {
    all[name] = evaluating && results->resets(*metric) ? State() : metric->state_dict();
  }
  return all;
}

void FitLoop::load_registered_metrics_state(const State& state) {
  for (const auto& [name, metric] : run_.module->registered_metrics()) {
    const auto* saved = state.find(name);
    if (saved == nullptr) {
      warn(str("The checkpoint holds nothing of the metric \"", name, "\", which begins anew."));
    } else if (saved->is_none()) {
      metric->reset();
    } else {
      metric->load_state_dict(*saved);
    }
  }
}

namespace {

// What hooks have set since fit began; what the module's constructor sets may be another by now.
State changes(const std::map<std::string, bool>& from, const std::map<std::string, bool>& to) {
  auto changed = State::dict();
  for (const auto& [name, value] : to) {
    const auto before = from.find(name);
    if (before == from.end() || before->second != value) changed[name] = value;
  }
  return changed;
}

}  // namespace

State FitLoop::exact_state() {
  if (resumes()) return exact_;  // it has not gone on yet
  const auto place = run_.fit.place;
  if (place == FitPlace::kOutside) return {};
  const bool validating = place == FitPlace::kBeforeValidation || place == FitPlace::kValidationEnd;
  auto generators = State::dict();
  for (const auto& [device, state] :
       place == FitPlace::kBeforeValidation ? generators_before_validation_ : generator_states()) {
    generators[device] = state;
  }
  // After fit the user may set the module to eval mode.
  const bool running = run_.fitting() && run_.status != TrainerStatus::kFinished;
  const Flags is = validating ? flags_before_validation_ : running ? flags() : flags_at_end_;
  // In the middle of a step parameters may be toggled for one of several optimizers.
  const auto& requires_grad =
      place == FitPlace::kInBatch ? flags_at_start_.requires_grad : is.requires_grad;
  const bool batches_done = !in_epoch(place) || run_.num_ready_batches_reached();
  const bool ends = batches_done || run_.max_steps_reached() || run_.should_stop;
  const bool between = place == FitPlace::kEpochBoundary;  // all values are forgotten
  const auto& metrics = run_.module->registered_metrics();
  State positions;
  if (data_ && data_->loader->is_stateful()) {
    positions = data_->loader->state_dict();
    if (place == FitPlace::kInBatch) {
      auto earlier = data_->loader->one_batch_earlier(positions);
      if (earlier.is_none()) {
        warn(
            "A checkpoint is saved in the middle of a batch, and the training loader cannot go "
            "back by one: a run that resumes from it leaves this batch out.");
      } else {
        positions = std::move(earlier);
      }
    } else if (batches_done) {
      positions = data_->loader->after_pass(positions);
    }
  }
  auto rank = State::dict(
      {{"generators", std::move(generators)},
       {"loader_positions", std::move(positions)},
       {"training", changes(flags_at_start_.training, is.training)},
       {"requires_grad", changes(flags_at_start_.requires_grad, requires_grad)},
       {"gradients", run_.gradients_state()},
       {"metrics", run_.metrics_state()},
       {"results", between ? ResultCollection(true).state_dict(false, metrics)
                           : results_.state_dict(/*compute=*/ends, metrics)},
       {"registered_metrics", place == FitPlace::kBeforeValidation ? metrics_before_validation_
                                                                   : registered_metrics_state()},
       {"place_in_batches", validating ? place_in_batches_ : run_.save_batch_place()},
       {"val_loop", place == FitPlace::kBeforeValidation ? val_loop_before_validation_
                                                         : val_loop_.state_dict()}});
  const auto& settings = run_.settings;
  const State windows = in_epoch(place) && settings.accumulation_changed
                            ? State(settings.accumulate_grad_batches)
                            : State();
  return State::dict({{"version", kExactVersion},
                      {"place", kPlaces[static_cast<int>(place)]},
                      {"accumulate_grad_batches", windows},
                      {"ranks", run_.strategy_->all_gather_states(std::move(rank))}});
}

const State& FitLoop::rank_state() const {
  const auto rank = static_cast<size_t>(run_.strategy_->global_rank());
  return exact_.at("ranks").as_list().at(rank);
}

void FitLoop::load_exact_state(const State& state) {
  if (state.at("version").as_int() > kExactVersion) {
    warn(
        str("The checkpoint was written by a later version: what it holds beyond Python's keys "
            "(version ",
            state.at("version").as_int(), ", known: ", kExactVersion,
            ") is left out, so the run does not go on bit for bit."));
    return;
  }
  const auto ranks = static_cast<int64_t>(state.at("ranks").as_list().size());
  if (ranks != run_.strategy_->world_size()) {
    warn(str("The checkpoint was saved by ", ranks, " process(es) and is resumed by ",
             run_.strategy_->world_size(),
             ": random numbers and logged values begin anew, so the run does not go on bit for "
             "bit."));
    return;
  }
  const auto& name = state.at("place").as_string();
  const auto* const found = std::find_if(std::begin(kPlaces), std::end(kPlaces),
                                         [&](const char* one) { return name == one; });
  if (found == std::end(kPlaces)) {
    throw CheckpointError(str("The checkpoint was saved at the place \"", name,
                              "\" of fit, which is not known. It is damaged, or of a later "
                              "version: resume with that."));
  }
  run_.fit.place = static_cast<FitPlace>(found - std::begin(kPlaces));
  if (run_.fit.place == FitPlace::kOutside) return;
  exact_ = state;
  const auto& positions = rank_state().at("loader_positions");
  loader_states_ = positions.is_none() ? State::dict() : positions;
  restarting_ = batch_restarting_ = loaded_ = false;
  val_loop_.set_restarting(false);
  rewind_counts();
}

// What was begun and not done is not counted: it is done again from its start.
void FitLoop::rewind_counts() {
  auto& fit = run_.fit;
  const auto rewind = [](auto& progress) {
    progress.total.reset_on_restart();
    progress.current.reset_on_restart();
  };
  if (fit.place == FitPlace::kEpochBoundary) rewind(fit.epoch);
  if (!in_epoch(fit.place)) return;
  fit.epoch.total.processed = fit.epoch.total.completed;
  fit.epoch.current.processed = fit.epoch.current.completed;
  if (fit.place == FitPlace::kInBatch) {
    rewind(fit.batch);
    rewind(fit.optimizer.step);
    rewind(fit.optimizer.zero_grad);
    rewind(fit.manual_step);
    rewind(fit.scheduler);
    fit.batch.is_last_batch = false;
  }
  if (fit.place == FitPlace::kBeforeValidation) {
    auto& total = fit.val_batch.total;
    auto& begun = fit.val_batch.current;
    total.ready -= begun.ready;
    total.started -= begun.started;
    total.processed -= begun.processed;
    total.completed -= begun.completed;
    fit.val_batch.reset_on_run();
  }
}

void FitLoop::restore_exact_state() {
  const auto& rank = rank_state();
  if (const auto* metrics = rank.find("registered_metrics"))
    load_registered_metrics_state(*metrics);
  results_.load_state_dict(rank.at("results"), run_.module->registered_metrics());
  run_.load_metrics_state(rank.at("metrics"));
  run_.restore_batch_place(static_cast<int>(rank.at("place_in_batches").as_int()));
  run_.load_gradients_state(rank.at("gradients"));
  val_loop_.load_state_dict(rank.at("val_loop"));
  // What hooks that are not called again had set.
  const auto& windows = exact_.at("accumulate_grad_batches");
  if (!windows.is_none()) {
    run_.settings.accumulate_grad_batches = windows.as_int();
    run_.settings.accumulation_changed = true;
  }
  auto goal = flags();
  for (const auto& [name, value] : rank.at("training").as_dict()) {
    goal.training[to_string(name)] = value.as_bool();
  }
  for (const auto& [name, value] : rank.at("requires_grad").as_dict()) {
    goal.requires_grad[to_string(name)] = value.as_bool();
  }
  set_flags(goal);
  // Last, since loading draws too.
  std::vector<std::pair<std::string, at::Tensor>> generators;
  for (const auto& [device, state] : rank.at("generators").as_dict()) {
    generators.emplace_back(to_string(device), state.as_tensor().clone());
  }
  load_generator_states(generators);
}

// What the run that was saved had still to do at the end of its epoch.
void FitLoop::resume_between_epochs() {
  restore_exact_state();
  exact_ = State();
  if (run_.fit.place == FitPlace::kEpochEnd) finish_epoch();
  flags_at_end_ = flags();
}

// From the place in an epoch to the boundary of the batch.
void FitLoop::resume_epoch() {
  restore_exact_state();
  exact_ = State();
  const auto place = run_.fit.place;
  if (place == FitPlace::kBatchEnd) {
    finish_batch();
    after_batch();
  } else if (place == FitPlace::kBeforeValidation) {
    validate();
    finish_validation();
  } else if (place == FitPlace::kValidationEnd) {
    finish_validation();
  }
}

}  // namespace lightning
