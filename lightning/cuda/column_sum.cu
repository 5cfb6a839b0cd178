#include <algorithm>

#include "lightning/cuda/column_sum.cuh"
#include "lightning/cuda/column_sum.h"

namespace lightning::cuda {
namespace {

constexpr int kLanes = 32;
constexpr int kWarps = 8;
// Four blocks of 256 threads for each of an H200's 132 multiprocessors: one wave, with four 16-byte
// loads of each thread in flight.
constexpr int64_t kBlocks = 528;
constexpr int kInFlight = 4;

// A warp reads kLanes * N columns of a row; the warps of all slices take turns with the rows.
template <class T, int N>
__global__ void __launch_bounds__(kLanes* kWarps)
    sum_slices(const T* __restrict__ matrix, int64_t rows, int64_t columns, int64_t row_stride,
               float* __restrict__ sums, bool accumulate) {
  __shared__ float shared[kWarps][N][kLanes];
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * kLanes + threadIdx.x) * N;
  float partial[N] = {};
  if (first < columns) {
    const int64_t step = static_cast<int64_t>(gridDim.y) * kWarps;
    int64_t row = static_cast<int64_t>(blockIdx.y) * kWarps + threadIdx.y;
    const T* place = matrix + row * row_stride + first;
    const int64_t stride = step * row_stride;
    const auto load = [](const T* from) { return *reinterpret_cast<const Pack<T, N>*>(from); };
    const auto add = [&](const Pack<T, N>& pack) {
#pragma unroll
      for (int i = 0; i < N; ++i) partial[i] += to_float(pack.elements[i]);
    };
    for (; row + (kInFlight - 1) * step < rows; row += kInFlight * step) {
      Pack<T, N> packs[kInFlight];
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) packs[i] = load(place + i * stride);
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) add(packs[i]);
      place += kInFlight * stride;
    }
    for (; row < rows; row += step, place += stride) add(load(place));
  }
#pragma unroll
  for (int i = 0; i < N; ++i) shared[threadIdx.y][i][threadIdx.x] = partial[i];
  __syncthreads();
  if (first >= columns) return;
  // Warp w adds the elements w, w + kWarps, ... of the lanes' packs.
  for (int i = threadIdx.y; i < N; i += kWarps) {
    float sum = 0;
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) sum += shared[warp][i][threadIdx.x];
    float& place = sums[blockIdx.y * columns + first + i];
    place = accumulate ? place + sum : sum;
  }
}

struct Shape {
  int per_load = 1;
  int64_t blocks = 0;  // over columns
  int64_t slices = 0;  // over rows
};

// `per_load` without a look at the pointer, so that the workspace's size does not depend on it.
Shape shape_for(const ColumnSum& arguments, bool packed) {
  Shape shape;
  if (packed) shape.per_load = arguments.dtype == Dtype::kFloat ? 4 : 8;
  const int64_t per_block = static_cast<int64_t>(kLanes) * shape.per_load;
  shape.blocks = (arguments.columns + per_block - 1) / per_block;
  const int64_t most = std::max<int64_t>(1, kBlocks / std::max<int64_t>(1, shape.blocks));
  // At least four rows for each warp of a slice.
  const int64_t useful = (arguments.rows + 4 * kWarps - 1) / (4 * kWarps);
  shape.slices = std::max<int64_t>(1, std::min(most, useful));
  return shape;
}

int64_t floats_for(const Shape& shape, int64_t columns) {
  return shape.slices > 1 ? shape.slices * columns : 0;
}

template <class T, int N>
void launch(const ColumnSum& arguments, const Shape& shape, Stream stream) {
  const bool at_once = shape.slices == 1;
  sum_slices<T, N><<<dim3(static_cast<unsigned>(shape.blocks), static_cast<unsigned>(shape.slices)),
                     dim3(kLanes, kWarps), 0, stream>>>(
      static_cast<const T*>(arguments.matrix), arguments.rows, arguments.columns,
      arguments.row_stride, at_once ? arguments.sums : arguments.workspace,
      at_once && arguments.accumulate);
  check_launch("the column sum");
  if (at_once) return;
  launch_add_partials<float>(arguments.workspace, static_cast<int>(shape.slices), arguments.columns,
                             arguments.sums, nullptr, arguments.columns, arguments.accumulate,
                             stream);
}

}  // namespace

int64_t column_sum_workspace(const ColumnSum& arguments) {
  return std::max(floats_for(shape_for(arguments, true), arguments.columns),
                  floats_for(shape_for(arguments, false), arguments.columns));
}

void column_sum(const ColumnSum& arguments, Stream stream) {
  if (arguments.columns == 0) return;
  with_type(arguments.dtype, [&](auto* of) {
    using T = std::remove_pointer_t<decltype(of)>;
    constexpr int kPacked = kPerLoad<T>;
    const bool packed = is_aligned(arguments.matrix, 16) && arguments.columns % kPacked == 0 &&
                        arguments.row_stride % kPacked == 0;
    const Shape shape = shape_for(arguments, packed);
    packed ? launch<T, kPacked>(arguments, shape, stream) : launch<T, 1>(arguments, shape, stream);
  });
}

}  // namespace lightning::cuda
