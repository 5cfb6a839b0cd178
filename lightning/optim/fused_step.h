// The update of ordinary torch::optim optimizers in one pass over parameters, gradients and state,
// in place of the several that their own step() takes. Nothing changes for the user: options, state
// and checkpoints are the optimizer's own.
//
// On CUDA exactly torch::optim::SGD, Adam, AdamW and Adagrad are stepped by at::_fused_*_; under
// working copies Adam and AdamW in float32 by a kernel that writes the copies on the way
// (lightning/cuda/adam.h). Learning rates are rounded to float32 there, as a recorded step reads
// them, but for float64 parameters in ordinary steps.
//
// On the CPU a step has the bits of Python's default, so that a run may move between the two. Of
// LibTorch's fused operators only SGD's without momentum has them (float32 and float64, with weight
// decay and without). Measured over 30 steps on 104,000 numbers, others differ by up to 2e-7 in
// float32: SGD with momentum in 5 of them (in the tails of vectors), Adam and AdamW in 20 to 300,
// Adagrad in 800; in bfloat16 all do. They take python_step().
//
// Everything else takes python_step() too, which is the optimizer's own step() but for what it
// knows: derived classes, other optimizers, sparse gradients, complex parameters, gradients of
// another dtype or on another device than their parameter. One such parameter decides for all.
//
// On CUDA the count of steps lives in a float32 tensor beside each parameter's state, where the
// kernels read it (lightning/optim/step_count.h). The integer in the state advances with it; where
// only the device knows whether a step was skipped it is put right by settle_steps(), which writing
// the optimizer's state calls.
#pragma once

#include <ATen/core/Tensor.h>

#include <functional>

#include "lightning/fwd.h"

namespace lightning {

class WorkingCopies;

struct StepAids {
  // 16-bit copies that are written with the parameters.
  WorkingCopies* copies = nullptr;
  // Of a gradient scaler, float32 scalars on the parameters' device; undefined without one.
  //   grad_scale  what the gradients are still multiplied with: it is divided out on the way, in
  //               the gradients too. Undefined where they were unscaled before.
  //   found_inf   1 where a gradient is not finite: then nothing is updated or counted. Its value
  //   is
  //               read after the closure has run.
  at::Tensor grad_scale, found_inf;
};

// Steps once, after the closure, if given, has run with gradients enabled; returns what it
// returned. Waits for nothing on the device, but under found_inf for an optimizer that takes its
// own step, and for the first step of SGD's momentum.
//
// While the thread records (lightning/recording.h) learning rates are read from tensors on the
// device, and nothing is counted: replays count.
// Errors: CannotRecord where upload_options() was not called before, where a parameter was not
// stepped before, and where the optimizer takes its own step on a GPU; those of that step.
at::Tensor fused_step(torch::optim::Optimizer& optimizer,
                      const std::function<at::Tensor()>& closure = nullptr,
                      const StepAids& aids = {});

// Before a recording and before each replay of recorded steps: brings learning rates that changed
// on the host to the device. False, once, where a replay would not do what the optimizer says now,
// so that everything recorded of it must be recorded anew: other options (betas, momentum, weight
// decay) changed, state was loaded, a group was added, a parameter moved.
bool upload_options(torch::optim::Optimizer& optimizer);

// After each replay: the replayed step counts.
void count_step(torch::optim::Optimizer& optimizer);

}  // namespace lightning
