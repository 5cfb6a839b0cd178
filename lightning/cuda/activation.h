// GELU and ReLU over [rows, columns], forward and backward; backward also sums the columns of its
// result, the gradient of the bias before the activation.
//
// All matrices are contiguous and of one dtype; arithmetic is in float32.
#pragma once

#include "lightning/cuda/kernel.h"

namespace lightning::cuda {

enum class Activation { kGelu, kGeluTanh, kRelu };

// out = activation(in), of `count` elements; in place where out is in.
void activation(Activation activation, Dtype dtype, const void* in, void* out, int64_t count,
                Stream stream);

struct ActivationBackward {
  Activation activation = Activation::kGelu;
  Dtype dtype = Dtype::kFloat;
  int64_t rows = 0;
  int64_t columns = 0;
  const void* before = nullptr;    // what the activation was applied to
  const void* gradient = nullptr;  // of the activation's result
  void* result = nullptr;          // gradient * activation'(before); may be `gradient` itself
  void* after = nullptr;           // activation(before) again, where not null
  float* sums = nullptr;           // [columns] of the result, where not null
  float* workspace = nullptr;      // activation_workspace() floats, where sums are asked
};

int64_t activation_workspace(const ActivationBackward& arguments);
void activation_backward(const ActivationBackward& arguments, Stream stream);

}  // namespace lightning::cuda
