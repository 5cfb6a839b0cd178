// A checkpoint in whatever format it lies on the disk.
#pragma once

#include <string>
#include <vector>

#include "lightning/checkpoint/state.h"

namespace lightning {

enum class CheckpointFormat {
  kTorch,        // a file of torch.save: a Trainer checkpoint, or a state dict alone
  kSafetensors,  // weights alone
  kSharded,      // a folder of torch.distributed.checkpoint, with meta.pt where Lightning wrote it
};
const char* to_string(CheckpointFormat format);

// Told by content, not by name.
// Errors: CheckpointError when there is nothing, or nothing known; the text says what the file
// seems to be (a pickle of torch before 1.6, a folder whose save was not finished, a zip of
// something else).
CheckpointFormat detect_format(const std::string& path);

// The tree as it is in the file: read_torch_file(), the tensors of a safetensors file by name, the
// tree of a folder with the values of meta.pt beside it.
//   verify   compares every CRC, where the format has them
State read_checkpoint_file(const std::string& path, bool verify = true);

// What a sharded folder has beside the files of its ranks.
inline constexpr const char* kFolderValues = "meta.pt";

// Puts the values of a sharded folder's meta.pt, where there is one, beside what its ranks wrote.
// Errors: as read_torch_file(); CheckpointError where they are no dict.
void add_folder_values(State& state, const std::string& folder, bool verify = true);

// The tree as a Trainer checkpoint: weights alone come under "state_dict"; the "model" and
// "optimizer_0" of a sharded folder under "state_dict" and "optimizer_states".
State as_trainer_checkpoint(State state, CheckpointFormat format);

// Removes a file or a folder; one that is not there is fine. Of a sharded folder `.metadata` goes
// first, so that what is left of it after a crash is not taken for a checkpoint.
void remove_checkpoint_file(const std::string& path);

}  // namespace lightning
