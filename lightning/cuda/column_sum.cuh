// What kernels that read rows and sum columns share: 16-byte packs and the sum of partial sums.
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

inline bool is_aligned(const void* pointer, int bytes) {
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

// sums[column] (+)= the sum over partials [count, columns]. Columns from `split` on go to `more`. A
// null place is left out. A block of (32, 32) takes 32 columns: its warps read rows, and then each
// adds up one column.
template <class Out>
__global__ void __launch_bounds__(1024)
    add_partials(const float* __restrict__ partials, int count, int64_t columns, Out* sums,
                 Out* more, int64_t split, bool accumulate) {
  __shared__ float shared[32][33];
  const int64_t first = static_cast<int64_t>(blockIdx.x) * 32;
  float sum = 0;
  if (first + threadIdx.x < columns) {
#pragma unroll 4
    for (int row = threadIdx.y; row < count; row += 32) {
      sum += partials[row * columns + first + threadIdx.x];
    }
  }
  shared[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  sum = shared[threadIdx.x][threadIdx.y];
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    sum += __shfl_xor_sync(0xffffffffu, sum, distance);
  }
  const int64_t column = first + threadIdx.y;
  if (threadIdx.x != 0 || column >= columns) return;
  Out* const out = column < split ? sums : more;
  if (out == nullptr) return;
  Out& place = out[column < split ? column : column - split];
  place = from_float<Out>(accumulate ? to_float(place) + sum : sum);
}

template <class Out>
void launch_add_partials(const float* partials, int count, int64_t columns, Out* sums, Out* more,
                         int64_t split, bool accumulate, Stream stream) {
  const auto blocks = static_cast<unsigned>((columns + 31) / 32);
  add_partials<<<blocks, dim3(32, 32), 0, stream>>>(partials, count, columns, sums, more, split,
                                                    accumulate);
  check_launch("the sum of partial column sums");
}

}  // namespace lightning::cuda
