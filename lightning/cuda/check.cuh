// Errors of CUDA as exceptions, and the element types of the kernels.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

#include "lightning/cuda/kernel.h"

namespace lightning::cuda {

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string("CUDA refused ") + what + ": " + cudaGetErrorString(error) +
                           ".");
}

// After a launch: whether it was accepted. What goes wrong later shows at the next wait.
inline void check_launch(const char* kernel) { check(cudaGetLastError(), kernel); }

// Calls f with a null pointer to the element type: `with_type(dtype, [&](auto* of) { using T =
// std::remove_pointer_t<decltype(of)>; ... })`.
template <class F>
void with_type(Dtype dtype, const F& f) {
  switch (dtype) {
    case Dtype::kFloat:
      return f(static_cast<float*>(nullptr));
    case Dtype::kHalf:
      return f(static_cast<__half*>(nullptr));
    case Dtype::kBFloat16:
      return f(static_cast<__nv_bfloat16*>(nullptr));
  }
}

}  // namespace lightning::cuda
