// An optimizer as a module sees it: `step` goes through precision and strategy, fires the hooks and
// counts. The user's own optimizer is inside, unchanged.
// Source: Lightning 2.6, `LightningOptimizer`.
#pragma once

#include <ATen/core/Tensor.h>

#include <functional>
#include <memory>

#include "lightning/fwd.h"
#include "lightning/scope.h"

namespace lightning {

// To be used while the Trainer that made it lives: step() and toggle_model() go through it.
class LightningOptimizer {
 public:
  using Closure = std::function<at::Tensor()>;
  // How the engine steps: through the strategy, with the hooks before the update.
  using Stepper = std::function<at::Tensor(LightningOptimizer&, const Closure&)>;
  // Toggles parameters and, if asked, blocks the reduction of gradients while alive.
  using Toggler = std::function<Scope(LightningOptimizer&, bool sync_grad)>;

  LightningOptimizer(std::shared_ptr<torch::optim::Optimizer> optimizer, Stepper stepper,
                     Toggler toggler);

  // Steps once and counts as one optimizer step. The closure, if given, runs the model again and
  // returns its loss, with gradients enabled.
  at::Tensor step(const Closure& closure = nullptr);
  void zero_grad(bool set_to_none = true);

  // Only parameters of this optimizer require gradients while the scope is alive.
  //   sync_grad   false: gradients are not reduced over processes meanwhile
  Scope toggle_model(bool sync_grad = true);

  torch::optim::Optimizer& optimizer() const { return *optimizer_; }
  const std::shared_ptr<torch::optim::Optimizer>& shared() const { return optimizer_; }

 private:
  std::shared_ptr<torch::optim::Optimizer> optimizer_;
  Stepper stepper_;
  Toggler toggler_;
};

// Of all its parameters. Optimizer::zero_grad would detach them first, which it cannot where
// gradients are views of the buckets that a strategy reduces.
void drop_gradients(torch::optim::Optimizer& optimizer);

}  // namespace lightning
