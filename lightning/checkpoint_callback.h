// What the trainer asks of callbacks that save checkpoints, to find the files "best" and "last".
// Source: Lightning 2.6, `Checkpoint`, `_CheckpointConnector._parse_ckpt_path`.
#pragma once

#include <set>
#include <string>

#include "lightning/callback.h"

namespace lightning {

class Checkpoint : public Callback {
 public:
  CallbackRole role() const override { return CallbackRole::kCheckpoint; }

  // The file for ckpt_path="best"; empty where there is none.
  virtual std::string best_model_path() const { return ""; }
  // Files among which ckpt_path="last" takes the newest. Those that are not there are left out.
  virtual std::set<std::string> last_checkpoints(Trainer&) const { return {}; }
  // Files that were not saved for "last", of which it takes the newest nevertheless where that
  // stands at a later step: the run was ended before it could say which is the last.
  virtual std::set<std::string> other_checkpoints(Trainer&) const { return {}; }
  // True where a fit() that was given no ckpt_path shall resume from the newest of "last".
  virtual bool resumes_fit() const { return false; }
};

}  // namespace lightning
