// How a checkpoint reaches the disk and comes back. Strategies call it; a plugin may replace it.
// Source: Lightning 2.6, `CheckpointIO`.
#pragma once

#include <memory>
#include <string>

#include "lightning/checkpoint/state.h"

namespace lightning {

class CheckpointIO {
 public:
  static constexpr const char* kPartKind = "checkpoint_io";

  virtual ~CheckpointIO() = default;

  // Writes the whole tree to `path`, making folders as needed. The file is complete or not there:
  // it is written beside its place and renamed.
  // Errors: CheckpointError with the path and the system's reason.
  virtual void save(const State& checkpoint, const std::string& path) = 0;

  // Errors: CheckpointError when the file is missing, torn or of another format.
  virtual State load(const std::string& path) = 0;

  // Deletes a file or a folder; one that is not there is fine.
  virtual void remove(const std::string& path) = 0;

  // Makes `place` lead to `target`, in the place of what is there: a relative link, or a copy where
  // the file system has no links. Comes after the saves before it.
  virtual void link(const std::string& target, const std::string& place);

  // Called at every batch. Errors: what went wrong since the last call, where saving goes on in the
  // background.
  virtual void check() {}

  // Waits for what is still being written. Errors: as check().
  virtual void teardown() {}
};

// Checkpoints as Python Lightning writes them, a file of torch.save each. Reads these, safetensors
// and sharded folders.
std::shared_ptr<CheckpointIO> default_checkpoint_io();

}  // namespace lightning
