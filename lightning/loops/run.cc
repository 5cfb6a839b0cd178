#include "lightning/loops/run.h"

#include <ATen/Functions.h>
#include <torch/optim/optimizer.h>

#include <algorithm>
#include <cmath>
#include <unordered_set>
#include <utility>

#include "lightning/distributed/watch.h"
#include "lightning/distributed/whereabouts.h"
#include "lightning/errors.h"
#include "lightning/line_printer.h"
#include "lightning/log.h"
#include "lightning/overrides.h"
#include "lightning/recording.h"

namespace lightning {
namespace {

// A tensor that two modules share is there twice in C++'s parameters() and would be stepped twice;
// Python's gives it once.
void drop_repeated(torch::optim::Optimizer& optimizer) {
  std::unordered_set<const void*> seen;
  for (auto& group : optimizer.param_groups()) {
    auto& all = group.params();
    const auto repeated = [&](const at::Tensor& one) {
      return !seen.insert(one.unsafeGetTensorImpl()).second;
    };
    all.erase(std::remove_if(all.begin(), all.end(), repeated), all.end());
  }
}

void update(MetricMap& store, const ResultCollection::Values& values) {
  for (const auto& [name, value] : values) store[name] = value.tensor();
}

}  // namespace

Run::~Run() { detach(); }

void Run::detach() {
  // Another Trainer may run them by now.
  if (module != nullptr && module->attached() && &module->trainer() == &trainer_) {
    module->attach(nullptr);
  }
  if (datamodule != nullptr) datamodule->attach(nullptr);
}

bool Run::can_stop_early() const {
  const bool epochs = fit.epoch.current.processed >= settings.min_epochs;
  const bool steps = !settings.min_steps || global_step() >= *settings.min_steps;
  return epochs && steps;
}

void Run::agree_on_stop() {
  if (should_stop != stop_agreed_) stop_asked_ = std::exchange(should_stop, stop_agreed_);
  if (!meet_here(*strategy_, Matter::kStop, stop_asked_ != stop_agreed_)) return;
  const Scope call = in_call("the decision to stop");
  should_stop = stop_agreed_ = stop_asked_ = strategy_->reduce_any(stop_asked_);
}

bool Run::num_ready_batches_reached() const {
  return (fit.max_batches && fit.batch.current.ready == *fit.max_batches) ||
         fit.batch.is_last_batch;
}

bool Run::max_steps_reached() const {
  return settings.max_steps != -1 && global_step() >= settings.max_steps;
}

bool Run::should_accumulate() const {
  const bool window_done = fit.batch.current.ready % settings.accumulate_grad_batches == 0;
  const bool last = num_ready_batches_reached() && !strategy_->owns_gradient_accumulation();
  return !window_done && !last;
}

int64_t Run::global_step() const {
  refuse_in_recording("training_step asks for global_step()");
  if (module == nullptr || module->automatic_optimization()) {
    return fit.optimizer.step.total.completed;
  }
  return fit.manual_step.total.completed;
}

std::string Run::module_action(Hook hook) const {
  const auto& module_ref = *module;
  return "[LightningModule]" + class_name(typeid(module_ref)) + "." + to_string(hook);
}

std::string Run::datamodule_action(Hook hook) const {
  const auto& datamodule_ref = *datamodule;
  return "[LightningDataModule]" + class_name(typeid(datamodule_ref)) + "." + to_string(hook);
}

// ---- A batch's way to the device ----------------------------------------------------------------

Batch Run::to_device(Batch batch, int64_t dataloader_idx) {
  batch = strategy_->precision().convert_input(std::move(batch));
  // The data module's hook is used where it has one of its own.
  const auto through = [&](Hook hook, auto of_datamodule, auto of_module, auto... device) {
    if (datamodule != nullptr && is_overridden(*datamodule, of_datamodule)) {
      const ProfileScope timed(profiler.get(), [&] { return datamodule_action(hook); });
      batch = (datamodule.get()->*of_datamodule)(std::move(batch), device..., dataloader_idx);
    } else {
      batch = call_module(hook, [&](LightningModule& m) {
        return (m.*of_module)(std::move(batch), device..., dataloader_idx);
      });
    }
  };
  through(Hook::on_before_batch_transfer, &LightningDataModule::on_before_batch_transfer,
          &LightningModule::on_before_batch_transfer);
  through(Hook::transfer_batch_to_device, &LightningDataModule::transfer_batch_to_device,
          &LightningModule::transfer_batch_to_device, strategy_->root_device());
  through(Hook::on_after_batch_transfer, &LightningDataModule::on_after_batch_transfer,
          &LightningModule::on_after_batch_transfer);
  return batch;
}

// ---- Logged values ------------------------------------------------------------------------------

void Run::merge() {
  if (results_ == nullptr || results_->empty()) return;
  const auto metrics = current_metrics();
  update(callback_metrics_, metrics.callback);
  update(logged_metrics_, metrics.log);
  update(progress_bar_metrics_, metrics.progress_bar);
}

void Run::drop_results(const ResultCollection* results) {
  if (results_ != results) return;
  results_ = nullptr;
  in_batches_ = InBatches::kNo;
}

void Run::set_results(ResultCollection* results) {
  if (results == results_) return;
  merge();
  results_ = results;
}

void Run::on_batch_start(const Batch* batch, std::optional<int64_t> dataloader_idx) {
  // The values of the loader before are out of sight from here on.
  if (in_batches_ != InBatches::kNo && results_->dataloader_idx() != dataloader_idx) merge();
  in_batches_ = in_batches_ == InBatches::kNo ? InBatches::kFirst : InBatches::kLater;
  results_->start_batch(batch, dataloader_idx);
}

void Run::on_batch_end() { results_->drop_batch(); }

void Run::epoch_end_reached() {
  if (in_batches_ != InBatches::kNo) merge();  // the last batch's values; then the epoch's count
  in_batches_ = InBatches::kNo;
  // Values of the epoch are reduced over the ranks when somebody asks; a progress bar asks on rank
  // 0 alone.
  if (strategy_->world_size() > 1) merge();
}

void Run::on_epoch_end() {
  merge();
  last_logging_hook_ = Hook::none;
}

bool Run::should_update_logs() const {
  if (settings.log_every_n_steps == 0) return false;
  return (fit.batches_that_stepped + 1) % settings.log_every_n_steps == 0 || should_stop;
}

void Run::update_train_step_metrics() {
  if (should_accumulate() && module->automatic_optimization()) return;
  if (should_update_logs() || settings.fast_dev_run > 0) log_row(current_metrics().log);
}

void Run::update_train_epoch_metrics() {
  log_row(current_metrics().log);
  reset_results();
}

void Run::update_eval_step_metrics(int64_t step) { log_row(current_metrics().log, step); }

ResultCollection::Values Run::update_eval_epoch_metrics() {
  if (sanity_checking()) return {};
  auto metrics = current_metrics();
  merge();
  return std::move(metrics.log);
}

void Run::log_eval_end_metrics(const ResultCollection::Values& values) {
  if (!sanity_checking()) log_row(values);
}

void Run::reset_results() {
  if (results_ != nullptr) {
    merge();
    results_->reset();
  }
  in_batches_ = InBatches::kNo;
  last_logging_hook_ = Hook::none;
}

void Run::reset_metrics() {
  callback_metrics_.clear();
  logged_metrics_.clear();
  progress_bar_metrics_.clear();
}

State Run::metrics_state() {
  const auto save = [](const MetricMap& metrics) {
    auto state = State::dict();
    for (const auto& [name, value] : metrics) state[name] = value;
    return state;
  };
  merge();
  return State::dict({{"callback_metrics", save(callback_metrics_)},
                      {"logged_metrics", save(logged_metrics_)},
                      {"progress_bar_metrics", save(progress_bar_metrics_)},
                      {"last_logging_hook", to_string(last_logging_hook_)}});
}

void Run::load_metrics_state(const State& state) {
  const auto load = [&](const char* key, MetricMap& metrics) {
    metrics.clear();
    for (const auto& [name, value] : state.at(key).as_dict()) {
      metrics[to_string(name)] = value.as_tensor().clone();
    }
  };
  load("callback_metrics", callback_metrics_);
  load("logged_metrics", logged_metrics_);
  load("progress_bar_metrics", progress_bar_metrics_);
  last_logging_hook_ = hook_of(state.at("last_logging_hook").as_string());
}

void Run::log_row(const ResultCollection::Values& values, std::optional<int64_t> step) {
  if (loggers_.empty() || values.empty()) return;
  update(logged_metrics_, values);
  MetricRow row;
  row.reserve(values.size() + 1);
  bool has_epoch = false;
  for (const auto& [name, value] : values) {
    if (!step && name == "step") {
      step = static_cast<int64_t>(value.item());
      continue;
    }
    has_epoch = has_epoch || name == "epoch";
    row.emplace_back(name, value.item());
  }
  if (!step) {
    if (!has_epoch) row.emplace_back("epoch", static_cast<double>(current_epoch()));
    step = fit.batches_that_stepped;
  }
  for (const auto& logger : loggers_) {
    logger->log_metrics(row, *step);
    logger->save();
  }
}

const MetricMap& Run::callback_metrics() {
  merge();
  return callback_metrics_;
}

const MetricMap& Run::logged_metrics() {
  merge();
  return logged_metrics_;
}

const MetricMap& Run::progress_bar_metrics() {
  merge();
  return progress_bar_metrics_;
}

void Run::add_callback_metric(const std::string& name, double value) {
  callback_metrics_[name] = at::scalar_tensor(value, at::kFloat);
}

Scope Run::record_log(std::vector<LoggedCall>& calls) {
  recorded_log_ = &calls;
  return scope_exit([this] { recorded_log_ = nullptr; });
}

// A copy, for the step may go on to change the tensor in place.
void Run::note(const std::string& name, const LogValue& value, const LogOptions& options) {
  const auto refuse = [&](const char* what) {
    throw CannotRecord(str("log(\"", name, "\") in training_step ", what));
  };
  if (options.enable_graph()) refuse("keeps the autograd graph of its value");
  if (value.number() != nullptr) refuse("gets a number, which a replay cannot compute");
  const auto copy = [&](const at::Tensor& tensor) {
    if (tensor.defined() && tensor.device() != strategy_->root_device()) {
      refuse("gets a tensor on another device, which a replay cannot compute");
    }
    return tensor.defined() ? tensor.detach().clone() : tensor;
  };
  if (value.metric() == nullptr) {
    recorded_log_->push_back({name, LogValue(copy(*value.tensor())), options, {}});
  } else {
    recorded_log_->push_back({name, value, options, copy(value.metric()->batch_value())});
  }
}

void Run::log_again(const std::vector<LoggedCall>& calls) {
  if (calls.empty()) return;
  const HookScope in_step(*this, Hook::training_step);
  for (const auto& call : calls) {
    if (call.batch_value.defined()) {
      // A replay is the metric's forward(), which leaves the batch's value there.
      const_cast<at::Tensor&>(call.value.metric()->batch_value()) = call.batch_value.clone();
    }
    log(call.name, call.value, call.options);
  }
}

void Run::log(const std::string& name, const LogValue& value, const LogOptions& given) {
  if (value.number() == nullptr && value.tensor() == nullptr && value.metric() == nullptr) {
    throw MisconfigurationError(str("log(\"", name,
                                    "\") got a metric that is null. Make it before "
                                    "it is logged, in the module's constructor for example."));
  }
  if (recorded_log_ != nullptr) return note(name, value, given);
  if (settings.barebones) {
    warn_once("log(...) has no effect under Trainer(barebones=true).");
    return;
  }
  const auto rule = log_rule(hook_);
  if (!rule.allowed || results_ == nullptr) {
    throw MisconfigurationError(str(
        "log(\"", name, "\") was called in ", hook_ == Hook::none ? "no hook" : to_string(hook_),
        ", where nothing is reduced over batches. Call a logger's log_metrics there, or log in "
        "a step or in an epoch hook."));
  }
  if (name.find("/dataloader_idx_") != std::string::npos) {
    throw MisconfigurationError(str("log got the name \"", name,
                                    "\": \"/dataloader_idx_\" is added by itself where there are "
                                    "several loaders. Leave it out."));
  }
  auto options = given;
  options.on_step(given.on_step().value_or(rule.on_step));
  options.on_epoch(given.on_epoch().value_or(rule.on_epoch));
  if (rule.epoch_only && (*options.on_step() || !*options.on_epoch())) {
    throw MisconfigurationError(str("log(\"", name, "\") got on_step=", *options.on_step(),
                                    ", on_epoch=", *options.on_epoch(), " in ", to_string(hook_),
                                    ", where only on_step=false, on_epoch=true makes sense."));
  }
  if (!*options.on_step() && !*options.on_epoch()) {
    throw MisconfigurationError(str("log(\"", name,
                                    "\") got on_step=false and on_epoch=false, so it would log "
                                    "nothing. Set one of them."));
  }
  if (last_logging_hook_ != hook_ && in_batches_ != InBatches::kLater) {
    // A new epoch of this hook: what it logged in the one before is done with.
    merge();
    results_->reset(hook_);
  }
  last_logging_hook_ = hook_;
  if (options.rank_zero_only() && !strategy_->is_global_zero()) return;
  results_->log(hook_, name, value, options, *strategy_);
}

void Run::print(const std::string& line) {
  refuse_in_recording("training_step prints");
  if (!strategy_->is_global_zero()) return;
  for (const auto& callback : callbacks) {
    if (auto* printer = dynamic_cast<LinePrinter*>(callback.get()))
      return printer->print_line(line);
  }
  std::fputs((line + "\n").c_str(), stdout);
  std::fflush(stdout);
}

// ---- Optimizers ---------------------------------------------------------------------------------

State Run::gradients_state() const {
  if (module->automatic_optimization()) {
    // A batch that is to be done again is counted already.
    const bool pending = fit.place == FitPlace::kInBatch
                             ? (fit.batch.current.ready - 1) % settings.accumulate_grad_batches != 0
                             : should_accumulate();
    if (!pending) return {};
  }
  auto gradients = State::dict();
  for (const auto& item : module->named_parameters()) {
    if (item.value().grad().defined()) gradients[item.key()] = item.value().grad();
  }
  return gradients;
}

void Run::load_gradients_state(const State& state) {
  if (state.is_none()) return;
  for (auto& item : module->named_parameters()) {
    auto& parameter = item.value();
    if (const auto* gradient = state.find(item.key())) {
      if (gradient->as_tensor().sizes() != parameter.sizes()) {
        throw CheckpointError(str("The checkpoint holds a gradient of shape ",
                                  gradient->as_tensor().sizes(), " for \"", item.key(),
                                  "\" of shape ", parameter.sizes(),
                                  ". Build the module as it was when the checkpoint was written."));
      }
      parameter.mutable_grad() = gradient->as_tensor().to(
          parameter.device(), parameter.scalar_type(), /*non_blocking=*/false, /*copy=*/true);
    }
  }
}

std::vector<torch::optim::Optimizer*> Run::configure_optimizers() {
  const auto returned = call_module(Hook::configure_optimizers,
                                    [](LightningModule& m) { return m.make_optimizers(); });
  schedulers = returned.lr_schedulers();
  if (returned.configs().empty()) {
    warn("configure_optimizers returned no optimizer: fit runs without training the model.");
  }
  if (returned.configs().size() > 1 && module->automatic_optimization()) {
    throw MisconfigurationError(
        str("configure_optimizers returned ", returned.configs().size(),
            " optimizers, but automatic optimization steps one. Call "
            "set_automatic_optimization(false) in the module and step them in training_step."));
  }
  for (const auto& config : schedulers) {
    if (config.scheduler->counts_steps() && config.interval == "epoch") {
      warn(
          "A OneCycleLR schedule steps once an epoch; it is meant to step with every batch. Set "
          "LRSchedulerConfig(schedule).set_interval(\"step\") if that was not meant.");
    }
  }
  const auto step = [this](LightningOptimizer& optimizer,
                           const LightningOptimizer::Closure& closure) {
    const bool manual = !module->automatic_optimization();
    if (manual) fit.manual_step.ready();
    const OptimizerStep request{
        optimizer.optimizer(), closure ? closure : [] { return at::Tensor(); },
        [&] {
          call(Hook::on_before_optimizer_step, &Callback::on_before_optimizer_step,
               &LightningModule::on_before_optimizer_step, optimizer.optimizer());
          if (manual || strategy_->owns_gradient_clipping()) return;
          call_module(Hook::configure_gradient_clipping, [&](LightningModule& m) {
            m.configure_gradient_clipping(optimizer.optimizer(), settings.gradient_clip_val,
                                          settings.gradient_clip_algorithm);
          });
        },
        manual};
    auto loss = strategy_->optimizer_step(request);
    if (manual) fit.manual_step.completed();
    return loss;
  };
  const auto toggle = [this](LightningOptimizer& optimizer, bool sync_grad) {
    module->toggle_optimizer(optimizer);
    const Scope sync = sync_grad ? nullptr : strategy_->no_backward_sync(*module);
    return scope_exit([this, &optimizer, sync] { module->untoggle_optimizer(optimizer); });
  };
  optimizers_.clear();
  std::vector<torch::optim::Optimizer*> made;
  for (const auto& config : returned.configs()) {
    drop_repeated(*config.optimizer);
    optimizers_.push_back(std::make_shared<LightningOptimizer>(config.optimizer, step, toggle));
    made.push_back(config.optimizer.get());
  }
  return made;
}

void Run::backward(const at::Tensor& loss) {
  const auto scaled = strategy_->precision().scale_loss(loss);
  strategy_->backward(scaled, [&](const at::Tensor& value) {
    call(Hook::on_before_backward, &Callback::on_before_backward,
         &LightningModule::on_before_backward, value);
    call_module(Hook::backward, [&](LightningModule& m) { m.backward(value); });
    call(Hook::on_after_backward, &Callback::on_after_backward,
         &LightningModule::on_after_backward);
  });
}

void Run::manual_backward(const at::Tensor& loss) {
  if (module->automatic_optimization()) {
    throw MisconfigurationError(
        "manual_backward was called in automatic optimization, which calls backward itself. Call "
        "set_automatic_optimization(false) in the module's constructor, or leave the call out.");
  }
  backward(loss);
}

void Run::clip_gradients(torch::optim::Optimizer& optimizer, std::optional<double> limit,
                         const std::optional<std::string>& algorithm) {
  const auto& flag = settings.gradient_clip_val;
  if (limit && flag && *limit != *flag) {
    throw MisconfigurationError(str("clip_gradients got ", *limit,
                                    ", but the Trainer was given gradient_clip_val=", *flag,
                                    ". Give one of them."));
  }
  const auto& flag_algorithm = settings.gradient_clip_algorithm;
  if (algorithm && flag_algorithm && *algorithm != *flag_algorithm) {
    throw MisconfigurationError(str("clip_gradients got algorithm \"", *algorithm,
                                    "\", but the Trainer was given gradient_clip_algorithm=\"",
                                    *flag_algorithm, "\". Give one of them."));
  }
  const double value = limit.value_or(flag.value_or(0.0));
  const auto name = algorithm.value_or(flag_algorithm.value_or("norm"));
  if (name != "norm" && name != "value") {
    throw MisconfigurationError(
        str("clip_gradients got algorithm \"", name, "\", expected \"norm\" or \"value\"."));
  }
  if (value <= 0) return;
  strategy_->clip_gradients(optimizer, value,
                            name == "norm" ? ClipAlgorithm::kNorm : ClipAlgorithm::kValue);
}

// ---- What a module may ask ----------------------------------------------------------------------

Trainer* Run::trainer() {
  refuse_in_recording("training_step asks for the trainer");
  return &trainer_;
}

int64_t Run::current_epoch() const {
  refuse_in_recording("training_step asks for current_epoch()");
  return fit.epoch.current.completed;
}

std::vector<std::shared_ptr<LightningOptimizer>> Run::optimizers() {
  refuse_in_recording("training_step asks for its optimizers");
  return optimizers_;
}

std::vector<std::shared_ptr<Logger>> Run::loggers() {
  refuse_in_recording("training_step asks for the loggers");
  return loggers_;
}

std::vector<std::shared_ptr<LRScheduler>> Run::lr_schedulers() {
  refuse_in_recording("training_step asks for the schedules");
  std::vector<std::shared_ptr<LRScheduler>> all;
  for (const auto& config : schedulers) all.push_back(config.scheduler);
  return all;
}

}  // namespace lightning
