// A run as a checkpoint and back: which state goes under which key, in the original's order.
// Source: Lightning 2.6, `_CheckpointConnector`; the reference's section 5.
#pragma once

#include "lightning/checkpoint/state.h"
#include "lightning/loops/fit_loop.h"
#include "lightning/loops/run.h"

namespace lightning {

// Progress of the loops outside fit.
struct EvaluationProgress {
  BatchProgress validate, test, predict;
};

// Everything a resumed run needs; with `weights_only` no callbacks, optimizers and schedules.
State dump_checkpoint(Run& run, FitLoop* fit_loop, const EvaluationProgress& evaluation,
                      bool weights_only);

// The module's weights, the data module and the callbacks, with their hooks.
// Errors: CheckpointError for weights that do not fit, before any is changed.
void restore_modules_and_callbacks(Run& run, State& checkpoint);

// Precision, loops, optimizers and schedules.
// Errors: CheckpointError for a checkpoint that holds weights only, or another number of
// optimizers; MisconfigurationError when it is past max_epochs.
void restore_training_state(Run& run, FitLoop& fit_loop, const State& checkpoint);

}  // namespace lightning
