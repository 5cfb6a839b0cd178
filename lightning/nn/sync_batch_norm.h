// Batch normalisation over the batches of all processes, in models made of LibTorch's own
// torch::nn::BatchNorm1d, 2d and 3d: nothing is converted or replaced. While a scope is open their
// operator, torch::batch_norm, takes mean and variance over all processes where it would take them
// over its own batch; running statistics become those of the whole batch. In eval mode, and for
// instance norm, nothing changes.
//
// Price of each norm of C channels: a gather of 2C + 1 numbers in forward, a sum of 2C in backward,
// both waited for. All processes run the same norms in the same order; their batches may differ in
// size. A batch with one value for each channel is refused by LibTorch before it comes here.
// Source: torch 2.11, `torch.nn.SyncBatchNorm`, which is for GPUs only.
#pragma once

#include "lightning/distributed/collectives.h"
#include "lightning/scope.h"

namespace lightning {

// For the operators of this thread; backward may be run after its end. `processes` must live until
// then.
Scope sync_batch_norm(Collectives& processes);

}  // namespace lightning
