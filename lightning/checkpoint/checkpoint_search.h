// Which of the checkpoints that lie in a folder a run goes on from.
#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <optional>
#include <set>
#include <string>

#include "lightning/checkpoint/checkpoint_io.h"

namespace lightning {

struct FoundCheckpoint {
  std::string path;
  std::filesystem::file_time_type time;
  std::optional<int64_t> step;  // global_step, where it is known
  bool resumable = true;        // more than weights
};

// Whether files of this CheckpointIO can be looked into: those of a user's own cannot.
bool can_look_into(CheckpointIO& io);

// Opens a checkpoint without reading its tensors.
// Errors: CheckpointError with what is wrong with it.
FoundCheckpoint look_into(const std::string& path);

// The newest by the time it was written. With `look`, of those that can be opened; the others, and
// links to nothing, are told of in a warning. A path where there is nothing at all is left out.
//   resumable   with `look`, weights alone do not count
//   after       only what was written after that; null for any
std::optional<FoundCheckpoint> newest_checkpoint(const std::set<std::string>& paths, bool look,
                                                 bool resumable = false,
                                                 const FoundCheckpoint* after = nullptr);

// The files hpc_ckpt_N.ckpt of a folder by N, which jobs of batch systems save.
std::map<int64_t, std::string> hpc_checkpoints(const std::string& folder);
// That of the highest N; with `look`, of those that can be opened. Empty where there is none.
std::string newest_hpc_checkpoint(const std::string& folder, bool look);
std::string next_hpc_checkpoint(const std::string& folder);

}  // namespace lightning
