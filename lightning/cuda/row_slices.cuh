// Kernels that pass once over a matrix and sum columns of what they compute: who reads which row,
// and how the partial sums of a block come together.
//
// A block of (32, 8) threads takes 32 units of columns; its warps, and those of the other slices
// (blocks along y), take turns with the rows. Each block leaves one row of partial sums, which
// launch_add_partials() adds: no atomics, the same bits each time.
#pragma once

#include <algorithm>

#include "lightning/cuda/column_sum.cuh"

namespace lightning::cuda {

inline constexpr int kSliceLanes = 32;
inline constexpr int kSliceWarps = 8;

struct RowSlices {
  unsigned blocks = 1;  // over units of columns
  unsigned slices = 1;  // over rows
};

// One wave of four blocks for each of an H200's 132 multiprocessors; by the sizes alone, so that
// sums have the same bits on every GPU. At least two rows for each warp.
inline RowSlices row_slices(int64_t rows, int64_t units) {
  constexpr int64_t kBlocks = 528;
  const int64_t blocks = std::max<int64_t>(1, (units + kSliceLanes - 1) / kSliceLanes);
  const int64_t useful = (rows + 2 * kSliceWarps - 1) / (2 * kSliceWarps);
  const int64_t slices = std::max<int64_t>(1, std::min(kBlocks / blocks, useful));
  return {static_cast<unsigned>(blocks), static_cast<unsigned>(slices)};
}

inline dim3 grid_of(const RowSlices& shape) { return dim3(shape.blocks, shape.slices); }
inline dim3 slice_threads() { return dim3(kSliceLanes, kSliceWarps); }

// Adds `partial` of a block's warps and gives element i of lane l to place(i) of that lane. Every
// thread of the block calls it; those with `inside` false only take part in the barriers.
template <int N, class Place>
__device__ inline void leave_partials(const float (&partial)[N], bool inside, const Place& place) {
  __shared__ float shared[kSliceWarps][N][kSliceLanes];
  __syncthreads();  // a caller may come twice
#pragma unroll
  for (int i = 0; i < N; ++i) shared[threadIdx.y][i][threadIdx.x] = partial[i];
  __syncthreads();
  if (!inside) return;
  for (int i = threadIdx.y; i < N; i += kSliceWarps) {
    float sum = 0;
#pragma unroll
    for (int warp = 0; warp < kSliceWarps; ++warp) sum += shared[warp][i][threadIdx.x];
    *place(i) = sum;
  }
}

// Floats for the partial sums of a [rows, columns] result, whether its columns move in packs or
// not.
inline int64_t slice_workspace(int64_t rows, int64_t columns, Dtype dtype) {
  const int packed = dtype == Dtype::kFloat ? 4 : 8;
  const auto most = std::max(row_slices(rows, columns).slices,
                             row_slices(rows, (columns + packed - 1) / packed).slices);
  return most > 1 ? most * columns : 0;
}

// Where slices leave their rows of sums: the result itself where there is but one slice.
inline float* partials_of(const RowSlices& shape, float* sums, float* workspace) {
  return sums == nullptr || shape.slices == 1 ? sums : workspace;
}

inline void finish_partials(const RowSlices& shape, int64_t columns, float* sums,
                            const float* workspace, Stream stream) {
  if (sums == nullptr || shape.slices == 1) return;
  launch_add_partials<float>(workspace, static_cast<int>(shape.slices), columns, sums, nullptr,
                             columns, false, stream);
}

}  // namespace lightning::cuda
