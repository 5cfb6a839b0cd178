// Whether the thread records a step, to be replayed by the device alone. Asked wherever a step may
// do something on the host that a replay would leave out.
#pragma once

#include <stdexcept>
#include <vector>

#include "lightning/fwd.h"

namespace lightning {

// A step that cannot be recorded, with the reason: "training_step asks for global_step()". Whoever
// records runs the step as it is written instead.
class CannotRecord : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

bool recording();

// The thread records while one lives.
class RecordingScope {
 public:
  //   kept   gets what hold_for_recording() is told; to be held as long as the recording is
  //   replayed.
  //          The innermost scope's counts.
  explicit RecordingScope(std::vector<at::Tensor>& kept);
  ~RecordingScope();
  RecordingScope(const RecordingScope&) = delete;
  RecordingScope& operator=(const RecordingScope&) = delete;

 private:
  std::vector<at::Tensor>* before_;
};

// While the thread records: a tensor that replays read by its address, and that is neither an
// input, a parameter or a buffer nor made in the step. No effect otherwise.
void hold_for_recording(const at::Tensor& tensor);

// Errors: CannotRecord with `reason`, while the thread records.
void refuse_in_recording(const char* reason);

}  // namespace lightning
