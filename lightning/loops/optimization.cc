#include "lightning/loops/optimization.h"

#include <ATen/Functions.h>
#include <ATen/core/grad_mode.h>
#include <torch/optim/optimizer.h>

#include <utility>

#include "lightning/errors.h"
#include "lightning/log.h"
#include "lightning/step/entry.h"

namespace lightning {
namespace {

StepOutput call_training_step(Run& run, const Batch& batch, int64_t batch_idx) {
  auto output = run.call_module(Hook::training_step, [&](LightningModule& m) {
    return enter_method(*run.strategy_, [&] { return m.training_step(batch, batch_idx); });
  });
  if (output.skipped() && run.strategy_->world_size() > 1) {
    throw MisconfigurationError(
        str("training_step returned no loss for batch ", batch_idx, " on rank ",
            run.strategy_->global_rank(), " of ", run.strategy_->world_size(),
            " while the other ranks wait to reduce gradients. Return a scalar on every rank "
            "(0 * logits.sum() for an empty batch)."));
  }
  return output;
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
      m.optimizer_zero_grad(run_.current_epoch(), batch_idx_, optimizer);
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
    m.optimizer_step(run.current_epoch(), batch_idx, *run.optimizers_[0],
                     [&closure] { return closure(); });
  });
  if (!closure.ran()) {
    throw MisconfigurationError(
        "optimizer_step returned without running its closure, which holds training_step and "
        "backward. Pass the closure to optimizer.step(closure), or call it.");
  }
  if (counts) run.fit.optimizer.step.completed();
}

}  // namespace

StepOutput run_automatic_optimization(Run& run, const Batch& batch, int64_t batch_idx) {
  StepOutput output;
  const bool stepping = !run.optimizers_.empty() &&
                        (run.strategy_->owns_gradient_accumulation() || !run.should_accumulate());
  run.executor->run(batch, stepping, [&](const Batch& inputs) {
    Closure closure(run, inputs, batch_idx);
    if (stepping) {
      step_optimizer(run, batch_idx, closure);
    } else {
      const Scope no_sync = run.strategy_->no_backward_sync(*run.module);
      closure();
      if (run.optimizers_.empty() && !run.should_accumulate()) run.fit.optimizer.step.add(1);
    }
    output = closure.take_output();
  });
  return output;
}

StepOutput run_manual_optimization(Run& run, const Batch& batch, int64_t batch_idx) {
  auto output = call_training_step(run, batch, batch_idx);
  return output.loss().defined() ? output.with_loss(output.loss().detach()) : output;
}

}  // namespace lightning
