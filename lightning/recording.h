// Whether the thread records a step, to be replayed by the device alone. Asked wherever a step may
// do something on the host that a replay would leave out.
#pragma once

#include <stdexcept>

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
  RecordingScope();
  ~RecordingScope();
  RecordingScope(const RecordingScope&) = delete;
  RecordingScope& operator=(const RecordingScope&) = delete;
};

// Errors: CannotRecord with `reason`, while the thread records.
void refuse_in_recording(const char* reason);

}  // namespace lightning
