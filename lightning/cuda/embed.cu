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

}  // namespace

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
