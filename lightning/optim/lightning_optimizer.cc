#include "lightning/optim/lightning_optimizer.h"

#include <torch/optim/optimizer.h>

#include <utility>

namespace lightning {

LightningOptimizer::LightningOptimizer(std::shared_ptr<torch::optim::Optimizer> optimizer,
                                       Stepper stepper, Toggler toggler)
    : optimizer_(std::move(optimizer)),
      stepper_(std::move(stepper)),
      toggler_(std::move(toggler)) {}

at::Tensor LightningOptimizer::step(const Closure& closure) { return stepper_(*this, closure); }

void LightningOptimizer::zero_grad(bool set_to_none) {
  if (!set_to_none) return optimizer_->zero_grad(false);
  drop_gradients(*optimizer_);
}

Scope LightningOptimizer::toggle_model(bool sync_grad) { return toggler_(*this, sync_grad); }

void drop_gradients(torch::optim::Optimizer& optimizer) {
  for (auto& group : optimizer.param_groups()) {
    for (auto& parameter : group.params()) parameter.mutable_grad().reset();
  }
}

}  // namespace lightning
