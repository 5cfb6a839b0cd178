// The state of LibTorch's optimizers in the layout of Python's `Optimizer.state_dict()`:
//
//   {"state": {0: {"step": 0-dim float32, "exp_avg": tensor, ...}, ...},
//    "param_groups": [{"lr": ..., "betas": (..., ...), ..., "params": [0, 1, ...]}, ...]}
//
// so that a checkpoint moves both ways. Parameters are numbered through all groups; one that never
// stepped has no entry. Supported: SGD, Adam, AdamW, RMSprop, Adagrad, LBFGS and classes derived
// from them.
// Source: torch 2.11, `torch.optim`.
#pragma once

#include "lightning/checkpoint/state.h"
#include "lightning/fwd.h"

namespace lightning {

// The tensors are the optimizer's own, not copies: the next step changes them.
// Errors: MisconfigurationError for an optimizer of another type.
State optimizer_state_dict(const torch::optim::Optimizer& optimizer);

// Copies the tensors to the devices and types of the parameters, as Python does, and sets the
// options of the groups (the learning rate among them) from the state.
// Errors: CheckpointError, before anything is changed, for a state with another number of groups or
// parameters, of another kind of optimizer, with tensors of other shapes, or with an option that
// LibTorch's optimizer does not have (maximize=True).
void load_optimizer_state_dict(torch::optim::Optimizer& optimizer, const State& state);

}  // namespace lightning
