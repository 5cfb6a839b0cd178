// The gradients of attention by cuDNN, written to where they are wanted: LibTorch's operator for
// them gives tensors of its own, which a packed gradient has to be copied from.
//
//   if (!cuda::attention_backward(problem)) {
//     auto [dq, dk, dv] = at::_scaled_dot_product_cudnn_attention_backward(...);
//   }
#pragma once

#include <ATen/core/Tensor.h>

namespace lightning::cuda {

// Of softmax(q k^T / sqrt(head_size)) v without dropout. All are [batch, heads, time, head_size] of
// one dtype, float16 or bfloat16; k, v and their gradients may have fewer heads, a divisor.
struct AttentionBackward {
  at::Tensor q, k, v;
  at::Tensor output;      // what forward gave, and of each of its rows
  at::Tensor logsumexp;   // [batch, heads, time], or with a 1 behind; float32
  at::Tensor gradient;    // of the output
  at::Tensor dq, dk, dv;  // filled; of the sizes of q, k and v, and over none of the others' memory
  bool causal = true;
};

// Launches it. False, and nothing written, for a build without cuDNN's headers, for heads that do
// not lie contiguously at addresses and strides of 16 bytes, and where cuDNN has no engine.
//
// A plan is made the first time that sizes and strides are met, by cuDNN's heuristics, which takes
// a part of a second, and kept for the process; under deterministic algorithms (at::Context) one
// that gives the same bits each time. The workspace comes from LibTorch's allocator for the call.
// Any thread, on the current stream, also while a graph is recorded. at::RecordFunction sees it as
// lightning::attention_backward(q, k, v). Errors: c10::Error with cuDNN's words.
bool attention_backward(AttentionBackward problem);

}  // namespace lightning::cuda
