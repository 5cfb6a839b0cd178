// Whether a backward may write over what its forward saved.
#pragma once

#include <ATen/core/Tensor.h>

namespace lightning::nn {

// Whether tensors that are saved now go through hooks, which may keep them for others. For a
// forward, to hand to is_last_use().
bool has_saved_tensor_hooks();

// In a backward: whether the graph that runs is not retained and nothing but its node holds the
// storage of a tensor that it saved.
//
//   unpacked  as get_saved_variables() gave it, the only reference to it beside the node's
//   hooked    has_saved_tensor_hooks() when it was saved
bool is_last_use(const at::Tensor& unpacked, bool hooked);

}  // namespace lightning::nn
