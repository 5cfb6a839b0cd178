#include "lightning/precision.h"

#include "lightning/checkpoint/state.h"
#include "lightning/optim/fused_step.h"

namespace lightning {

at::Tensor Precision::optimizer_step(const OptimizerStep& step) {
  return fused_step(step.optimizer, [&step] {
    auto loss = step.closure();
    step.after_closure();
    return loss;
  });
}

State Precision::state_dict() const { return {}; }

}  // namespace lightning
