// A bias added to the rows of a matrix of 16 bits, in place.
#pragma once

#include "lightning/cuda/kernel.h"

namespace lightning::cuda {

struct BiasAdd {
  Dtype dtype = Dtype::kBFloat16;
  Dtype bias_dtype = Dtype::kFloat;  // or that of the matrix
  void* matrix = nullptr;            // [rows, columns] without gaps
  const void* bias = nullptr;        // [columns]
  int64_t rows = 0;
  int64_t columns = 0;
};

// The sum is taken in float32 and rounded once. Any size and alignment.
void bias_add(const BiasAdd& arguments, Stream stream);

}  // namespace lightning::cuda
