#include <algorithm>
#include <cstdio>

#include "lightning/cuda/elements.cuh"
#include "lightning/cuda/embed.h"

namespace lightning::cuda {
namespace {

constexpr int kLanes = 32;
constexpr int kWarps = 8;

// A warp a row.
template <class T, int N>
__global__ void __launch_bounds__(kLanes* kWarps)
    embed_kernel(const int64_t* __restrict__ tokens, const T* __restrict__ token_rows,
                 const T* __restrict__ position_rows, T* __restrict__ out, int64_t rows,
                 int64_t time, int64_t width, int64_t vocabulary) {
  using P = Pack<T, N>;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.y;
  if (row >= rows) return;
  const int64_t token = tokens[row];
  if (token < 0 || token >= vocabulary) {
    if (threadIdx.x == 0) {
      printf("embed: token %lld at place %lld, expected 0 to %lld.\n",
             static_cast<long long>(token), static_cast<long long>(row),
             static_cast<long long>(vocabulary - 1));
    }
    __trap();
  }
  const auto* const from = reinterpret_cast<const P*>(token_rows + token * width);
  const auto* const position = reinterpret_cast<const P*>(position_rows + (row % time) * width);
  auto* const to = reinterpret_cast<P*>(out + row * width);
  for (int64_t i = threadIdx.x; i < width / N; i += kLanes) {
    P a = from[i];
    const P b = position[i];
#pragma unroll
    for (int k = 0; k < N; ++k) {
      a.elements[k] = from_float<T>(to_float(a.elements[k]) + to_float(b.elements[k]));
    }
    to[i] = a;
  }
}

// ---- The gradient -------------------------------------------------------------------------------

// A block takes a chunk of the sorted rows. A token whose rows lie in one chunk is written at once.
// Of others each chunk leaves a sum, of those that began before it or of those that go on after it,
// and the chunk in which they begin adds them up.
constexpr int kChunk = 32;
constexpr int kMostThreads = 256;

__device__ inline float* partial_of(const EmbedGradient& arguments, int64_t chunk, bool began) {
  return arguments.workspace + (2 * chunk + (began ? 0 : 1)) * arguments.width;
}

template <int N>
__device__ inline void add(float (&sum)[N], const float* from) {
#pragma unroll
  for (int k = 0; k < N; ++k) sum[k] += from[k];
}

template <class T, int N>
__device__ inline void write(const EmbedGradient& arguments, int64_t token, int64_t column,
                             const float (&sum)[N]) {
  Pack<T, N> pack;
#pragma unroll
  for (int k = 0; k < N; ++k) pack.elements[k] = from_float<T>(sum[k]);
  T* const place = static_cast<T*>(arguments.out) + token * arguments.width + column;
  *reinterpret_cast<Pack<T, N>*>(place) = pack;
}

template <class T, int N>
__global__ void __launch_bounds__(kMostThreads) sum_chunks(const EmbedGradient arguments) {
  constexpr int kInFlight = 4;
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * kChunk;
  const int64_t end = min(begin + kChunk, arguments.rows);
  const int64_t column = (static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x) * N;
  if (column >= arguments.width) return;
  const T* const rows = static_cast<const T*>(arguments.gradient) + column;
  int64_t token = arguments.tokens[begin];
  bool began = begin > 0 && arguments.tokens[begin - 1] == token;
  float sum[N] = {};
  for (int64_t base = begin; base < end; base += kInFlight) {
    Pack<T, N> packs[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      if (base + i < end) {
        const int64_t place = arguments.places[base + i];
        packs[i] = *reinterpret_cast<const Pack<T, N>*>(rows + place * arguments.width);
      }
    }
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const int64_t at = base + i;
      if (at >= end) break;
#pragma unroll
      for (int k = 0; k < N; ++k) sum[k] += to_float(packs[i].elements[k]);
      const int64_t next = at + 1 < arguments.rows ? arguments.tokens[at + 1] : -1;
      if (next == token && at + 1 < end) continue;
      if (began || next == token) {
        float* const partial = partial_of(arguments, blockIdx.x, began) + column;
#pragma unroll
        for (int k = 0; k < N; ++k) partial[k] = sum[k];
      } else {
        write<T>(arguments, token, column, sum);
      }
#pragma unroll
      for (int k = 0; k < N; ++k) sum[k] = 0;
      token = next;
      began = false;
    }
  }
}

// For the tokens whose rows begin in this block's chunk and go on after it.
template <class T, int N>
__global__ void __launch_bounds__(kMostThreads) join_chunks(const EmbedGradient arguments) {
  const auto* const tokens = arguments.tokens;
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * kChunk;
  int64_t end = min(begin + kChunk, arguments.rows);
  const int64_t token = tokens[end - 1];
  const auto goes_on = [&] { return end < arguments.rows && tokens[end] == token; };
  const bool began = begin > 0 && tokens[begin - 1] == token;
  const int64_t column = (static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x) * N;
  if (!goes_on() || began || column >= arguments.width) return;
  float sum[N] = {};
  add(sum, partial_of(arguments, blockIdx.x, false) + column);
  for (int64_t chunk = blockIdx.x + 1; goes_on(); ++chunk) {
    add(sum, partial_of(arguments, chunk, true) + column);
    // Where the chunk's first rows are not all of it, they end in it.
    const int64_t last = min(end + kChunk, arguments.rows);
    if (tokens[last - 1] != token) break;
    end = last;
  }
  write<T>(arguments, token, column, sum);
}

}  // namespace

