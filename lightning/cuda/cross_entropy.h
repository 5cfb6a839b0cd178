// Cross-entropy of rows of logits: softmax, loss and gradient, in float32 arithmetic.
//
// A row is read from memory once: its 16-byte parts stay in shared memory, as far as half a
// multiprocessor's reaches (57 600 classes in 16 bits on an H100), and what is beyond is read
// again. Rows may start at any address and have any stride. The same bits each time.
#pragma once

#include "lightning/cuda/kernel.h"

namespace lightning::cuda {

// More classes than this the kernels do not take.
inline constexpr int64_t kMostClasses = int64_t{1} << 30;

// Two floats a row: its largest logit, and 1 / sum(exp(logit - largest)).
inline constexpr int64_t kRowStatistics = 2;

struct CrossEntropyRows {
  const void* logits = nullptr;  // [rows, classes]
  Dtype dtype = Dtype::kFloat;   // of logits and gradient
  int64_t rows = 0;
  int64_t classes = 0;
  int64_t row_stride = 0;            // of the logits, in elements
  const int64_t* targets = nullptr;  // [rows]
  int64_t ignore_index = 0;
  float label_smoothing = 0;
};

struct CrossEntropyForward {
  CrossEntropyRows rows;
  float* losses = nullptr;      // [rows]; 0 for an ignored one
  float* statistics = nullptr;  // [rows, kRowStatistics], unset for ignored rows; null: not wanted
  // The losses' gradient, softmax - target, with the logits' row stride; may be the logits
  // themselves. Null: not wanted.
  void* gradient = nullptr;
  const int* only_if = nullptr;  // where not null: nothing happens while it points to 0
};

// A target outside [0, classes) that is not ignore_index ends in a device-side assertion.
void cross_entropy_forward(const CrossEntropyForward& arguments, Stream stream);

struct CrossEntropyBackward {
  CrossEntropyRows rows;
  const float* statistics = nullptr;  // from the forward pass
  const float* upstream = nullptr;    // the losses' gradients: [rows], or one for all
  int64_t upstream_stride = 0;        // 1 or 0
  const float* factor = nullptr;      // one more, for all rows; null for 1
  void* gradient = nullptr;           // [rows, classes]; may be the logits themselves
  int64_t gradient_stride = 0;
};

// Ignored rows get zeros, whatever the factors are.
void cross_entropy_backward(const CrossEntropyBackward& arguments, Stream stream);

struct CrossEntropySum {
  const float* losses = nullptr;     // [rows]
  const int64_t* targets = nullptr;  // [rows]
  int64_t rows = 0;
  int64_t ignore_index = 0;
  bool mean = false;        // over the rows that are not ignored; NaN where there is none
  float* loss = nullptr;    // one
  float* factor = nullptr;  // d loss / d losses: 1, or 1 / count, 0 for a count of 0
};

void cross_entropy_sum(const CrossEntropySum& arguments, Stream stream);

}  // namespace lightning::cuda
