// A module's parameters and buffers as a state tree and back, under Python's names and in Python's
// order. Source: torch 2.11, `Module.state_dict` and `Module.load_state_dict`.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "lightning/checkpoint/state.h"
#include "lightning/fwd.h"

namespace lightning {

// An ordered dict from "net.0.weight" to a tensor: of each module its own parameters, then its
// buffers, then its children. The tensors are detached and share the module's storage, so a later
// step shows in them. A tied parameter is there under each of its names.
State module_state_dict(const torch::nn::Module& module);

// What a load that is not strict passed over.
struct IncompatibleKeys {
  std::vector<std::string> missing;     // the module has them, the state does not
  std::vector<std::string> unexpected;  // the state has them, the module does not
};

// Copies the state into the module's tensors; values are converted to their dtype and device.
//
//   strict   false: keys that only one side has are passed over, and given back
//   copy     does the copying, if given; where a tensor of the state has holes, it has to bear them
//
// Errors: CheckpointError, before anything is changed, that lists all missing and unexpected keys
// (when strict) and all tensors of another shape, with both shapes and dtypes.
using CopyTensor = std::function<void(const at::Tensor& to, const TensorState& from)>;
IncompatibleKeys load_module_state_dict(torch::nn::Module& module, const State& state, bool strict,
                                        const CopyTensor& copy = nullptr);

}  // namespace lightning
