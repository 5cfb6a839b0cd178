// The exponentials of a product, in the product's own epilogue: what a softmax over a language
// model's classes needs, without writing the logits and reading them again. For a row x with the
// target t,
//
//   shift = x . w_t                              target_shifts(), of exp_rows.h
//   out_v = exp(x . w_v - shift), sums over v    exp_product()
//   loss = log(sum)                              finish_exp_rows()
//
// and the gradient of the logits is out / sum, but (1 - sum) / sum at the target.
//
// The exponents are float32: nothing is rounded before the exponential. A row whose sum is beyond
// kMostSum might leave the range of its floats; finish_exp_rows() says so on the device, and what
// makes up for it runs `only_if` so, without anybody waiting for the device.
#pragma once

#include "lightning/cuda/kernel.h"

#ifndef LIGHTNING_CUTLASS
#define LIGHTNING_CUTLASS 0
#endif

namespace lightning::cuda {

// Whether this build has exp_product(), which NVIDIA's CUTLASS makes. It runs on Hopper alone.
inline constexpr bool kExpProductBuilt = LIGHTNING_CUTLASS != 0;

// Of the kernel's tiles: rows whose sums are stored together, and columns of one part of a sum.
inline constexpr int64_t kExpTileRows = 128;
inline constexpr int64_t kExpTileColumns = 192;

// All matrices in bfloat16, contiguous, at multiples of 16 bytes; columns and depth multiples of 8.
struct ExpProduct {
  int64_t rows = 0;
  int64_t columns = 0;
  int64_t depth = 0;
  const void* a = nullptr;        // [rows, depth]
  const void* b = nullptr;        // [columns, depth]
  void* out = nullptr;            // [rows, columns]
  const float* shifts = nullptr;  // [rows]
  float* sums = nullptr;          // [exp_parts(columns), exp_padded_rows(rows)]
  bool exponential = true;        // false: out is the product itself, the sums mean nothing
  const int* only_if = nullptr;   // where not null: nothing happens while it points to 0
};

constexpr int64_t exp_padded_rows(int64_t rows) {
  return (rows + kExpTileRows - 1) / kExpTileRows * kExpTileRows;
}
constexpr int64_t exp_parts(int64_t columns) {
  return (columns + kExpTileColumns - 1) / kExpTileColumns;
}

void exp_product(const ExpProduct& arguments, Stream stream);

}  // namespace lightning::cuda
