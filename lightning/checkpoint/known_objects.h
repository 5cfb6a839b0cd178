// Which of Python's objects may be written into a checkpoint.
#pragma once

#include "lightning/checkpoint/state.h"

namespace lightning {

// Whether torch.load(weights_only=True) takes the object, or it is a plain value of numpy's. False
// for what would run code of other programs: their functions, and classes of their own.
bool torch_load_takes(const State::Object& object);

}  // namespace lightning
