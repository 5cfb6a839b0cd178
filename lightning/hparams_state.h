// Hyper-parameters between configuration (Json) and the tree of a checkpoint, both ways.
#pragma once

#include "lightning/checkpoint/state.h"
#include "lightning/options.h"

namespace lightning {

// What Python stores of a configuration: dicts, lists and plain values. Infinity and nan, which
// travel through configuration as ".inf", "-.inf" and ".nan", are stored as the floats they stand
// for.
State state_from_hparams(const Json& hparams);

// The plain value behind a node of the tree, whatever Python class it was saved as:
//
//   pathlib.Path, torch.device, torch.dtype, a class    its text: "data/train", "cuda:0"
//   numpy scalars, 0-dim tensors, enums of one value    the number or the text
//   Namespace, AttributeDict, OmegaConf, dataclasses    a map of what is in them
//   tuples, sets, tensors up to 1,000 elements          lists
//
// What has no such form (a function's closure, a large tensor) becomes the text that Python's
// repr() would begin with. Nothing is ever run. Values nested deeper than 100 become text too.
Json hparams_from_state(const State& state);

}  // namespace lightning
