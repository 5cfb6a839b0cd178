// silu(gate) * up over [rows, columns], forward and backward; backward also sums the columns of
// both gradients, for the biases before.
//
// All matrices are contiguous and of one dtype; arithmetic is in float32.
#pragma once

#include "lightning/cuda/kernel.h"

namespace lightning::cuda {

void swiglu(Dtype dtype, const void* gate, const void* up, void* out, int64_t count, Stream stream);

struct SwigluBackward {
  Dtype dtype = Dtype::kFloat;
  int64_t rows = 0;
  int64_t columns = 0;
  const void* gate = nullptr;
  const void* up = nullptr;
  const void* gradient = nullptr;  // of silu(gate) * up
  void* gate_gradient = nullptr;   // may be `gradient` itself
  void* up_gradient = nullptr;
  void* after = nullptr;       // silu(gate) * up again, where not null
  float* gate_sums = nullptr;  // [columns], where not null; both or none
  float* up_sums = nullptr;
  float* workspace = nullptr;  // swiglu_workspace() floats, where sums are asked
};

int64_t swiglu_workspace(const SwigluBackward& arguments);
void swiglu_backward(const SwigluBackward& arguments, Stream stream);

}  // namespace lightning::cuda
