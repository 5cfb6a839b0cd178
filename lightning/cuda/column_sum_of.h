// The sums of a matrix's columns: the gradient of a bias.
#pragma once

#include <ATen/core/Tensor.h>

namespace lightning::cuda {

// [columns] from [rows, columns] with any strides, in float32, float64 for float64; the same bits
// each time. By the kernel where one runs, else by at::sum. Without a gradient.
at::Tensor column_sum(const at::Tensor& matrix);

}  // namespace lightning::cuda