int64_t embed_gradient_workspace(const EmbedGradient& arguments) {
  return (arguments.rows + kChunk - 1) / kChunk * 2 * arguments.width;
}

void embed_gradient(const EmbedGradient& arguments, Stream stream) {
  if (arguments.rows == 0 || arguments.width == 0) return;
  with_type(arguments.dtype, [&](auto* of) {
    using T = std::remove_pointer_t<decltype(of)>;
    const auto launch = [&](auto pack) {
      constexpr int N = decltype(pack)::value;
      const auto threads = static_cast<unsigned>(
          std::min<int64_t>(kMostThreads, (arguments.width / N + 31) / 32 * 32));
      const dim3 grid(static_cast<unsigned>((arguments.rows + kChunk - 1) / kChunk),
                      static_cast<unsigned>((arguments.width / N + threads - 1) / threads));
      sum_chunks<T, N><<<grid, threads, 0, stream>>>(arguments);
      check_launch("the embedding's gradient");
      join_chunks<T, N><<<grid, threads, 0, stream>>>(arguments);
      check_launch("the embedding's gradient");
    };
    const bool packed = arguments.width % kPerLoad<T> == 0 && is_aligned(arguments.gradient, 16) &&
                        is_aligned(arguments.out, 16);
    packed ? launch(std::integral_constant<int, kPerLoad<T>>())
           : launch(std::integral_constant<int, 1>());
  });
}

void embed(const Embed& arguments, Stream stream) {
  if (arguments.rows == 0 || arguments.width == 0) return;
  with_type(arguments.dtype, [&](auto* of) {
    using T = std::remove_pointer_t<decltype(of)>;
    const auto launch = [&](auto width) {
      const auto blocks = static_cast<unsigned>((arguments.rows + kWarps - 1) / kWarps);
      embed_kernel<T, decltype(width)::value><<<blocks, dim3(kLanes, kWarps), 0, stream>>>(
          arguments.tokens, static_cast<const T*>(arguments.token_rows),
          static_cast<const T*>(arguments.position_rows), static_cast<T*>(arguments.out),
          arguments.rows, arguments.time, arguments.width, arguments.vocabulary);
    };
    const bool packed = arguments.width % kPerLoad<T> == 0 &&
                        is_aligned(arguments.token_rows, 16) &&
                        is_aligned(arguments.position_rows, 16) && is_aligned(arguments.out, 16);
    packed ? launch(std::integral_constant<int, kPerLoad<T>>())
           : launch(std::integral_constant<int, 1>());
    check_launch("the embedding");
  });
}

}  // namespace lightning::cuda
