// How the norm's kernels divide a row, and which of them takes which types.
#pragma once

#include <algorithm>

#include "lightning/cuda/column_sum.cuh"
#include "lightning/cuda/norm.h"

namespace lightning::cuda {

// A thread holds K packs of N elements of its row. Up to 1024 elements a warp takes a row, kRows of
// them a block; above, a block does.
inline constexpr int kRows = 4;
inline constexpr int kMaxThreads = 512;

template <class X, class Y, class W>
struct NormElements {
  using Input = X;
  using Output = Y;
  using Weight = W;
};

template <class X, class Y, class F>
bool with_weight(Dtype weight, const F& f) {
  constexpr bool kOneType = std::is_same_v<X, Y>;
  if constexpr (kOneType || std::is_same_v<X, float>) {
    if (weight == Dtype::kFloat) {
      f(NormElements<X, Y, float>{});
      return true;
    }
    if constexpr (kOneType && !std::is_same_v<X, float>) {
      constexpr Dtype kOwn = std::is_same_v<X, __half> ? Dtype::kHalf : Dtype::kBFloat16;
      if (weight == kOwn) {
        f(NormElements<X, Y, X>{});
        return true;
      }
    }
  }
  return false;
}

template <class X, class F>
bool with_output(const NormTypes& types, const F& f) {
  switch (types.output) {
    case Dtype::kFloat:
      return with_weight<X, float>(types.weight, f);
    case Dtype::kHalf:
      return with_weight<X, __half>(types.weight, f);
    case Dtype::kBFloat16:
      return with_weight<X, __nv_bfloat16>(types.weight, f);
  }
  return false;
}

// Calls f with the element types, as NormElements; returns whether there is a kernel for them.
template <class F>
bool with_types(const NormTypes& types, const F& f) {
  switch (types.input) {
    case Dtype::kFloat:
      return with_output<float>(types, f);
    case Dtype::kHalf:
      return with_output<__half>(types, f);
    case Dtype::kBFloat16:
      return with_output<__nv_bfloat16>(types, f);
  }
  return false;
}

struct NormShape {
  int packs = 0;    // K
  int threads = 0;  // on a row
  int rows = 0;     // of a block
};

template <int... Ks>
struct Counts {
  static constexpr int kAll[sizeof...(Ks)] = {Ks...};
  static constexpr int kMost = std::max({Ks...});
};

template <int N>
struct CountsOf;
template <>
struct CountsOf<1> : Counts<8, 32> {};
template <>
struct CountsOf<4> : Counts<1, 2, 4, 6, 8> {};
template <>
struct CountsOf<8> : Counts<1, 2, 3, 4> {};

// The division of `chunks` packs that leaves the fewest threads idle, among these K in rising
// order, and of those the smallest K; above 128 threads the last K.
template <class Counts>
NormShape norm_shape(int64_t chunks) {
  NormShape best;
  for (const int packs : Counts::kAll) {
    if (chunks <= 32 * packs) return {packs, 32, kRows};
    const auto threads = static_cast<int>(((chunks + packs - 1) / packs + 31) / 32 * 32);
    if (threads > 128 && packs != Counts::kMost) continue;
    if (best.packs == 0 || threads * packs < best.threads * best.packs) best = {packs, threads, 1};
  }
  return best;
}

// Calls f(std::integral_constant<int, K>) for the K of `packs`.
template <class F, int... Ks>
void with_count(int packs, Counts<Ks...> /*all*/, const F& f) {
  ((packs == Ks ? f(std::integral_constant<int, Ks>{}) : void()), ...);
}

template <class T, int N>
__device__ Pack<T, N> load(const void* from, int64_t index) {
  return *reinterpret_cast<const Pack<T, N>*>(static_cast<const T*>(from) + index);
}

template <class T, int N>
__device__ void store(void* to, int64_t index, const Pack<T, N>& pack) {
  *reinterpret_cast<Pack<T, N>*>(static_cast<T*>(to) + index) = pack;
}

// Sums of two values over the threads of a row, the same bits in each thread. `shared` is not read
// again before the second call after this one: callers take turns between two.
__device__ inline float2 sum_over_row(float2 value, float2* shared) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    value.x += __shfl_xor_sync(0xffffffffu, value.x, distance);
    value.y += __shfl_xor_sync(0xffffffffu, value.y, distance);
  }
  if (blockDim.x == 32) return value;
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = value;
  __syncthreads();
  float2 sum = shared[0];
  for (unsigned warp = 1; warp < blockDim.x / 32; ++warp) {
    sum.x += shared[warp].x;
    sum.y += shared[warp].y;
  }
  return sum;
}

}  // namespace lightning::cuda
