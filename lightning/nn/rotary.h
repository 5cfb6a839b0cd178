// Rotary position embedding: pairs (i, i + size/2) of a head are turned by position *
// base^(-2i/size).
#pragma once

#include <ATen/core/Tensor.h>

namespace lightning::nn {

// Keeps the table of angles, which grows with the longest sequence seen.
// Source: Llama's half-rotation, as Hugging Face's checkpoints need it.
class Rotary {
 public:
  Rotary() = default;
  Rotary(int64_t head_size, double base) : head_size_(head_size), base_(base) {}

  // [time, head_size / 2, 2]: cosine and sine of each angle, taken in float64; float32, float64
  // where asked. A view of the kept table.
  at::Tensor table(int64_t time, c10::Device device, at::ScalarType dtype = at::kFloat);

 private:
  int64_t head_size_ = 0;
  double base_ = 10000.0;
  at::Tensor kept_;
};

// [batch, time, heads, size] turned by the table's angles, by ATen, with a gradient.
at::Tensor rotate(const at::Tensor& heads, const at::Tensor& table);

}  // namespace lightning::nn
