// How kernels move and read elements: in packs of up to 16 bytes, in float32 arithmetic.
#pragma once

#include <cstdint>
#include <type_traits>

#include "lightning/cuda/check.cuh"

namespace lightning::cuda {

// N elements that move as one, in accesses of up to 16 bytes.
template <class T, int N>
struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Pack {
  T elements[N];
};

template <class T>
inline constexpr int kPerLoad = 16 / sizeof(T);

__host__ __device__ inline bool is_aligned(const void* pointer, unsigned bytes) {
  return reinterpret_cast<std::uintptr_t>(pointer) % bytes == 0;
}

__device__ inline float to_float(float value) { return value; }
__device__ inline float to_float(__half value) { return __half2float(value); }
__device__ inline float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

template <class T>
__device__ inline T from_float(float value) {
  if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(value);
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16_rn(value);
  } else {
    return value;
  }
}

}  // namespace lightning::cuda
