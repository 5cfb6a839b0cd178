// Records every hook call of a run, as hooks.py does under Python Lightning: one line for each
// call,
//
//   module.training_step(batch 3, 1) | epoch 0 step 3 train | train grad
//
// with who was called, the arguments that matter (a batch by its number in the data), then
// current_epoch, global_step and stage of the trainer, then the module's mode and whether gradients
// are recorded.
#pragma once

#include <string>
#include <vector>

#include "lightning/options.h"

namespace lightning::testing {

// The lines of one configuration of hooks.json.
//   folder   where checkpoints and logs go, "$DIR" in the configuration
std::vector<std::string> record_hooks(const Json& configuration, const std::string& folder);

}  // namespace lightning::testing
