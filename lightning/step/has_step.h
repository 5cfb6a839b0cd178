// Which of the steps of a run a module has: overridden in either form, with a dataloader_idx or
// without.
#pragma once

#include "lightning/callback.h"

namespace lightning {

bool has_step(const LightningModule& module, Stage stage);

}  // namespace lightning
