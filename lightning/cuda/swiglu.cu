#include "lightning/cuda/row_slices.cuh"
#include "lightning/cuda/swiglu.h"

namespace lightning::cuda {
namespace {

constexpr int kThreads = 256;

template <bool kFast>
__device__ inline float sigmoid(float x) {
  if constexpr (kFast) return __fdividef(1.f, 1 + __expf(-x));
  return 1.f / (1 + expf(-x));
}

template <class T, int N>
__global__ void __launch_bounds__(kThreads)
    forward_kernel(const T* gate, const T* up, T* out, int64_t packs) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= packs) return;
  auto g = reinterpret_cast<const Pack<T, N>*>(gate)[i];
  const auto u = reinterpret_cast<const Pack<T, N>*>(up)[i];
#pragma unroll
  for (int k = 0; k < N; ++k) {
    const float x = to_float(g.elements[k]);
    g.elements[k] = from_float<T>(x * sigmoid<sizeof(T) == 2>(x) * to_float(u.elements[k]));
  }
  reinterpret_cast<Pack<T, N>*>(out)[i] = g;
}

// Three loads of a row and two or three stores; what may alias is read before it is written.
template <class T, int N>
__global__ void __launch_bounds__(kSliceLanes* kSliceWarps)
    backward_kernel(const T* __restrict__ gate, const T* __restrict__ up, const T* gradient,
                    T* gate_gradient, T* __restrict__ up_gradient, T* __restrict__ after,
                    int64_t rows, int64_t columns, float* __restrict__ gate_sums,
                    float* __restrict__ up_sums) {
  using P = Pack<T, N>;
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * kSliceLanes + threadIdx.x) * N;
  const bool inside = first < columns;
  float gate_partial[N] = {}, up_partial[N] = {};
  if (inside) {
    const int64_t step = static_cast<int64_t>(gridDim.y) * kSliceWarps;
    const int64_t start = static_cast<int64_t>(blockIdx.y) * kSliceWarps + threadIdx.y;
    const auto load = [](const T* from) { return *reinterpret_cast<const P*>(from); };
    const auto store = [](T* to, const P& pack) { *reinterpret_cast<P*>(to) = pack; };
#pragma unroll 2
    for (int64_t row = start; row < rows; row += step) {
      const int64_t place = row * columns + first;
      P g = load(gate + place), u = load(up + place), d = load(gradient + place);
#pragma unroll
      for (int k = 0; k < N; ++k) {
        const float x = to_float(g.elements[k]), y = to_float(u.elements[k]);
        const float share = sigmoid<sizeof(T) == 2>(x), silu = x * share;
        const float gradient_k = to_float(d.elements[k]);
        d.elements[k] = from_float<T>(gradient_k * y * (share + silu * (1 - share)));
        u.elements[k] = from_float<T>(gradient_k * silu);
        g.elements[k] = from_float<T>(silu * y);
        gate_partial[k] += to_float(d.elements[k]);
        up_partial[k] += to_float(u.elements[k]);
      }
      store(gate_gradient + place, d);
      store(up_gradient + place, u);
      if (after != nullptr) store(after + place, g);
    }
  }
  if (gate_sums == nullptr) return;  // the same for every thread
  const int64_t place = blockIdx.y * columns + first;
  leave_partials(gate_partial, inside, [&](int k) { return gate_sums + place + k; });
  leave_partials(up_partial, inside, [&](int k) { return up_sums + place + k; });
}

template <class T, int N>
void launch_backward(const SwigluBackward& arguments, Stream stream) {
  const auto shape = row_slices(arguments.rows, (arguments.columns + N - 1) / N);
  float* const second = arguments.workspace + shape.slices * arguments.columns;
  backward_kernel<T, N><<<grid_of(shape), slice_threads(), 0, stream>>>(
      static_cast<const T*>(arguments.gate), static_cast<const T*>(arguments.up),
      static_cast<const T*>(arguments.gradient), static_cast<T*>(arguments.gate_gradient),
      static_cast<T*>(arguments.up_gradient), static_cast<T*>(arguments.after), arguments.rows,
      arguments.columns, partials_of(shape, arguments.gate_sums, arguments.workspace),
      partials_of(shape, arguments.up_sums, second));
  check_launch("SwiGLU's backward");
  finish_partials(shape, arguments.columns, arguments.gate_sums, arguments.workspace, stream);
  finish_partials(shape, arguments.columns, arguments.up_sums, second, stream);
}

}  // namespace

void swiglu(Dtype dtype, const void* gate, const void* up, void* out, int64_t count,
            Stream stream) {
  if (count == 0) return;
  with_type(dtype, [&](auto* of) {
    using T = std::remove_pointer_t<decltype(of)>;
    const auto launch = [&](auto width) {
      constexpr int N = decltype(width)::value;
      const auto blocks = static_cast<unsigned>((count / N + kThreads - 1) / kThreads);
      forward_kernel<T, N><<<blocks, kThreads, 0, stream>>>(
          static_cast<const T*>(gate), static_cast<const T*>(up), static_cast<T*>(out), count / N);
    };
    const bool packed = count % kPerLoad<T> == 0 && is_aligned(gate, 16) && is_aligned(up, 16) &&
                        is_aligned(out, 16);
    packed ? launch(std::integral_constant<int, kPerLoad<T>>())
           : launch(std::integral_constant<int, 1>());
  });
  check_launch("SwiGLU");
}

int64_t swiglu_workspace(const SwigluBackward& arguments) {
  return 2 * slice_workspace(arguments.rows, arguments.columns, arguments.dtype);
}

void swiglu_backward(const SwigluBackward& arguments, Stream stream) {
  if (arguments.columns == 0) return;
  with_type(arguments.dtype, [&](auto* of) {
    using T = std::remove_pointer_t<decltype(of)>;
    const auto aligned = [](auto*... pointers) { return (is_aligned(pointers, 16) && ...); };
    const bool packed = arguments.columns % kPerLoad<T> == 0 &&
                        aligned(arguments.gate, arguments.up, arguments.gradient,
                                arguments.gate_gradient, arguments.up_gradient, arguments.after);
    packed ? launch_backward<T, kPerLoad<T>>(arguments, stream)
           : launch_backward<T, 1>(arguments, stream);
  });
}

}  // namespace lightning::cuda
