#include "lightning/precision.h"

#include <torch/optim/optimizer.h>

#include "lightning/checkpoint/state.h"

namespace lightning {

at::Tensor Precision::optimizer_step(const OptimizerStep& step) {
  return step.optimizer.step([&step] {
    auto loss = step.closure();
    step.after_closure();
    return loss;
  });
}

State Precision::state_dict() const { return {}; }

}  // namespace lightning
