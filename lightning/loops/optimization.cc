#include "lightning/loops/optimization.h"

#include <ATen/Functions.h>
#include <ATen/core/grad_mode.h>
#include <torch/optim/adagrad.h>
#include <torch/optim/adam.h>
#include <torch/optim/adamw.h>
#include <torch/optim/sgd.h>

#include <algorithm>
#include <memory>
#include <string>
#include <typeinfo>
#include <utility>
#include <vector>

#include "lightning/errors.h"
#include "lightning/log.h"
#include "lightning/optim/fused_step.h"
#include "lightning/overrides.h"
#include "lightning/recording.h"
#include "lightning/step/entry.h"

namespace lightning {
namespace {

StepOutput call_training_step(Run& run, const Batch& batch, int64_t batch_idx) {
  return run.call_module(Hook::training_step, [&](LightningModule& m) {
    return enter_method(*run.strategy_, [&] { return m.training_step(batch, batch_idx); });
  });
}

// The step with what comes before and after it, as one optimizer step wants it.
class Closure {
 public:
  Closure(Run& run, const Batch& batch, int64_t batch_idx)
      : run_(run), batch_(batch), batch_idx_(batch_idx) {}

  // The loss before it was divided, undefined when the step was skipped.
  at::Tensor operator()() {
    const at::AutoGradMode with_gradients(true);
    ran_ = true;
    auto output = call_training_step(run_, batch_, batch_idx_);
    if (output.skipped()) check_may_skip();
    auto loss = checked_loss(output);
    const auto windows = run_.settings.accumulate_grad_batches;
    if (loss.defined() && windows > 1) loss = loss / windows;
    if (loss.defined()) output_ = output.with_loss(loss.detach());
    if (batch_idx_ % windows == 0) zero_grad();
    if (loss.defined()) run_.backward(loss);
    return loss;
  }

  bool ran() const { return ran_; }
  StepOutput take_output() { return std::move(output_); }

 private:
  void check_may_skip() const {
    const auto& strategy = *run_.strategy_;
    if (strategy.world_size() == 1) return;
    throw MisconfigurationError(
        str("training_step returned no loss for batch ", batch_idx_, " on rank ",
            strategy.global_rank(), " of ", strategy.world_size(),
            " while the other ranks wait to reduce gradients. Return a scalar on every rank "
            "(0 * logits.sum() for an empty batch)."));
  }

  at::Tensor checked_loss(const StepOutput& output) const {
    const auto& loss = output.loss();
    if (!loss.defined()) {
      if (!output.extra().is_none()) {
        throw MisconfigurationError(str("training_step returned ", output.extra().describe(),
                                        " for batch ", batch_idx_,
                                        ", which holds no \"loss\" tensor. Return the loss, a map "
                                        "with \"loss\" in it, or lightning::skip."));
      }
      warn_once("training_step returned no loss. If that is on purpose, ignore this warning.");
    } else if (loss.numel() != 1) {
      throw MisconfigurationError(str("training_step returned a loss of shape ", loss.sizes(),
                                      " for batch ", batch_idx_,
                                      ", expected a scalar. Reduce it, "
                                      "for example with .mean()."));
    }
    return loss;
  }

  void zero_grad() {
    if (run_.optimizers_.empty()) return;
    auto& optimizer = run_.optimizers_[0]->optimizer();
    auto& progress = run_.fit.optimizer.zero_grad;
    progress.ready();
    run_.call(Hook::on_before_zero_grad, &Callback::on_before_zero_grad,
              &LightningModule::on_before_zero_grad, optimizer);
    progress.started();
    run_.call_module(Hook::optimizer_zero_grad, [&](LightningModule& m) {
      m.optimizer_zero_grad(run_.fit.epoch.current.completed, batch_idx_, optimizer);
    });
    progress.completed();
  }

