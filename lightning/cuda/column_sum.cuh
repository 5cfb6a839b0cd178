// The sum of partial sums, in which kernels that read rows and sum columns end.
#pragma once

#include <cstdint>

#include "lightning/cuda/elements.cuh"

namespace lightning::cuda {

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
