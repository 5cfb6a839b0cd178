// Losses of a product of rows with a weight, and the gradient of its logits, by exponentials that
// the product's own kernel makes (lightning/cuda/exp_product.h).
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "lightning/nn/cross_entropy_rows.h"

namespace lightning::nn {

struct ExpLosses {
  at::Tensor losses;    // [N] float32, 0 for an ignored row
  at::Tensor gradient;  // [N, V]: softmax - target, each row but for its scale
  at::Tensor scales;    // [N] float32, 0 for an ignored row
};

// Nothing where there is no such kernel: on other GPUs than Hopper, for other dtypes than bfloat16,
// for sizes that are no multiples of 8, with label smoothing, and in a region that is recorded.
// Where a target is too unlikely for it (exp_rows.h), the same call makes the logits after all.
//
//   hidden  [N, C]
//   weight  [V, C]
std::optional<ExpLosses> exp_losses(const at::Tensor& hidden, const at::Tensor& weight,
                                    const RowTargets& targets);

// Each row of a matrix [N, C] times its scale [N] float32, rounded once, into `out`, which may be
// the matrix.
void scale_rows_out(at::Tensor& out, const at::Tensor& matrix, const at::Tensor& scales);

}  // namespace lightning::nn