  Run& run_;
  const Batch& batch_;
  int64_t batch_idx_;
  bool ran_ = false;
  StepOutput output_;
};

void step_optimizer(Run& run, int64_t batch_idx, Closure& closure) {
  // A strategy that accumulates by itself is asked at every batch and counted at the window's end.
  const bool counts = !run.should_accumulate();
  if (counts) run.fit.optimizer.step.ready();
  run.call_module(Hook::optimizer_step, [&](LightningModule& m) {
    m.optimizer_step(run.fit.epoch.current.completed, batch_idx, *run.optimizers_[0],
                     [&closure] { return closure(); });
  });
  if (!closure.ran()) {
    throw MisconfigurationError(
        "optimizer_step returned without running its closure, which holds training_step and "
        "backward. Pass the closure to optimizer.step(closure), or call it.");
  }
  if (counts) run.fit.optimizer.step.completed();
}

// ---- Recording ----------------------------------------------------------------------------------

struct AutomaticRecord : StepRecord {
  StepOutput output;
  std::vector<LoggedCall> logged;
  std::vector<at::Tensor> kept;
};

// Whether something in the tree was computed on the host.
bool holds_host_values(const Batch& tree, c10::Device device) {
  if (tree.is_tensor()) return tree.tensor().defined() && tree.tensor().device() != device;
  if (tree.is_list()) {
    return std::any_of(tree.as_list().begin(), tree.as_list().end(),
                       [&](const Batch& item) { return holds_host_values(item, device); });
  }
  if (tree.is_map()) {
    return std::any_of(tree.as_map().begin(), tree.as_map().end(),
                       [&](const auto& item) { return holds_host_values(item.second, device); });
  }
  return !tree.is_none();
}

// Whether fused_step() has a kernel for it, which reads the learning rate and the count of steps on
// the device. Any other step computes with numbers of the host.
bool steps_on_device(const torch::optim::Optimizer& optimizer) {
  const auto& type = typeid(optimizer);
  return type == typeid(torch::optim::SGD) || type == typeid(torch::optim::Adam) ||
         type == typeid(torch::optim::AdamW) || type == typeid(torch::optim::Adagrad);
}

bool has_parameters_on(const torch::optim::Optimizer& optimizer, c10::Device device) {
  for (const auto& group : optimizer.param_groups()) {
    for (const auto& parameter : group.params()) {
      if (parameter.device() != device) return false;
    }
  }
  return true;
}

// "Net overrides on_after_backward" where the module or a callback has code of its own in the part
// of a step that is recorded; empty where none has.
std::string overridden_hook(const Run& run) {
  std::string found;
#define LIGHTNING_IN_MODULE(hook)                                                  \
  if (found.empty() && is_overridden(*run.module, &LightningModule::hook)) {       \
    const LightningModule& module = *run.module;                                   \
    found = str(class_name(typeid(module)), " overrides ", to_string(Hook::hook)); \
  }
#define LIGHTNING_IN_CALLBACKS(hook)                                                   \
  for (const auto& one : run.callbacks) {                                              \
    if (found.empty() && is_overridden(*one, &Callback::hook)) {                       \
      const Callback& callback = *one;                                                 \
      found = str(class_name(typeid(callback)), " overrides ", to_string(Hook::hook)); \
    }                                                                                  \
  }
  LIGHTNING_IN_MODULE(on_before_zero_grad)
  LIGHTNING_IN_MODULE(optimizer_zero_grad)
  LIGHTNING_IN_MODULE(on_before_backward)
  LIGHTNING_IN_MODULE(backward)
  LIGHTNING_IN_MODULE(on_after_backward)
  LIGHTNING_IN_MODULE(on_before_optimizer_step)
  LIGHTNING_IN_MODULE(configure_gradient_clipping)
  LIGHTNING_IN_MODULE(optimizer_step)
  LIGHTNING_IN_CALLBACKS(on_before_zero_grad)
  LIGHTNING_IN_CALLBACKS(on_before_backward)
  LIGHTNING_IN_CALLBACKS(on_after_backward)
  LIGHTNING_IN_CALLBACKS(on_before_optimizer_step)
#undef LIGHTNING_IN_CALLBACKS
#undef LIGHTNING_IN_MODULE
  return found;
}

class AutomaticStep : public TrainingStep {
 public:
  AutomaticStep(Run& run, int64_t batch_idx)
      : run_(run),
        batch_idx_(batch_idx),
        kind_{batch_idx % run.settings.accumulate_grad_batches == 0,
              !run.optimizers_.empty() &&
                  (run.strategy_->owns_gradient_accumulation() || !run.should_accumulate()),
              run.settings.accumulate_grad_batches} {}

