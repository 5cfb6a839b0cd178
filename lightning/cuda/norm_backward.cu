#include "lightning/cuda/norm.cuh"

namespace lightning::cuda {
namespace {

// How many blocks of this many threads a multiprocessor is to hold, which bounds the registers.
constexpr int blocks_for(int threads) { return threads == 128 ? 3 : threads == 256 ? 2 : 1; }

// Adds up the warps' or the block's column sums, [2, blockDim.y, width] in shared memory, and
// writes them as a row of the workspace: [blocks, 2, width], or [blocks, width] without a bias.
__device__ void write_sums(const NormBackward& arguments, const float* sums) {
  __syncthreads();
  const int width = static_cast<int>(arguments.width);
  const int parts = arguments.grad_bias != nullptr ? 2 : 1;
  float* const to = arguments.workspace + static_cast<int64_t>(blockIdx.x) * parts * width;
  for (int part = 0; part < parts; ++part) {
    const float* const from = sums + part * blockDim.y * width;
    for (int column = threadIdx.y * blockDim.x + threadIdx.x; column < width;
         column += blockDim.x * blockDim.y) {
      float sum = from[column];
      for (unsigned y = 1; y < blockDim.y; ++y) sum += from[y * width + column];
      to[part * width + column] = sum;
    }
  }
}

// With h = (x - mean) rstd and d = grad_output weight:
//   grad_input = rstd (d - mean(d) - h mean(d h)) + grad_sum,  mean(d) only where centred.
// Blocks stay: each takes every gridDim.x-th group of rows and keeps column sums, in registers
// where 32 elements of x and of both gradients leave room for them, else in shared memory.
template <class Types, int N, int K, int kThreads>
__global__ void __launch_bounds__(kThreads, blocks_for(kThreads))
    backward_rows(const NormBackward arguments) {
  using X = typename Types::Input;
  using Y = typename Types::Output;
  using W = typename Types::Weight;
  using Sums = Pack<float, N>;
  constexpr bool kInRegisters = K * N < 32;
  extern __shared__ float4 dynamic_shared[];  // [2, blockDim.y, width], for 16-byte alignment
  __shared__ float2 shared[2][kThreads / 32];
  const int width = static_cast<int>(arguments.width);
  const int first = threadIdx.x * N;
  const int step = blockDim.x * N;
  const bool has_sums = arguments.workspace != nullptr;
  float* const column_sums = reinterpret_cast<float*>(dynamic_shared);
  float* const weight_sums = column_sums + threadIdx.y * width;
  float* const bias_sums = weight_sums + blockDim.y * width;
  const auto weights_at = [&](int at) {
    if (arguments.weight != nullptr) return load<W, N>(arguments.weight, at);
    Pack<W, N> ones;
#pragma unroll
    for (int i = 0; i < N; ++i) ones.elements[i] = from_float<W>(1);
    return ones;
  };

  Sums own_weight[kInRegisters ? K : 1] = {}, own_bias[kInRegisters ? K : 1] = {};
  if (!kInRegisters && has_sums) {
    for (int at = first; at < width; at += step) {
      store<float, N>(weight_sums, at, Sums{});
      store<float, N>(bias_sums, at, Sums{});
    }
  }
  int turn = 0;
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
       row < arguments.rows; row += static_cast<int64_t>(gridDim.x) * blockDim.y, turn ^= 1) {
    const int64_t start = row * width;
    const float mean = arguments.mean != nullptr ? arguments.mean[row] : 0;
    const float rstd = arguments.rstd[row];
    Pack<X, N> x[K];
    Pack<Y, N> grad[K];
    Pack<X, N> other[K];
#pragma unroll
    for (int k = 0; k < K; ++k) {
      const int at = first + k * step;
      if (at >= width) continue;
      x[k] = load<X, N>(arguments.x, start + at);
      grad[k] = load<Y, N>(arguments.grad_output, start + at);
      if (arguments.grad_sum != nullptr) other[k] = load<X, N>(arguments.grad_sum, start + at);
    }

    float2 sum = {0, 0};  // of d and of d h
#pragma unroll
    for (int k = 0; k < K; ++k) {
      const int at = first + k * step;
      if (at >= width) continue;
      const auto weight = weights_at(at);
      Sums weight_sum = {}, bias_sum = {};
      if constexpr (kInRegisters) {
        weight_sum = own_weight[k];
        bias_sum = own_bias[k];
      } else if (has_sums) {
        weight_sum = load<float, N>(weight_sums, at);
        bias_sum = load<float, N>(bias_sums, at);
      }
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const float h = (to_float(x[k].elements[i]) - mean) * rstd;
        const float g = to_float(grad[k].elements[i]);
        weight_sum.elements[i] += g * h;
        bias_sum.elements[i] += g;
        const float d = g * to_float(weight.elements[i]);
        sum.x += d;
        sum.y += d * h;
      }
      if constexpr (kInRegisters) {
        own_weight[k] = weight_sum;
        own_bias[k] = bias_sum;
      } else if (has_sums) {
        store<float, N>(weight_sums, at, weight_sum);
        store<float, N>(bias_sums, at, bias_sum);
      }
    }
    sum = sum_over_row(sum, shared[turn]);
    const float mean_d = arguments.mean != nullptr ? sum.x / width : 0;
    const float mean_dh = sum.y / width;
    if (arguments.grad_input == nullptr) continue;

#pragma unroll
    for (int k = 0; k < K; ++k) {
      const int at = first + k * step;
      if (at >= width) continue;
      const auto weight = weights_at(at);
      float values[N];
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const float h = (to_float(x[k].elements[i]) - mean) * rstd;
        const float d = to_float(grad[k].elements[i]) * to_float(weight.elements[i]);
        values[i] = rstd * (d - mean_d - h * mean_dh);
      }
      if (arguments.grad_sum != nullptr) {
#pragma unroll
        for (int i = 0; i < N; ++i) values[i] += to_float(other[k].elements[i]);
      }
      Pack<X, N> out;
#pragma unroll
      for (int i = 0; i < N; ++i) out.elements[i] = from_float<X>(values[i]);
      store<X, N>(arguments.grad_input, start + at, out);
      if (arguments.grad_delta == nullptr) continue;
      Pack<Y, N> out_delta;
#pragma unroll
      for (int i = 0; i < N; ++i) out_delta.elements[i] = from_float<Y>(values[i]);
      store<Y, N>(arguments.grad_delta, start + at, out_delta);
    }
  }
  if (!has_sums) return;
  if constexpr (kInRegisters) {
#pragma unroll
    for (int k = 0; k < K; ++k) {
      const int at = first + k * step;
      if (at >= width) continue;
      store<float, N>(weight_sums, at, own_weight[k]);
      store<float, N>(bias_sums, at, own_bias[k]);
    }
  }
  write_sums(arguments, column_sums);
}

