#include "lightning/cuda/class_of.cuh"
#include "lightning/cuda/elements.cuh"
#include "lightning/cuda/exp_rows.h"

namespace lightning::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarp = 32;
using Element = __nv_bfloat16;
using Vector = Pack<Element, kPerLoad<Element>>;

unsigned blocks_for(int64_t threads) {
  return static_cast<unsigned>((threads + kThreads - 1) / kThreads);
}

// A warp for each row.
__global__ void __launch_bounds__(kThreads) shifts_kernel(TargetShifts g) {
  const int64_t row = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / kWarp;
  if (row >= g.rows) return;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t target = g.targets[row];
  if (target == g.ignore_index) {
    if (lane == 0) g.shifts[row] = INFINITY;
    return;
  }
  const int64_t vectors = g.depth / kPerLoad<Element>;
  const auto* a = static_cast<const Vector*>(g.a) + row * vectors;
  const auto* b = static_cast<const Vector*>(g.b) + class_of(target, g.classes) * vectors;
  float sum = 0;
  for (int64_t i = lane; i < vectors; i += kWarp) {
    const Vector x = a[i], w = b[i];
#pragma unroll
    for (int k = 0; k < kPerLoad<Element>; ++k) {
      sum += to_float(x.elements[k]) * to_float(w.elements[k]);
    }
  }
#pragma unroll
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) {
    sum += __shfl_xor_sync(0xffffffffu, sum, lanes);
  }
  if (lane == 0) g.shifts[row] = sum;
}

__global__ void __launch_bounds__(kThreads) finish_kernel(ExpRows g) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (row >= g.rows) return;
  const int64_t target = g.targets[row];
  if (target == g.ignore_index) {
    g.losses[row] = g.scales[row] = 0;
    return;
  }
  float sum = 0;
  for (int64_t part = 0; part < g.parts; ++part) sum += g.sums[part * g.stride + row];
  g.losses[row] = logf(sum);
  g.scales[row] = 1 / sum;
  // The target's own exponential is 1.
  static_cast<Element*>(g.out)[row * g.columns + target] = from_float<Element>(1 - sum);
  if (!(sum <= kMostSum)) *g.overflow = 1;  // every thread that writes, writes the same
}

// A pack for each thread.
template <class T>
__global__ void __launch_bounds__(kThreads) scale_kernel(ScaleRows g, int64_t packs_of_row) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= g.rows * packs_of_row) return;
  using P = Pack<T, kPerLoad<T>>;
  const float scale = g.scales[i / packs_of_row];
  P pack = static_cast<const P*>(g.in)[i];
#pragma unroll
  for (int k = 0; k < kPerLoad<T>; ++k) {
    pack.elements[k] = from_float<T>(to_float(pack.elements[k]) * scale);
  }
  static_cast<P*>(g.out)[i] = pack;
}

}  // namespace

void target_shifts(const TargetShifts& arguments, Stream stream) {
  if (arguments.rows == 0) return;
  shifts_kernel<<<blocks_for(arguments.rows * kWarp), kThreads, 0, stream>>>(arguments);
  check_launch("the products with the targets");
}

void finish_exp_rows(const ExpRows& arguments, Stream stream) {
  if (arguments.rows == 0) return;
  finish_kernel<<<blocks_for(arguments.rows), kThreads, 0, stream>>>(arguments);
  check_launch("the losses of exponentials");
}

void scale_rows(const ScaleRows& arguments, Stream stream) {
  if (arguments.rows == 0) return;
  with_type(arguments.dtype, [&](auto* of) {
    using T = std::remove_pointer_t<decltype(of)>;
    const auto packs_of_row = arguments.columns / kPerLoad<T>;
    scale_kernel<T><<<blocks_for(arguments.rows * packs_of_row), kThreads, 0, stream>>>(
        arguments, packs_of_row);
    check_launch("scales of rows");
  });
}

}  // namespace lightning::cuda
