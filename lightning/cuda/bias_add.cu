#include "lightning/cuda/bias_add.h"
#include "lightning/cuda/row_slices.cuh"

namespace lightning::cuda {
namespace {

// A thread keeps the bias of its columns; the warps take turns with the rows.
template <class T, class B, int N>
__global__ void __launch_bounds__(kSliceLanes* kSliceWarps)
    bias_add_kernel(T* __restrict__ matrix, const B* __restrict__ bias, int64_t rows,
                    int64_t columns) {
  using P = Pack<T, N>;
  constexpr int kInFlight = 4;
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * kSliceLanes + threadIdx.x) * N;
  if (first >= columns) return;
  float own[N];
#pragma unroll
  for (int i = 0; i < N; ++i) own[i] = to_float(bias[first + i]);
  const int64_t step = static_cast<int64_t>(gridDim.y) * kSliceWarps;
  int64_t row = static_cast<int64_t>(blockIdx.y) * kSliceWarps + threadIdx.y;
  const auto place = [&](int64_t at) {
    return reinterpret_cast<P*>(matrix + at * columns + first);
  };
  const auto sum = [&](P pack) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      pack.elements[i] = from_float<T>(to_float(pack.elements[i]) + own[i]);
    }
    return pack;
  };
  for (; row + (kInFlight - 1) * step < rows; row += kInFlight * step) {
    P packs[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) packs[i] = *place(row + i * step);
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) *place(row + i * step) = sum(packs[i]);
  }
  for (; row < rows; row += step) *place(row) = sum(*place(row));
}

template <class T, class B, int N>
void launch(const BiasAdd& arguments, Stream stream) {
  const auto shape = row_slices(arguments.rows, (arguments.columns + N - 1) / N);
  bias_add_kernel<T, B, N><<<grid_of(shape), slice_threads(), 0, stream>>>(
      static_cast<T*>(arguments.matrix), static_cast<const B*>(arguments.bias), arguments.rows,
      arguments.columns);
  check_launch("the sum with a bias");
}

}  // namespace

void bias_add(const BiasAdd& arguments, Stream stream) {
  if (arguments.rows == 0 || arguments.columns == 0) return;
  with_type(arguments.dtype, [&](auto* of) {
    using T = std::remove_pointer_t<decltype(of)>;
    const bool packed = arguments.columns % kPerLoad<T> == 0 && is_aligned(arguments.matrix, 16);
    const auto with_bias = [&](auto* bias) {
      using B = std::remove_pointer_t<decltype(bias)>;
      packed ? launch<T, B, kPerLoad<T>>(arguments, stream) : launch<T, B, 1>(arguments, stream);
    };
    arguments.bias_dtype == Dtype::kFloat ? with_bias(static_cast<float*>(nullptr))
                                          : with_bias(static_cast<T*>(nullptr));
  });
}

}  // namespace lightning::cuda