  StepKind kind() const override { return kind_; }

  StepOutput run(const Batch& batch) override {
    Closure closure(run_, batch, batch_idx_);
    if (kind_.updates) {
      step_optimizer(run_, batch_idx_, closure);
    } else {
      const Scope no_sync = run_.strategy_->no_backward_sync(*run_.module);
      closure();
      if (run_.optimizers_.empty() && !run_.should_accumulate()) run_.fit.optimizer.step.add(1);
    }
    return closure.take_output();
  }

  torch::nn::Module& module() override { return *run_.module; }
  c10::Device device() const override { return run_.strategy_->root_device(); }
  int64_t epoch() const override { return run_.fit.epoch.current.ready; }

  std::string obstacle() const override {
    const auto& strategy = *run_.strategy_;
    if (run_.optimizers_.empty()) return "there is no optimizer";
    if (strategy.world_size() > 1) return str("there are ", strategy.world_size(), " processes");
    if (strategy.owns_gradient_accumulation()) return "the strategy accumulates by itself";
    if (strategy.owns_gradient_clipping()) return "the strategy clips gradients by itself";
    if (run_.settings.detect_anomaly) return "detect_anomaly looks at every gradient";
    const auto& optimizer = run_.optimizers_[0]->optimizer();
    if (!steps_on_device(optimizer) || !has_parameters_on(optimizer, device())) {
      return str(class_name(typeid(optimizer)), " computes its step on the host");
    }
    return overridden_hook(run_);
  }

  std::unique_ptr<StepRecord> record(const Batch& inputs) override {
    auto record = std::make_unique<AutomaticRecord>();
    bool recorded = false;
    const Scope undo = scope_exit([&, before = run_.fit.optimizer] {
      run_.fit.optimizer = before;
      if (!recorded) run_.strategy_->precision().teardown();  // the step is done again
    });
    const RecordingScope recording(record->kept);
    const Scope log = run_.record_log(record->logged);
    const auto output = run(inputs);
    if (!output.loss().defined()) throw CannotRecord("training_step returned no loss");
    if (holds_host_values(output.extra(), device()) || output.loss().device() != device()) {
      throw CannotRecord(
          "training_step returns what it computed on the host, which a replay cannot compute");
    }
    recorded = true;
    record->output = StepOutput(output.extra().detach()).with_loss(output.loss());
    return record;
  }

  bool prepare() override {
    return !kind_.updates || upload_options(run_.optimizers_[0]->optimizer());
  }

  StepOutput finish(const StepRecord& made) override {
    const auto& record = static_cast<const AutomaticRecord&>(made);
    auto& counts = run_.fit.optimizer;
    if (kind_.clears) counts.zero_grad.add(1);
    if (kind_.updates) {
      count_step(run_.optimizers_[0]->optimizer());
      counts.step.add(1);
    }
    run_.log_again(record.logged);
    const auto copy = [](const at::Tensor& tensor) { return tensor.clone(); };
    const auto& output = record.output;
    const auto extra =
        output.extra().is_none() ? StepOutput() : StepOutput(output.extra().apply(copy));
    return extra.with_loss(output.loss().clone());
  }

 private:
  Run& run_;
  int64_t batch_idx_;
  StepKind kind_;
};

}  // namespace

StepOutput run_automatic_optimization(Run& run, const Batch& batch, int64_t batch_idx) {
  AutomaticStep step(run, batch_idx);
  return run.executor->run(step, batch);
}

StepOutput run_manual_optimization(Run& run, const Batch& batch, int64_t batch_idx) {
  run.executor->stand_aside("the module optimizes by hand");
  auto output = call_training_step(run, batch, batch_idx);
  return output.loss().defined() ? output.with_loss(output.loss().detach()) : output;
}

}  // namespace lightning
