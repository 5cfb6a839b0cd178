// The cross-entropy that reads its logits once for the loss and once for the gradient.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/nn/options/loss.h>

#include <optional>

#include "lightning/nn/cross_entropy_rows.h"

namespace lightning::nn {

// torch::nn::functional::cross_entropy, with its options and its meaning of them.
//
//   logits  [N, V], [V], or [N, V, d1, ...]
//   target  classes as integers, of the logits' sizes without V; or probabilities of the classes,
//           of the logits' sizes and floating
//   gives   a scalar, or losses of the target's sizes for torch::kNone; float32 for 16-bit logits
//           (float32 arithmetic from the logits on, where at::cross_entropy_loss under autocast
//           rounds log-probabilities to 16 bits), else in the logits' dtype
//
// The logits are not cast under autocast and never changed while anybody can see them. Only they
// and two numbers a row are kept for backward, which computes their gradient anew, times the loss's
// own, in float32: so nothing underflows under a gradient scaler, any reduction has the same price,
// and where by then nobody else holds the logits' storage and the graph is not retained, the
// gradient is written over them. nn::LMHead's loss() goes further, and should be preferred where
// the logits come from a linear layer and are wanted for nothing else.
//
// With `weight`, or probabilities as the target, it is at::cross_entropy_loss in that same dtype.
// The mean where every target is ignored is NaN, with a gradient of zeros.
//
// Errors: c10::Error for sizes and dtypes that do not fit; for a target that is neither a class nor
// ignore_index, on a GPU a device-side assertion, as ATen's; for a backward with create_graph,
// unless it is at::cross_entropy_loss.
at::Tensor fused_cross_entropy(const at::Tensor& logits, const at::Tensor& target,
                               const torch::nn::CrossEntropyLossOptions& options = {});

// For layers that compute this loss: checks them and gives the options' parts.
Reduction reduction_of(const torch::nn::CrossEntropyLossOptions& options);
//   device  where the logits are; the target has a class for each row of them
RowTargets row_targets(const at::Tensor& target, c10::Device device,
                       const torch::nn::CrossEntropyLossOptions& options);
// Whether classes of rows are not all that there is: a weight, or probabilities of the classes.
bool needs_plain(const at::Tensor& target, const torch::nn::CrossEntropyLossOptions& options);

}  // namespace lightning::nn
