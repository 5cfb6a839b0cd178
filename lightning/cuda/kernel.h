// What the interfaces of the kernels share. They know neither LibTorch nor CUDA's headers:
// pointers, sizes, an element type and a stream.
//
// Every function of lightning/cuda is asynchronous: it launches on the stream and returns.
// Errors: std::runtime_error with CUDA's words for a launch that fails.
#pragma once

#include <cstdint>

#ifndef LIGHTNING_CUDA_KERNELS
#define LIGHTNING_CUDA_KERNELS 0
#endif

struct CUstream_st;

namespace lightning::cuda {

// Whether this build has kernels. Calls stand behind `if constexpr (cuda::kBuilt)`, so that a build
// without nvcc links.
inline constexpr bool kBuilt = LIGHTNING_CUDA_KERNELS != 0;

using Stream = CUstream_st*;

enum class Dtype { kFloat, kHalf, kBFloat16 };

}  // namespace lightning::cuda
