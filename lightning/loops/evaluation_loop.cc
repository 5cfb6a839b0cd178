#include "lightning/loops/evaluation_loop.h"

#include <ATen/core/grad_mode.h>
#include <c10/core/InferenceMode.h>

#include <algorithm>
#include <utility>

#include "lightning/errors.h"
#include "lightning/loops/interrupt.h"
#include "lightning/overrides.h"
#include "lightning/step/entry.h"
#include "lightning/step/has_step.h"

namespace lightning {

// The names of one of the two stages.
struct EvaluationLoop::Hooks {
  using OfCallback = void (Callback::*)(Trainer&, LightningModule&);
  using OfModule = void (LightningModule::*)();
  using BatchOfCallback = void (Callback::*)(Trainer&, LightningModule&, const Batch&, int64_t,
                                             int64_t);
  using BatchOfModule = void (LightningModule::*)(const Batch&, int64_t, int64_t);
  using EndOfCallback = void (Callback::*)(Trainer&, LightningModule&, const StepOutput&,
                                           const Batch&, int64_t, int64_t);
  using EndOfModule = void (LightningModule::*)(const StepOutput&, const Batch&, int64_t, int64_t);
  using Step = StepOutput (LightningModule::*)(const Batch&, int64_t, int64_t);

  Hook step_hook, eval_hook, train_hook;
  OfModule model_eval, model_train;
  Hook start_hook, end_hook, epoch_start_hook, epoch_end_hook, batch_start_hook, batch_end_hook;
  OfCallback start, end, epoch_start, epoch_end;
  OfModule module_start, module_end, module_epoch_start, module_epoch_end;
  BatchOfCallback batch_start;
  BatchOfModule module_batch_start;
  EndOfCallback batch_end;
  EndOfModule module_batch_end;
  Step step;
};

#define LIGHTNING_EVALUATION_HOOKS(name)                                                         \
  {                                                                                              \
    Hook::name##_step, Hook::on_##name##_model_eval, Hook::on_##name##_model_train,              \
        &LightningModule::on_##name##_model_eval, &LightningModule::on_##name##_model_train,     \
        Hook::on_##name##_start, Hook::on_##name##_end, Hook::on_##name##_epoch_start,           \
        Hook::on_##name##_epoch_end, Hook::on_##name##_batch_start, Hook::on_##name##_batch_end, \
        &Callback::on_##name##_start, &Callback::on_##name##_end,                                \
        &Callback::on_##name##_epoch_start, &Callback::on_##name##_epoch_end,                    \
        &LightningModule::on_##name##_start, &LightningModule::on_##name##_end,                  \
        &LightningModule::on_##name##_epoch_start, &LightningModule::on_##name##_epoch_end,      \
        &Callback::on_##name##_batch_start, &LightningModule::on_##name##_batch_start,           \
        &Callback::on_##name##_batch_end, &LightningModule::on_##name##_batch_end,               \
        &LightningModule::name##_step                                                            \
  }

const EvaluationLoop::Hooks& EvaluationLoop::hooks() const {
  static const Hooks validation = LIGHTNING_EVALUATION_HOOKS(validation);
  static const Hooks test = LIGHTNING_EVALUATION_HOOKS(test);
  return stage_ == LoaderStage::kTest ? test : validation;
}

EvaluationLoop::EvaluationLoop(Run& run, LoaderStage stage, BatchProgress& progress,
                               bool inference_mode)
    : run_(run), stage_(stage), progress_(progress), inference_mode_(inference_mode) {}

bool EvaluationLoop::enabled() const {
  if (is_zero(limit_of(run_.settings, stage_))) return false;
  // Fit does without validation; a call of validate or test without data is an error later.
  if (run_.fitting() && !has_loaders(run_, stage_)) return false;
  return has_step(*run_.module, stage_ == LoaderStage::kTest ? Stage::kTest : Stage::kValidate);
}

void EvaluationLoop::setup_data() {
  const int64_t every = run_.settings.reload_dataloaders_every_n_epochs;
  const int64_t epoch = run_.current_epoch();
  const bool reload = every > 0 && (!loaded_in_epoch_ || epoch - *loaded_in_epoch_ >= every);
  if (data_ && run_.fitting() && !reload) return;
  if (!enabled()) return;
  const bool validates_now = run_.settings.validates_in(epoch);
  // Loaders made for the sanity check serve the first validation, where that is in this epoch.
  if (run_.fitting() && (!run_.sanity_checking() || validates_now)) loaded_in_epoch_ = epoch;
  data_ = setup_stage(run_, stage_);
  (stage_ == LoaderStage::kTest ? run_.num_test_batches : run_.num_val_batches) =
      data_->num_batches;
  seen_.clear();
  if (!restored_.is_none()) load_state_dict(std::exchange(restored_, State()));
}

State EvaluationLoop::state_dict() const {
  auto seen = State::dict();
  for (const auto& [loader, batches] : seen_) seen[loader] = batches;
  auto state = State::dict({{"batches_seen", std::move(seen)}, {"loader_positions", State()}});
  if (data_ && data_->loader->is_stateful()) {
    state["loader_positions"] = data_->loader->after_pass(data_->loader->state_dict());
  }
  return state;
}

void EvaluationLoop::load_state_dict(const State& state) {
  if (!data_) {
    restored_ = state;
    return;
  }
  seen_.clear();
  for (const auto& [loader, batches] : state.at("batches_seen").as_dict()) {
    if (const auto* index = std::get_if<int64_t>(&loader)) seen_[*index] = batches.as_int();
  }
  const auto& positions = state.at("loader_positions");
  if (!positions.is_none()) data_->loader->load_state_dict(positions);
}

const std::vector<std::optional<int64_t>>& EvaluationLoop::num_batches() const {
  static const std::vector<std::optional<int64_t>> none;
  return data_ ? data_->num_batches : none;
}

std::vector<std::optional<int64_t>> EvaluationLoop::sanity_batches() const {
  const int64_t most = run_.settings.num_sanity_val_steps;
  auto batches = num_batches();
  if (most < 0) return batches;
  for (auto& count : batches) count = count ? std::min(*count, most) : most;
  return batches;
}

std::vector<std::optional<int64_t>> EvaluationLoop::batches_now() const {
  return run_.sanity_checking() ? sanity_batches() : num_batches();
}

bool EvaluationLoop::indexed() const {
  return data_->loader->mode() == "sequential" && data_->loader->flattened().size() > 1;
}

std::vector<ResultCollection::Values> EvaluationLoop::run() {
  const bool inference = inference_mode_ && run_.strategy_->supports_inference_mode();
  const c10::InferenceMode mode(inference);
  const at::NoGradGuard no_grad;
  setup_data();
  const auto batches = batches_now();
  if (std::all_of(batches.begin(), batches.end(), [](const auto& n) { return n && *n == 0; })) {
    return {};
  }
  auto* const outer = run_.results();
  run_.set_results(&results_);
  begin();

  std::vector<int64_t> limits;
  for (const auto& count : batches) limits.push_back(count.value_or(INT64_MAX));
  data_->loader->set_limits(limits);
  const auto iterator = data_->loader->iterate_items();
  run_.epoch_end_reached();

  const ModuleMode before(*run_.module);
  const auto& h = hooks();
  run_.call_module(h.eval_hook, [&](LightningModule& m) { (m.*h.model_eval)(); });
  run_.call(h.start_hook, h.start, h.module_start);
  run_.strategy_->on_evaluation_start();
  run_.call(h.epoch_start_hook, h.epoch_start, h.module_epoch_start);

  int64_t loader_before = 0;
  while (auto item =
             run_.profile([&] { return str("[_EvaluationLoop].", to_string(stage_), "_next"); },
                          [&] { return iterator->next(); })) {
    if (item->dataloader_idx != loader_before) store_outputs();
    loader_before = item->dataloader_idx;
    progress_.is_last_batch = iterator->done();
    step(std::move(*item));
  }
  store_outputs();
  auto outputs = end();

  if (is_overridden(*run_.module, h.model_train)) {
    run_.call_module(h.train_hook, [&](LightningModule& m) { (m.*h.model_train)(); });
  } else {
    before.restore();
  }
  run_.last_validation = std::chrono::steady_clock::now();
  run_.set_results(outer);
  return outputs;
}

void EvaluationLoop::begin() {
  has_run_ = false;
  outputs_.clear();
  if (restarting_) {
    progress_.reset_on_restart();
  } else {
    progress_.reset_on_run();
  }
  if (!run_.fitting()) progress_.reset_on_run();
  if (run_.fitting()) data_->loader->set_epoch(run_.fit.epoch.current.processed);
  results_.set_dataloader_idx(std::nullopt);
}

void EvaluationLoop::step(CombinedIterator::Item item) {
  const auto& h = hooks();
  const int64_t loader = item.dataloader_idx;
  const int64_t index = indexed() ? loader : 0;
  const Batch batch = run_.to_device(std::move(item.batch), loader);
  progress_.ready();
  run_.on_batch_start(&batch, indexed() ? std::optional<int64_t>(loader) : std::nullopt);
  run_.call(h.batch_start_hook, h.batch_start, h.module_batch_start, batch, item.batch_idx, index);
  progress_.started();
  const auto output = run_.call_module(h.step_hook, [&](LightningModule& m) {
    return enter_method(*run_.strategy_, [&] { return (m.*h.step)(batch, item.batch_idx, index); });
  });
  progress_.processed();
  run_.call(h.batch_end_hook, h.batch_end, h.module_batch_end, output, batch, item.batch_idx,
            index);
  run_.on_batch_end();
  progress_.completed();
  if (!run_.sanity_checking()) {
    has_run_ = true;
    run_.update_eval_step_metrics(seen_[loader]++);
  }
  if (!progress_.is_last_batch) raise_if_interrupted();
}

void EvaluationLoop::store_outputs() {
  run_.epoch_end_reached();
  outputs_.push_back(run_.update_eval_epoch_metrics());
}

std::vector<ResultCollection::Values> EvaluationLoop::end() {
  const auto& h = hooks();
  run_.epoch_end_reached();
  results_.set_dataloader_idx(std::nullopt);
  run_.call(h.epoch_end_hook, h.epoch_end, h.module_epoch_end);
  run_.on_epoch_end();

  auto outputs = std::move(outputs_);
  outputs_.clear();
  const auto at_end = run_.update_eval_epoch_metrics();
  // A later value of a name replaces an earlier one, in its place.
  const auto put = [](ResultCollection::Values& values, const ResultCollection::Values& more) {
    for (const auto& value : more) {
      const auto same = std::find_if(values.begin(), values.end(),
                                     [&](const auto& other) { return other.first == value.first; });
      same == values.end() ? values.push_back(value) : void(same->second = value.second);
    }
  };
  ResultCollection::Values all;
  for (const auto& output : outputs) put(all, output);
  put(all, at_end);
  for (auto& output : outputs) put(output, at_end);
  run_.log_eval_end_metrics(all);

  run_.call_then_save(h.end_hook, FitPlace::kValidationEnd, h.end, h.module_end);
  run_.strategy_->on_evaluation_end();
  run_.reset_results();
  return outputs;
}

void EvaluationLoop::count_as_done() {
  setup_data();
  const auto batches = batches_now();
  int64_t most = 0;
  for (const auto& count : batches) {
    if (!count) return;
    most = std::max(most, *count);
  }
  if (most == 0) return;
  begin();
  progress_.add(most);
  progress_.is_last_batch = true;
}

void EvaluationLoop::teardown() {
  if (run_.results() == &results_) run_.set_results(nullptr);
}

ModuleMode::ModuleMode(torch::nn::Module& module)
    : root_(module), root_training_(module.is_training()) {
  for (const auto& child : module.modules(/*include_self=*/false)) {
    modes_.emplace_back(child, child->is_training());
  }
}

void ModuleMode::restore() const {
  // train() of a module sets its children too, so parents come first.
  root_.train(root_training_);
  for (const auto& [module, training] : modes_) module->train(training);
}

}  // namespace lightning
