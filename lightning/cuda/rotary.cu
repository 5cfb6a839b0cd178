#include "lightning/cuda/elements.cuh"
#include "lightning/cuda/rotary.h"

namespace lightning::cuda {
namespace {

constexpr int kThreads = 256;

// One thread for N pairs of a head.
template <class T, int N>
__global__ void __launch_bounds__(kThreads)
    rotate_kernel(T* __restrict__ packed, int64_t threads, int64_t time, int64_t width, int heads,
                  int half, const float* __restrict__ table) {
  using P = Pack<T, N>;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= threads) return;
  const int per_head = half / N, per_row = heads * per_head;
  const int64_t row = index / per_row;
  const int unit = static_cast<int>(index - row * per_row);
  const int head = unit / per_head, first = (unit - head * per_head) * N;
  T* const place = packed + row * width + static_cast<int64_t>(head) * 2 * half + first;
  const float* const angles = table + ((row % time) * half + first) * 2;
  P a = *reinterpret_cast<const P*>(place), b = *reinterpret_cast<const P*>(place + half);
#pragma unroll
  for (int k = 0; k < N; ++k) {
    const float2 turn = reinterpret_cast<const float2*>(angles)[k];
    const float x = to_float(a.elements[k]), y = to_float(b.elements[k]);
    a.elements[k] = from_float<T>(x * turn.x - y * turn.y);
    b.elements[k] = from_float<T>(y * turn.x + x * turn.y);
  }
  *reinterpret_cast<P*>(place) = a;
  *reinterpret_cast<P*>(place + half) = b;
}

template <class T, int N>
void launch(const Rotary& arguments, Stream stream) {
  const auto half = static_cast<int>(arguments.head_size / 2);
  const int64_t threads = arguments.rows * arguments.heads * (half / N);
  const auto blocks = static_cast<unsigned>((threads + kThreads - 1) / kThreads);
  rotate_kernel<T, N><<<blocks, kThreads, 0, stream>>>(
      static_cast<T*>(arguments.packed), threads, arguments.time, arguments.width,
      static_cast<int>(arguments.heads), half, arguments.table);
  check_launch("the rotary embedding");
}

}  // namespace

void rotate(const Rotary& arguments, Stream stream) {
  if (arguments.rows == 0 || arguments.heads == 0 || arguments.head_size == 0) return;
  with_type(arguments.dtype, [&](auto* of) {
    using T = std::remove_pointer_t<decltype(of)>;
    const bool packed = (arguments.head_size / 2) % kPerLoad<T> == 0 &&
                        arguments.width % kPerLoad<T> == 0 && is_aligned(arguments.packed, 16);
    packed ? launch<T, kPerLoad<T>>(arguments, stream) : launch<T, 1>(arguments, stream);
  });
}

}  // namespace lightning::cuda
