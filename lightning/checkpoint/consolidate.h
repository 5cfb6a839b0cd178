// A sharded checkpoint as one file.
#pragma once

#include <string>

namespace lightning {

struct ConsolidateOptions {
  bool overwrite = false;  // replaces a file that is there
  // With the keys of a Trainer checkpoint, "state_dict" and "optimizer_states", and the parameters
  // of optimizers by number, as a run of one process saves it. Otherwise with those of the folder.
  bool as_trainer = false;
};

// Writes what a folder of torch.distributed.checkpoint holds, and meta.pt beside it where Lightning
// wrote one, into a file that torch.load(weights_only=True) reads. Tensors go from the ranks' files
// to the new one a few MB at a time: neither a tensor nor the tree is in memory as a whole. Every
// CRC is compared. The file is complete or not there.
//
// Errors: CheckpointError for what is no such folder or is broken, for a file that is there, and
// those of the disk.
// Source: Lightning 2.6, `fabric consolidate`.
void consolidate_checkpoint(const std::string& folder, const std::string& file,
                            const ConsolidateOptions& options = {});

// Where the file goes by default: FOLDER.consolidated beside the folder.
std::string consolidated_name(const std::string& folder);

}  // namespace lightning
