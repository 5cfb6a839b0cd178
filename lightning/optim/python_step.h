// The update of LibTorch's optimizers in the arithmetic of Python's, so that a run that moves
// between the two goes on bit for bit.
//
// torch::optim::Adam and AdamW, and RMSprop where it is centered, round differently from Python's:
// LibTorch writes the running mean m of the gradients g as `m.mul_(b).add_(g, 1 - b)`, Python as
// `m.lerp_(g, 1 - b)`. After 30 steps a sixth of the weights differ in their last bit. SGD,
// Adagrad, LBFGS without line search and the other RMSprop give the same bits already; LBFGS with
// strong_wolfe does not, for it searches in double where Python has float32 tensors.
// In float16 and bfloat16 SGD with momentum differs too: LibTorch rounds the factor 0.9 to 0.8984.
#pragma once

#include <ATen/core/Tensor.h>

#include <functional>

#include "lightning/fwd.h"

namespace lightning {

// Steps once, on the optimizer's own options and state, after the closure, if given, has run with
// gradients enabled; returns what it returned. Optimizers of other types, those derived from
// LibTorch's among them, take their own step().
//
// Errors: std::runtime_error for sparse gradients, as LibTorch's.
// Source: torch 2.11, `_single_tensor_adam` and `_single_tensor_rmsprop` of torch/optim.
at::Tensor python_step(torch::optim::Optimizer& optimizer,
                       const std::function<at::Tensor()>& closure = nullptr);

}  // namespace lightning
