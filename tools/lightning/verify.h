// `lightning checkpoint verify`.
#pragma once

#include <cstdint>
#include <string>

namespace lightning::tools {

// What verify_checkpoint() saw.
struct Verified {
  std::string format;
  uint64_t bytes = 0;  // on the disk
  uint64_t tensors = 0;
  uint64_t crcs = 0;  // values that were compared; 0: the file, or its format, has none
  std::string note;   // what a sound checkpoint cannot be used for; mostly empty
};

// Reads the whole checkpoint: its structure, the claims of every tensor against the bytes that are
// there, and every CRC. Of a sharded folder each chunk of each tensor, one at a time.
//
// A folder without meta.pt is sound where torch.distributed.checkpoint alone made it; the note says
// that. One with the optimizers of a Trainer is a Trainer checkpoint that lost a file.
//
// Errors: CheckpointError with what is wrong.
Verified verify_checkpoint(const std::string& path);

}  // namespace lightning::tools
