// Adam and AdamW over many tensors in one pass, which also writes 16-bit copies of float32
// parameters.
//
// The numbers are those of at::_fused_adam_ and at::_fused_adamw_, computed in float32 where they
// pass through float64: they agree to about 1e-7 of a step, before they are rounded to the tensors'
// dtype. Memory is what it costs: 28 bytes a parameter in float32, 14 in 16 bits, 2 more for the
// copy, 8 or 4 more under amsgrad. (LibTorch's kernel takes half as long again in 16 bits.)
#pragma once

#include <cstdint>
#include <vector>

#include "lightning/cuda/kernel.h"

namespace lightning::cuda {

// All on one device, dense, with equal strides, in AdamSettings::dtype.
struct AdamTensor {
  void* parameter = nullptr;
  void* gradient = nullptr;  // read; written where it is unscaled
  void* mean = nullptr;      // of the gradients
  void* squares = nullptr;   // the mean of their squares
  void* largest = nullptr;   // of the squares so far; null without amsgrad
  void* copy = nullptr;      // of the parameter, in copy_dtype; null for none
  // How many steps there were with this one.
  const float* step = nullptr;
  int64_t size = 0;
};

struct AdamSettings {
  // Read from the device where there is a pointer: a recorded launch follows it.
  float lr = 0;
  const float* lr_on_device = nullptr;
  double beta1 = 0.9, beta2 = 0.999, eps = 1e-8, weight_decay = 0;
  // Whether weight decay shrinks the parameter (AdamW) or is added to the gradient (Adam).
  bool decoupled = true;
  bool amsgrad = false;
  // Of a gradient scaler: gradients are divided by the first and written back; where the second is
  // 1, nothing but the copies is written. Null without one.
  const float* grad_scale = nullptr;
  const float* found_inf = nullptr;
  Dtype dtype = Dtype::kFloat;
  // kHalf or kBFloat16; only parameters in float32 have copies.
  Dtype copy_dtype = Dtype::kBFloat16;
};

// One launch for each 54 tensors. Tensors of any size and alignment.
void adam(const std::vector<AdamTensor>& tensors, const AdamSettings& settings, Stream stream);

}  // namespace lightning::cuda
