#include "lightning/cuda/activation.h"
#include "lightning/cuda/row_slices.cuh"

namespace lightning::cuda {
namespace {

constexpr int kThreads = 256;
constexpr float kInverseSqrt2 = 0.70710678118654752f;
constexpr float kInverseSqrt2Pi = 0.39894228040143268f;
constexpr float kSqrt2OverPi = 0.79788456080286536f;

// f(x) and f'(x), in float32. `kFast` is for 16-bit results: its errors lie below their rounding,
// and its instructions below the time that memory takes.
template <Activation A, bool kFast>
struct Math {
  __device__ static void both(float x, float& value, float& slope) {
    if constexpr (A == Activation::kRelu) {
      value = x < 0 ? 0.f : x;  // NaN stays
      slope = x > 0 ? 1.f : 0.f;
    } else if constexpr (A == Activation::kGeluTanh) {
      // (1 + tanh(u)) / 2 as 1 / (1 + exp(-2u)), which keeps its digits where tanh is near -1.
      const float square = x * x;
      const float u = kSqrt2OverPi * x * (1 + 0.044715f * square);
      const float e = kFast ? __expf(-2 * u) : expf(-2 * u);
      const float share = kFast ? __fdividef(1.f, 1 + e) : 1.f / (1 + e);
      value = x * share;
      slope = share + value * (1 - share) * (2 * kSqrt2OverPi) * (1 + 3 * 0.044715f * square);
    } else {
      float below, bell;
      if constexpr (kFast) {
        normal(x, below, bell);
      } else {
        below = normcdff(x);
        bell = expf(-0.5f * x * x);
      }
      value = x * below;
      slope = below + x * bell * kInverseSqrt2Pi;
    }
  }

 private:
  // The normal distribution below x and exp(-x^2 / 2), by one exponential for both.
  // Source: Abramowitz and Stegun 7.1.26, with an error of 1.5e-7 at most.
  __device__ static void normal(float x, float& below, float& bell) {
    const float z = fabsf(x) * kInverseSqrt2;
    const float t = __fdividef(1.f, 1 + 0.3275911f * z);
    float sum = 1.061405429f;
    sum = sum * t - 1.453152027f;
    sum = sum * t + 1.421413741f;
    sum = sum * t - 0.284496736f;
    sum = sum * t + 0.254829592f;
    bell = __expf(-z * z);
    const float tail = 0.5f * sum * t * bell;
    below = x < 0 ? tail : 1 - tail;
  }
};

template <class T, int N, Activation A>
__global__ void __launch_bounds__(kThreads)
    forward_kernel(const T* in, T* out, int64_t packs) {  // may be the same memory
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= packs) return;
  auto pack = reinterpret_cast<const Pack<T, N>*>(in)[i];
#pragma unroll
  for (int k = 0; k < N; ++k) {
    float value, slope;
    Math<A, sizeof(T) == 2>::both(to_float(pack.elements[k]), value, slope);
    pack.elements[k] = from_float<T>(value);
  }
  reinterpret_cast<Pack<T, N>*>(out)[i] = pack;
}

// `gradient` and `result` may be the same memory: each thread reads its elements before it writes.
template <class T, int N, Activation A>
__global__ void __launch_bounds__(kSliceLanes* kSliceWarps)
    backward_kernel(const T* __restrict__ before, const T* gradient, T* result,
                    T* __restrict__ after, int64_t rows, int64_t columns,
                    float* __restrict__ sums) {
  using P = Pack<T, N>;
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * kSliceLanes + threadIdx.x) * N;
  const bool inside = first < columns;
  float partial[N] = {};
  if (inside) {
    const int64_t step = static_cast<int64_t>(gridDim.y) * kSliceWarps;
    int64_t row = static_cast<int64_t>(blockIdx.y) * kSliceWarps + threadIdx.y;
    const auto turn = [&](int64_t place, P x, P d) {
#pragma unroll
      for (int k = 0; k < N; ++k) {
        float value, slope;
        Math<A, sizeof(T) == 2>::both(to_float(x.elements[k]), value, slope);
        d.elements[k] = from_float<T>(to_float(d.elements[k]) * slope);
        x.elements[k] = from_float<T>(value);
        partial[k] += to_float(d.elements[k]);
      }
      *reinterpret_cast<P*>(result + place) = d;
      if (after != nullptr) *reinterpret_cast<P*>(after + place) = x;
    };
    const auto load = [](const T* from) { return *reinterpret_cast<const P*>(from); };
    for (; row + step < rows; row += 2 * step) {  // four loads in flight
      const int64_t one = row * columns + first, two = one + step * columns;
      const P x1 = load(before + one), d1 = load(gradient + one);
      const P x2 = load(before + two), d2 = load(gradient + two);
      turn(one, x1, d1);
      turn(two, x2, d2);
    }
    if (row < rows) {
      const int64_t place = row * columns + first;
      turn(place, load(before + place), load(gradient + place));
    }
  }
  if (sums == nullptr) return;  // the same for every thread
  leave_partials(partial, inside, [&](int k) { return sums + blockIdx.y * columns + first + k; });
}

