// The gradients of queries, keys and values as one matrix, as the product that made them needs it;
// turned back where a rotary embedding turned them, and summed for the product's bias: one read and
// one write in all. Gradients that lie in the matrix already stay there: only what is turned is
// written, and nothing is launched where nothing is asked.
#pragma once

#include "lightning/cuda/kernel.h"

namespace lightning::cuda {

struct PackHeads {
  Dtype dtype = Dtype::kFloat;
  int64_t rows = 0;  // batch * time: row r has the position r % time
  int64_t time = 0;
  int64_t heads = 0;
  int64_t kv_heads = 0;
  int64_t head_size = 0;         // even
  const void* q = nullptr;       // [rows, heads, head_size], contiguous
  const void* k = nullptr;       // [rows, kv_heads, head_size], contiguous
  const void* v = nullptr;       // likewise; all three null where `packed` holds them
  void* packed = nullptr;        // [rows, (heads + 2 * kv_heads) * head_size]
  const float* table = nullptr;  // as Rotary's; null where nothing was turned
  float* sums = nullptr;         // [width], where not null
  float* workspace = nullptr;    // pack_workspace() floats, where sums are asked
};

int64_t pack_workspace(const PackHeads& arguments);
void pack_heads(const PackHeads& arguments, Stream stream);

}  // namespace lightning::cuda
