// How a training step is run: one callable over the tensors of a batch. `eager` calls it; others
// may record it once and replay it.
#pragma once

#include <functional>

#include "lightning/batch.h"

namespace lightning {

class StepExecutor {
 public:
  static constexpr const char* kPartKind = "step executor";

  virtual ~StepExecutor() = default;

  // Runs `step` on the batch: forward, zero-grad, backward, clipping and, if `stepping`, the
  // optimizer. Steps that differ in `stepping` are different steps.
  virtual void run(const Batch& batch, bool stepping,
                   const std::function<void(const Batch&)>& step) = 0;

  // Forgets what was recorded: the model, its optimizers or its mode changed.
  virtual void reset() {}
};

}  // namespace lightning
