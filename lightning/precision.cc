#include "lightning/precision.h"

#include "lightning/checkpoint/state.h"
#include "lightning/optim/python_step.h"

namespace lightning {

at::Tensor Precision::optimizer_step(const OptimizerStep& step) {
  return python_step(step.optimizer, [&step] {
    auto loss = step.closure();
    step.after_closure();
    return loss;
  });
}

State Precision::state_dict() const { return {}; }

}  // namespace lightning