template <class F>
void with_activation(Activation activation, const F& f) {
  switch (activation) {
    case Activation::kGelu:
      return f(std::integral_constant<Activation, Activation::kGelu>());
    case Activation::kGeluTanh:
      return f(std::integral_constant<Activation, Activation::kGeluTanh>());
    case Activation::kRelu:
      return f(std::integral_constant<Activation, Activation::kRelu>());
  }
}

template <class T, int N, Activation A>
void launch_backward(const ActivationBackward& arguments, Stream stream) {
  const auto shape = row_slices(arguments.rows, (arguments.columns + N - 1) / N);
  backward_kernel<T, N, A><<<grid_of(shape), slice_threads(), 0, stream>>>(
      static_cast<const T*>(arguments.before), static_cast<const T*>(arguments.gradient),
      static_cast<T*>(arguments.result), static_cast<T*>(arguments.after), arguments.rows,
      arguments.columns, partials_of(shape, arguments.sums, arguments.workspace));
  check_launch("an activation's backward");
  finish_partials(shape, arguments.columns, arguments.sums, arguments.workspace, stream);
}

}  // namespace

void activation(Activation activation, Dtype dtype, const void* in, void* out, int64_t count,
                Stream stream) {
  if (count == 0) return;
  with_type(dtype, [&](auto* of) {
    using T = std::remove_pointer_t<decltype(of)>;
    with_activation(activation, [&](auto which) {
      const auto launch = [&](auto width) {
        constexpr int N = decltype(width)::value;
        const auto blocks = static_cast<unsigned>((count / N + kThreads - 1) / kThreads);
        forward_kernel<T, N, decltype(which)::value><<<blocks, kThreads, 0, stream>>>(
            static_cast<const T*>(in), static_cast<T*>(out), count / N);
      };
      const bool packed = count % kPerLoad<T> == 0 && is_aligned(in, 16) && is_aligned(out, 16);
      packed ? launch(std::integral_constant<int, kPerLoad<T>>())
             : launch(std::integral_constant<int, 1>());
    });
  });
  check_launch("an activation");
}

int64_t activation_workspace(const ActivationBackward& arguments) {
  return slice_workspace(arguments.rows, arguments.columns, arguments.dtype);
}

void activation_backward(const ActivationBackward& arguments, Stream stream) {
  if (arguments.columns == 0) return;
  with_type(arguments.dtype, [&](auto* of) {
    using T = std::remove_pointer_t<decltype(of)>;
    with_activation(arguments.activation, [&](auto which) {
      constexpr Activation A = decltype(which)::value;
      const bool packed = arguments.columns % kPerLoad<T> == 0 &&
                          is_aligned(arguments.before, 16) && is_aligned(arguments.gradient, 16) &&
                          is_aligned(arguments.result, 16) && is_aligned(arguments.after, 16);
      packed ? launch_backward<T, kPerLoad<T>, A>(arguments, stream)
             : launch_backward<T, 1, A>(arguments, stream);
    });
  });
}

}  // namespace lightning::cuda
