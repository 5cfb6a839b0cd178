// What the fused steps know of torch::optim's optimizers: which they take, and where each keeps its
// state. Part of fused_step.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/optim/optimizer.h>

#include <memory>

#include "lightning/optim/step_count.h"

namespace lightning::fused {

using torch::optim::Optimizer;
using torch::optim::OptimizerOptions;
using torch::optim::OptimizerParamState;

enum class Kind { kOther, kSGD, kAdam, kAdamW, kAdagrad };

// By exact type: a derived class has a step of its own.
Kind kind_of(const Optimizer& optimizer);

// Null where the parameter has none.
OptimizerParamState* state_of(const Optimizer& optimizer, const at::Tensor& param);

// The tensors of a state, where it keeps them, null after the last.
//   SGD       momentum
//   Adam(W)   mean of the gradients, of their squares, and (amsgrad) the largest of those
//   Adagrad   sum of squares
struct Moments {
  at::Tensor* all[3] = {nullptr, nullptr, nullptr};
};
Moments moments_of(Kind kind, OptimizerParamState& state);
// How many of them an optimizer with these options uses.
int moments_wanted(Kind kind, const OptimizerOptions& options);

// The count beside a state; null where it has none yet, and for SGD.
StepCount* count_of(Kind kind, OptimizerParamState* state);
// As above, after making what is not there: the state, and the count beside it.
StepCount* make_count(Kind kind, std::unique_ptr<OptimizerParamState>& state);
// Puts the host's count on the parameter's device; where it was before, if it was.
void place(StepCount& count, const at::Tensor& param);

bool uses_cuda(const Optimizer& optimizer);

// Calls f(options of its group, parameter) for each parameter that has a gradient.
template <class F>
void for_each_gradient(const Optimizer& optimizer, const F& f) {
  for (const auto& group : optimizer.param_groups()) {
    for (const at::Tensor& param : group.params()) {
      if (param.grad().defined()) f(group.options(), param);
    }
  }
}

}  // namespace lightning::fused