template <class Types>
bool is_packed(const NormBackward& arguments) {
  constexpr int N = kPerLoad<typename Types::Input>;
  const bool read = is_aligned(arguments.x, 16) && is_aligned(arguments.grad_output, 16) &&
                    is_aligned(arguments.grad_sum, 16) && is_aligned(arguments.weight, 16);
  const bool written = is_aligned(arguments.grad_input, 16) && is_aligned(arguments.grad_delta, 16);
  return read && written && arguments.width % N == 0;
}

// Calls f(kernel, shape) for the division of this width.
template <class Types, int N, class F>
void with_kernel(const NormBackward& arguments, const F& f) {
  const auto shape = norm_shape<CountsOf<N>>(arguments.width / N);
  with_count(shape.packs, CountsOf<N>{}, [&](auto count) {
    constexpr int K = decltype(count)::value;
    if constexpr (K == CountsOf<N>::kMost) {
      if (shape.threads > 256) return f(backward_rows<Types, N, K, 512>, shape);
      if (shape.threads > 128) return f(backward_rows<Types, N, K, 256>, shape);
    }
    f(backward_rows<Types, N, K, 128>, shape);
  });
}

template <class F>
void with_kernel(const NormBackward& arguments, const F& f) {
  with_types(arguments.types, [&](auto types) {
    using Types = decltype(types);
    is_packed<Types>(arguments) ? with_kernel<Types, kPerLoad<typename Types::Input>>(arguments, f)
                                : with_kernel<Types, 1>(arguments, f);
  });
}

int attribute(cudaDeviceAttr which) {
  int device = 0, value = 0;
  check(cudaGetDevice(&device), "a device query");
  check(cudaDeviceGetAttribute(&value, which, device), "a device query");
  return value;
}

constexpr int64_t kUnaskedShared = 48 * 1024;  // bytes a kernel may use without asking

int64_t shared_bytes(int64_t width, int rows) { return 2 * sizeof(float) * width * rows; }

template <class T>
void add_up(const NormBackward& arguments, Stream stream) {
  const int parts = arguments.grad_bias != nullptr ? 2 : 1;
  launch_add_partials(arguments.workspace, arguments.blocks, parts * arguments.width,
                      static_cast<T*>(arguments.grad_weight), static_cast<T*>(arguments.grad_bias),
                      arguments.width, /*accumulate=*/false, stream);
}

}  // namespace

bool norm_takes(const NormTypes& types, int64_t width) {
  if (width < 1 || width > 16384 || !with_types(types, [](auto) {})) return false;
  const auto bytes = shared_bytes(width, 1) + 1024;  // and what the kernel has besides
  return bytes <= kUnaskedShared || bytes <= attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
}

int norm_backward_blocks(const NormBackward& arguments) {
  int64_t blocks = 1;
  with_kernel(arguments, [&](auto* kernel, const NormShape& shape) {
    const auto bytes = static_cast<int>(shared_bytes(arguments.width, shape.rows));
    if (bytes > kUnaskedShared) {
      check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
            "the shared memory of the norm's gradient");
    }
    int fit = 1;
    check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&fit, kernel, shape.threads * shape.rows,
                                                        bytes),
          "an occupancy query");
    const int64_t groups = (arguments.rows + shape.rows - 1) / shape.rows;
    const int64_t resident = std::max(1, fit) * attribute(cudaDevAttrMultiProcessorCount);
    blocks = std::max<int64_t>(1, std::min(groups, resident));
  });
  return static_cast<int>(blocks);
}

void norm_backward(const NormBackward& arguments, Stream stream) {
  with_kernel(arguments, [&](auto* kernel, const NormShape& shape) {
    const bool has_sums = arguments.workspace != nullptr;
    const auto bytes = has_sums ? shared_bytes(arguments.width, shape.rows) : 0;
    kernel<<<arguments.blocks, dim3(shape.threads, shape.rows), bytes, stream>>>(arguments);
  });
  check_launch("the gradient of the norm");
  if (arguments.workspace == nullptr) return;
  with_type(arguments.types.weight,
            [&](auto* of) { add_up<std::remove_pointer_t<decltype(of)>>(arguments, stream); });
}

}  // namespace lightning::cuda
