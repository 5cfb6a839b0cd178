// What stands around exp_product(): the shift of each row before it, the losses after it, and in
// backward the scales that its rows still lack.
#pragma once

#include "lightning/cuda/kernel.h"

namespace lightning::cuda {

// Of a row's sum of exponentials relative to its target's: a target less likely than e^-41.
inline constexpr float kMostSum = 1e18f;

struct TargetShifts {
  int64_t rows = 0;
  int64_t depth = 0;                 // a multiple of 8
  int64_t classes = 0;               // rows of b
  const void* a = nullptr;           // [rows, depth] bfloat16, as exp_product()'s
  const void* b = nullptr;           // [classes, depth], likewise
  const int64_t* targets = nullptr;  // [rows]
  int64_t ignore_index = 0;
  float* shifts = nullptr;  // [rows]; infinity for an ignored row, whose exponentials are then 0
};

// The products of rows with their targets', in float32. A target outside [0, classes) that is not
// ignore_index ends in a device-side assertion.
void target_shifts(const TargetShifts& arguments, Stream stream);

struct ExpRows {
  int64_t rows = 0;
  int64_t columns = 0;
  const float* sums = nullptr;       // [parts, stride], from exp_product()
  int64_t parts = 0;                 // of each row's sum
  int64_t stride = 0;                // of the parts
  const int64_t* targets = nullptr;  // [rows]
  int64_t ignore_index = 0;
  void* out = nullptr;      // [rows, columns] bfloat16, which gets 1 - sum at the targets
  float* losses = nullptr;  // [rows]; 0 for an ignored row
  float* scales = nullptr;  // [rows]: 1 / sum; 0 for an ignored row
  int* overflow = nullptr;  // one, 0 before; 1 where a sum is beyond kMostSum or not a number
};

void finish_exp_rows(const ExpRows& arguments, Stream stream);

// Rows times their scales.
struct ScaleRows {
  Dtype dtype = Dtype::kFloat;
  int64_t rows = 0;
  int64_t columns = 0;            // a multiple of 8
  const void* in = nullptr;       // [rows, columns], at a multiple of 16 bytes
  void* out = nullptr;            // likewise; may be the same
  const float* scales = nullptr;  // [rows]
};

void scale_rows(const ScaleRows& arguments, Stream stream);

}  // namespace lightning::cuda
