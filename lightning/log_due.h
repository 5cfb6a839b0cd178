// Whether callbacks that log rows of their own shall do so at this batch.
#pragma once

#include "lightning/trainer.h"

namespace lightning {

// In training, where the optimizer steps (or is about to) for the n-th time.
inline bool training_log_due(const Trainer& trainer) {
  const int64_t every = trainer.log_every_n_steps();
  return every > 0 && ((trainer.batches_that_stepped() + 1) % every == 0 || trainer.should_stop());
}

// In the other stages, which count batches.
//   batch   from 1, over all loaders
inline bool evaluation_log_due(const Trainer& trainer, int64_t batch) {
  const int64_t every = trainer.log_every_n_steps();
  return every > 0 && (batch % every == 0 || trainer.should_stop());
}

}  // namespace lightning
