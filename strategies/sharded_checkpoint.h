// A Trainer checkpoint as a folder that all ranks write together, laid out as Lightning's
// FSDPStrategy does it: "model" and "optimizer_0", "optimizer_1", ... in the files of
// torch.distributed.checkpoint, each rank's part in its own, and all else in meta.pt. States of
// optimizers go by the names of the parameters.
#pragma once

#include <string>

#include "lightning/checkpoint/state.h"
#include "lightning/distributed/collectives.h"

namespace lightning {

// Called by all ranks with their chunks. The folder is written beside its place and renamed when
// it is whole; what was there stays until then.
// Errors: CheckpointError of the disk.
void save_sharded_checkpoint(const State& checkpoint, const std::string& path, Collectives& ranks);

// As CheckpointIO::load() gives it, but tensors have the chunks of the folder, which lie in mapped
// files.
State load_sharded_checkpoint(const std::string& path);

}  // namespace lightning
