#include "lightning/cuda/norm.cuh"

namespace lightning::cuda {
namespace {

template <class Types, int N, int K>
__global__ void __launch_bounds__(kMaxThreads) forward_rows(const NormForward arguments) {
  using X = typename Types::Input;
  using Y = typename Types::Output;
  using W = typename Types::Weight;
  __shared__ float2 shared[2][kMaxThreads / 32];
  // Where a row has several warps, a block has one row: no thread of it leaves before the barriers.
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (row >= arguments.rows) return;
  const int width = static_cast<int>(arguments.width);
  const int64_t start = row * width;
  const int first = threadIdx.x * N;
  const int step = blockDim.x * N;

  // All loads before the first store, which the compiler may not move them over.
  Pack<X, N> in[K];
#pragma unroll
  for (int k = 0; k < K; ++k) {
    const int at = first + k * step;
    if (at < width) in[k] = load<X, N>(arguments.input, start + at);
  }
  if (arguments.delta != nullptr) {
    Pack<Y, N> delta[K];
#pragma unroll
    for (int k = 0; k < K; ++k) {
      const int at = first + k * step;
      if (at < width) delta[k] = load<Y, N>(arguments.delta, start + at);
    }
#pragma unroll
    for (int k = 0; k < K; ++k) {
      const int at = first + k * step;
      if (at >= width) continue;
#pragma unroll
      for (int i = 0; i < N; ++i) {
        in[k].elements[i] =
            from_float<X>(to_float(in[k].elements[i]) + to_float(delta[k].elements[i]));
      }
      store<X, N>(arguments.sum, start + at, in[k]);
    }
  }

  float mean = 0;
  if (arguments.centred) {
    float sum = 0;
#pragma unroll
    for (int k = 0; k < K; ++k) {
      if (first + k * step >= width) continue;
#pragma unroll
      for (int i = 0; i < N; ++i) sum += to_float(in[k].elements[i]);
    }
    mean = sum_over_row({sum, 0}, shared[0]).x / width;
  }
  float squares = 0;
#pragma unroll
  for (int k = 0; k < K; ++k) {
    if (first + k * step >= width) continue;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float centred = to_float(in[k].elements[i]) - mean;
      squares += centred * centred;
    }
  }
  const float variance = sum_over_row({squares, 0}, shared[1]).x / width;
  const float rstd = rsqrtf(variance + arguments.eps);
  if (threadIdx.x == 0) {
    if (arguments.mean != nullptr) arguments.mean[row] = mean;
    arguments.rstd[row] = rstd;
  }

#pragma unroll
  for (int k = 0; k < K; ++k) {
    const int at = first + k * step;
    if (at >= width) continue;
    float values[N];
#pragma unroll
    for (int i = 0; i < N; ++i) values[i] = (to_float(in[k].elements[i]) - mean) * rstd;
    if (arguments.weight != nullptr) {
      const auto weight = load<W, N>(arguments.weight, at);
#pragma unroll
      for (int i = 0; i < N; ++i) values[i] *= to_float(weight.elements[i]);
    }
    if (arguments.bias != nullptr) {
      const auto bias = load<W, N>(arguments.bias, at);
#pragma unroll
      for (int i = 0; i < N; ++i) values[i] += to_float(bias.elements[i]);
    }
    Pack<Y, N> out;
#pragma unroll
    for (int i = 0; i < N; ++i) out.elements[i] = from_float<Y>(values[i]);
    store<Y, N>(arguments.output, start + at, out);
  }
}

template <class Types, int N>
void launch(const NormForward& arguments, Stream stream) {
  const auto shape = norm_shape<CountsOf<N>>(arguments.width / N);
  const auto blocks = static_cast<unsigned>((arguments.rows + shape.rows - 1) / shape.rows);
  const dim3 threads(shape.threads, shape.rows);
  with_count(shape.packs, CountsOf<N>{}, [&](auto count) {
    constexpr int K = decltype(count)::value;
    forward_rows<Types, N, K><<<blocks, threads, 0, stream>>>(arguments);
  });
  check_launch("the norm");
}

template <class Types>
bool is_packed(const NormForward& arguments) {
  constexpr int N = kPerLoad<typename Types::Input>;
  const bool rows = is_aligned(arguments.input, 16) && is_aligned(arguments.delta, 16) &&
                    is_aligned(arguments.sum, 16) && is_aligned(arguments.output, 16);
  const bool columns = is_aligned(arguments.weight, 16) && is_aligned(arguments.bias, 16);
  return rows && columns && arguments.width % N == 0;
}

}  // namespace

void norm_forward(const NormForward& arguments, Stream stream) {
  if (arguments.rows == 0) return;
  with_types(arguments.types, [&](auto types) {
    using Types = decltype(types);
    is_packed<Types>(arguments) ? launch<Types, kPerLoad<typename Types::Input>>(arguments, stream)
                                : launch<Types, 1>(arguments, stream);
  });
}

}  // namespace lightning::cuda
