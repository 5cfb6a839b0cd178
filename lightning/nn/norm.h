// Layer and root-mean-square normalisation as functions, alone or after the sum of a residual
// stream; what the layers of layer_norm.h, add_layer_norm.h and rms_norm.h call.
//
// Under autocast the result has autocast's dtype, where LibTorch's would be float32 and the next
// product would cast it; statistics are float32 and parameters keep their dtype. Without autocast
// values and dtypes are those of at::layer_norm and at::rms_norm. A float64 input stays float64.
//
// On a GPU from Ampere on, widths up to 16384 run as one kernel forward and one backward (with a
// small one that adds up column sums); others, and the CPU, as plain operators. The kernels use no
// atomics: every run gives the same bits.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>
#include <vector>

namespace lightning::nn {

struct Norm {
  std::vector<int64_t> shape;  // the last dims of the input
  at::Tensor weight;           // of that shape, or undefined for ones
  at::Tensor bias;             // of that shape, or undefined for zeros
  // Undefined for root mean square only: the epsilon of the dtype it computes in, float32's for
  // 16-bit inputs, as torch.nn.RMSNorm.
  std::optional<double> eps = 1e-5;
  bool centred = true;  // false: root mean square, which knows no bias
};

// Errors: c10::Error for an input whose last dims are not `shape`, and where the kernels ran for a
// second derivative.
at::Tensor normalize(const at::Tensor& input, const Norm& norm);

// residual + delta, in the residual's dtype, and that sum normalized.
std::tuple<at::Tensor, at::Tensor> add_and_normalize(const at::Tensor& residual,
                                                     const at::Tensor& delta, const Norm& norm);

}  // namespace lightning::nn
