// The sums of a matrix's columns, in float32: the gradient of a bias.
//
// Two passes: blocks over slices of rows leave partial sums in the workspace, a small second kernel
// adds them. No atomics, and slices by size alone: the same bits each time and on every GPU.
#pragma once

#include "lightning/cuda/kernel.h"

namespace lightning::cuda {

struct ColumnSum {
  const void* matrix = nullptr;  // [rows, columns]; 16-byte loads where rows lie aligned
  Dtype dtype = Dtype::kFloat;
  int64_t rows = 0;
  int64_t columns = 0;
  int64_t row_stride = 0;   // in elements
  float* sums = nullptr;    // [columns]
  bool accumulate = false;  // adds to sums instead of writing them
  float* workspace = nullptr;
};

// How many floats the workspace holds at least, by dtype, rows and columns; 0 for a few rows.
int64_t column_sum_workspace(const ColumnSum& arguments);

// No rows give zeros.
void column_sum(const ColumnSum& arguments, Stream stream);

}  // namespace lightning::cuda
