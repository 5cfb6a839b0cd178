// Checkpoints of older versions of Python Lightning, brought to the keys of today's.
#pragma once

#include <string>

#include "lightning/checkpoint/state.h"

namespace lightning {

// Renames, fills and drops what changed between the version that wrote the checkpoint and
// kPythonLightningVersion, as the original does when it loads: callbacks saved under other keys,
// loops that were nested otherwise, counters that stood beside the loops (before 1.6), Apex's
// state. The version that wrote it is kept under "legacy_pytorch-lightning_version". Callbacks that
// were saved under their Python class come under the name of the class.
//
// Says so on one line where it changed something, and warns for a version newer than ours and for
// keys that resuming needs and the file does not have. A tree that is no Trainer checkpoint (it has
// neither a version nor counters) is left alone.
//
//   name   of the file, for these lines
// Source: Lightning 2.6, `pytorch.utilities.migration`.
void migrate_checkpoint(State& checkpoint, const std::string& name);

}  // namespace lightning
