// The sums of a matrix's columns: the gradient of a bias.
#pragma once

#include <ATen/core/Tensor.h>

namespace lightning::cuda {

// [columns] from [..., columns] with any strides, in float32, float64 for float64; the same bits
// each time. By the kernel where one runs, else by at::sum. Without a gradient.
at::Tensor column_sum(const at::Tensor& matrix);

// Leaves the sums with the tensor, for whoever made it and had them in hand: the next column_sum()
// of this very tensor, not of a view, takes them, unless it was written in between.
void leave_column_sum(const at::Tensor& matrix, const at::Tensor& sums);

}  // namespace lightning::cuda
