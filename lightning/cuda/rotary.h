// Rotary position embedding in place, over heads that lie packed in rows.
#pragma once

#include "lightning/cuda/kernel.h"

namespace lightning::cuda {

struct Rotary {
  Dtype dtype = Dtype::kFloat;
  void* packed = nullptr;  // [rows, width]; a row begins with the heads to turn
  int64_t rows = 0;        // batch * time: row r has the position r % time
  int64_t time = 0;
  int64_t width = 0;             // of a row
  int64_t heads = 0;             // to turn; what follows them in a row stays
  int64_t head_size = 0;         // even
  const float* table = nullptr;  // [time, head_size / 2, 2]: cosine and sine
};

// Elements i and i + head_size / 2 of a head become (a cos - b sin, b cos + a sin), in float32.
void rotate(const Rotary& arguments, Stream stream);

}  // namespace lightning::cuda
