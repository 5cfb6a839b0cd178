// Plain state trees as bytes, for messages between the ranks of a run.
#pragma once

#include <string>

#include "lightning/checkpoint/state.h"

namespace lightning {

// Tensors come back whole, on the host. Errors: CheckpointError for one in several chunks.
std::string to_bytes(const State& state);
// Errors: std::runtime_error for what to_bytes did not write.
State from_bytes(const std::string& bytes);

}  // namespace lightning
