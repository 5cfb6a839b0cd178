// Layer and root-mean-square normalisation of rows, with the sum that comes before it in a residual
// stream.
//
//   x = input + delta                          (or input alone)
//   output = (x - mean) * rstd * weight + bias     mean is 0 where not centred
//
// Statistics and sums are float32; x is rounded to the input's dtype first, as a separate sum would
// be. Rows are contiguous. The same bits each time on one kind of GPU: sums over rows go through
// partial sums in a fixed order.
#pragma once

#include "lightning/cuda/kernel.h"

namespace lightning::cuda {

struct NormTypes {
  Dtype input = Dtype::kFloat;   // also of x, its gradient and the input's gradient
  Dtype output = Dtype::kFloat;  // also of its gradient, of delta and delta's gradient
  Dtype weight = Dtype::kFloat;  // also of bias and of both gradients
};

// Whether there are kernels: widths from 1 to 16384; output of the input's dtype or of 16 bits;
// weights of float32, or all three of one dtype.
bool norm_takes(const NormTypes& types, int64_t width);

struct NormForward {
  NormTypes types;
  int64_t rows = 0;
  int64_t width = 0;
  bool centred = true;  // false: root mean square
  float eps = 0;
  const void* input = nullptr;
  const void* delta = nullptr;   // or null
  const void* weight = nullptr;  // [width], or null for ones
  const void* bias = nullptr;    // [width], or null for zeros
  void* sum = nullptr;           // x, where there is a delta
  void* output = nullptr;
  float* mean = nullptr;  // [rows]; null where not centred
  float* rstd = nullptr;  // [rows]
};

void norm_forward(const NormForward& arguments, Stream stream);

struct NormBackward {
  NormTypes types;
  int64_t rows = 0;
  int64_t width = 0;
  const void* x = nullptr;
  const void* weight = nullptr;  // [width], or null for ones
  const float* mean = nullptr;   // null where not centred
  const float* rstd = nullptr;
  const void* grad_output = nullptr;
  const void* grad_sum = nullptr;  // the gradient of x from elsewhere, or null
  void* grad_input = nullptr;
  void* grad_delta = nullptr;   // grad_input in the output's dtype, or null
  void* grad_weight = nullptr;  // [width], or null
  void* grad_bias = nullptr;    // [width], or null
  float* delta_sums = nullptr;  // [width], or null: the sums over rows of grad_delta, unrounded
  int blocks = 0;               // of norm_backward_blocks()
  float* workspace = nullptr;   // blocks * 3 * width, where there is one of the last three
};

// How many blocks keep column sums, on the current device. Called with all of the arguments but
// `blocks` and `workspace`, before each norm_backward().
int norm_backward_blocks(const NormBackward& arguments);

void norm_backward(const NormBackward& arguments, Stream stream);

}  // namespace lightning::cuda
