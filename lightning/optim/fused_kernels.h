// One call of a fused kernel, with what it takes. Part of fused_step.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/optim/optimizer.h>

#include <optional>
#include <vector>

#include "lightning/optim/fused_state.h"
#include "lightning/param/working_copy.h"

namespace lightning::fused {

// Parameters of one group, on one device and of one dtype, with all that belongs to each at its
// place in the other lists.
struct Bucket {
  size_t group = 0;
  const OptimizerOptions* options = nullptr;
  c10::Device device = c10::kCPU;
  at::ScalarType dtype = at::kFloat;
  bool first = false;  // of SGD's momentum, which begins with these gradients
  std::vector<at::Tensor> params, grads, moments[3], steps;
  // The counts of steps that advance: those of parameters without elements too.
  std::vector<at::Tensor> counted;
};

// What is the same for all of a bucket; tensors are on its device.
struct Scalars {
  double lr = 0;
  at::Tensor lr_on_device;  // read in the place of `lr`, where it is defined
  std::optional<at::Tensor> grad_scale, found_inf;
};

// Steps the bucket. AdamW and Adam on a GPU run by cuda::adam() in 16 bits and where there are
// copies, which it writes on the way; the rest by LibTorch's operators.
void step(Kind kind, const Bucket& bucket, const Scalars& scalars, WorkingCopies* copies);

}  // namespace lightning::fused
