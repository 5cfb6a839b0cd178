// Token and position embeddings in one pass, and the gradient of the tokens'.
#pragma once

#include "lightning/cuda/kernel.h"

namespace lightning::cuda {

struct Embed {
  Dtype dtype = Dtype::kFloat;
  const int64_t* tokens = nullptr;      // [rows]; row r has the position r % time
  const void* token_rows = nullptr;     // [vocabulary, width], contiguous
  const void* position_rows = nullptr;  // [at least time, width], contiguous
  void* out = nullptr;                  // [rows, width]
  int64_t rows = 0;
  int64_t time = 0;
  int64_t width = 0;
  int64_t vocabulary = 0;
};

// A token outside the vocabulary stops the device with a message, as at::embedding's does.
void embed(const Embed& arguments, Stream stream);

struct EmbedGradient {
  Dtype dtype = Dtype::kFloat;
  const int64_t* tokens = nullptr;  // [rows], sorted
  const int64_t* places = nullptr;  // [rows]: where in `gradient` the row of each lies
  const void* gradient = nullptr;   // [rows, width]
  void* out = nullptr;              // [vocabulary, width]: written where there is a token
  float* workspace = nullptr;       // embed_gradient_workspace() floats
  int64_t rows = 0;
  int64_t width = 0;
};

int64_t embed_gradient_workspace(const EmbedGradient& arguments);

// Sums the rows of each token in float32, in the order of `places`, the same bits each time.
void embed_gradient(const EmbedGradient& arguments, Stream stream);

}  // namespace lightning::cuda
