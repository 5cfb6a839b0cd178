// The parts of which the fused cross-entropy is made, without autograd: losses of rows of logits,
// their gradient, their sum. By the kernels of lightning/cuda where they run, else by ATen, in
// float32 for 16-bit logits and in the logits' own dtype for others.
#pragma once

#include <ATen/core/Tensor.h>

namespace lightning::nn {

enum class Reduction { kNone, kMean, kSum };

// Of which class each row is.
struct RowTargets {
  at::Tensor classes;  // int64 [N], contiguous, on the logits' device
  int64_t ignore_index = -100;
  double label_smoothing = 0.0;
};

// The dtype of losses of such logits.
at::ScalarType loss_dtype(at::ScalarType logits);

struct RowLosses {
  at::Tensor losses;      // [N], 0 for an ignored row
  at::Tensor statistics;  // what cross_entropy_gradient() needs of the softmax
};

// Of logits [N, V] with any strides.
// Errors: c10::IndexError on the CPU, a device-side assertion on a GPU, for a class outside [0, V)
// that is not ignore_index.
RowLosses cross_entropy_rows(const at::Tensor& logits, const RowTargets& targets);

// As above, and the logits become their losses' gradient: softmax - target, each element rounded
// once to the logits' dtype, zeros for ignored rows. Nothing is scaled yet, so that nothing of it
// is too small for float16.
//
//   logits   [N, V], rows contiguous; of the caller alone
at::Tensor cross_entropy_rows_in_place(const at::Tensor& logits, const RowTargets& targets);

// The same by the kernel, with the losses into `losses`, if an int32 on the device is not 0;
// nothing happens if it is.
void cross_entropy_rows_in_place_if(const at::Tensor& condition, const at::Tensor& logits,
                                    const RowTargets& targets, const at::Tensor& losses);

struct RowGradient {
  at::Tensor upstream;  // of the loss: a scalar, or [N] for losses that were not reduced
  at::Tensor factor;    // one more, a scalar; undefined for 1
};

// Writes the logits' gradient, computed anew from the logits, to `into` [N, V] of the logits'
// dtype, rows contiguous, which may be the logits themselves.
void cross_entropy_gradient(const at::Tensor& logits, const RowLosses& forward,
                            const RowTargets& targets, const RowGradient& gradient,
                            const at::Tensor& into);

struct ReducedLoss {
  at::Tensor loss;    // a scalar
  at::Tensor factor;  // d loss / d losses, a scalar, on the device; 0 where every row is ignored
};

// Sum or mean of the losses; a mean is over the rows that are not ignored, NaN where there is none.
ReducedLoss reduced(const at::Tensor& losses, const RowTargets& targets, Reduction reduction);

}  // namespace lightning::nn
