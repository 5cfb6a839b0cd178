#include "lightning/recording.h"

namespace lightning {
namespace {

thread_local int depth = 0;

}  // namespace

bool recording() { return depth > 0; }

RecordingScope::RecordingScope() { ++depth; }
RecordingScope::~RecordingScope() { --depth; }

void refuse_in_recording(const char* reason) {
  if (recording()) throw CannotRecord(reason);
}

}  // namespace lightning
