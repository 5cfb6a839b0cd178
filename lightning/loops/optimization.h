// One training batch: the step, backward and, at the end of an accumulation window, the optimizer.
// Source: Lightning 2.6, `_AutomaticOptimization`, `_ManualOptimization`; the reference's section
// 1.6.
#pragma once

#include "lightning/loops/run.h"

namespace lightning {

// Gives what on_train_batch_end gets: the loss, detached and already divided by
// accumulate_grad_batches, with what the step returned beside it.
// Errors: MisconfigurationError when an override of optimizer_step did not run its closure, or when
// training_step returned something else than a scalar loss.
StepOutput run_automatic_optimization(Run& run, const Batch& batch, int64_t batch_idx);
StepOutput run_manual_optimization(Run& run, const Batch& batch, int64_t batch_idx);

}  // namespace lightning
