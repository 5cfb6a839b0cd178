#include "lightning/recording.h"

#include <ATen/core/Tensor.h>

namespace lightning {
namespace {

thread_local std::vector<at::Tensor>* kept_now = nullptr;  // null while nothing is recorded

}  // namespace

bool recording() { return kept_now != nullptr; }

RecordingScope::RecordingScope(std::vector<at::Tensor>& kept) : before_(kept_now) {
  kept_now = &kept;
}
RecordingScope::~RecordingScope() { kept_now = before_; }

void hold_for_recording(const at::Tensor& tensor) {
  if (kept_now != nullptr) kept_now->push_back(tensor);
}

void refuse_in_recording(const char* reason) {
  if (recording()) throw CannotRecord(reason);
}

}  // namespace lightning
