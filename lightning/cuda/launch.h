// From tensors to what kernels take.
#pragma once

#include <ATen/core/Tensor.h>

#include "lightning/cuda/kernel.h"

namespace lightning::cuda {

// Whether kernels are built and the tensor lies on a GPU that runs them: Ampere or later.
bool can_run(const at::Tensor& tensor);

// The stream that LibTorch's operators on this tensor's device would use now, on this thread. The
// caller holds a c10::DeviceGuard of that device while it launches.
Stream stream_of(const at::Tensor& tensor);

// Errors: c10::Error for other dtypes than float32, float16 and bfloat16.
Dtype dtype_of(at::ScalarType dtype);
inline Dtype dtype_of(const at::Tensor& tensor) { return dtype_of(tensor.scalar_type()); }

// Whether there is a Dtype for it.
inline bool has_dtype(at::ScalarType dtype) {
  return dtype == at::kFloat || at::isReducedFloatingType(dtype);
}

}  // namespace lightning::cuda
