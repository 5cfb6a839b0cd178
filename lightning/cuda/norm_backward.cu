#include <cuda_pipeline.h>

#include "lightning/cuda/norm.cuh"

namespace lightning::cuda {
namespace {

// How many blocks of this many threads a multiprocessor is to hold, which bounds the registers.
// Sums and weights of 24 columns want all of them: fewer warps are faster than spilt registers.
constexpr int blocks_for(int threads, int columns) {
  if (threads == 128) return columns > 16 && columns < 32 ? 2 : 3;
  return threads == 256 ? 2 : 1;
}

// Whether a thread has registers for the column sums of its elements.
template <int N, int K>
inline constexpr bool kInRegisters = (K * N < 32);

// Weight's, bias's and delta's, in this order.
constexpr int kSums = 3;

// Adds up the warps' or the block's column sums, [2 or 3, blockDim.y, width] in shared memory, and
// writes them as rows of the workspace: weight's and bias's are [blocks, 2, width], or
// [blocks, width] without a bias; delta's, where asked for, come after them.
__device__ void write_sums(const NormBackward& arguments, const float* sums) {
  __syncthreads();
  const int width = static_cast<int>(arguments.width);
  const int parts = arguments.grad_bias != nullptr ? 2 : 1;
  for (int part = 0; part < kSums; ++part) {
    const bool is_delta = part == kSums - 1;
    if (is_delta ? arguments.delta_sums == nullptr : part >= parts) continue;
    float* const to =
        arguments.workspace + (is_delta ? static_cast<int64_t>(gridDim.x) * parts + blockIdx.x
                                        : static_cast<int64_t>(blockIdx.x) * parts + part) *
                                  width;
    const float* const from = sums + part * blockDim.y * width;
    for (int column = threadIdx.y * blockDim.x + threadIdx.x; column < width;
         column += blockDim.x * blockDim.y) {
      float sum = from[column];
      for (unsigned y = 1; y < blockDim.y; ++y) sum += from[y * width + column];
      to[column] = sum;
    }
  }
}

// Two rows of a thread's packs in shared memory, one that it works on and one that is on its way.
// Packs of neighbours lie side by side; a thread reads only what it has copied, so there is nothing
// to wait for but its own copies.
template <class Types, int N, int K>
class Stages {
  using X = typename Types::Input;
  using Y = typename Types::Output;

 public:
  __device__ Stages(void* memory, const NormBackward& arguments)
      : memory_(static_cast<char*>(memory)), arguments_(arguments) {}

  // Begins to copy a row; without one the count of copies goes on all the same.
  __device__ void fetch(int64_t row, int stage) const {
    if (row < arguments_.rows) {
      const int64_t start = row * arguments_.width;
#pragma unroll
      for (int k = 0; k < K; ++k) {
        const int at = (static_cast<int>(threadIdx.x) + k * static_cast<int>(blockDim.x)) * N;
        if (at >= arguments_.width) continue;
        copy<X>(x(stage, k), arguments_.x, start + at);
        copy<Y>(grad(stage, k), arguments_.grad_output, start + at);
        if (arguments_.grad_sum != nullptr)
          copy<X>(other(stage, k), arguments_.grad_sum, start + at);
      }
    }
    __pipeline_commit();
  }
  // Until the row before the last that was fetched is there.
  __device__ void wait() const { __pipeline_wait_prior(1); }

  __device__ Pack<X, N>* x(int stage, int k) const {
    return reinterpret_cast<Pack<X, N>*>(memory_) + place(stage, k);
  }
  __device__ Pack<X, N>* other(int stage, int k) const { return x(stage, k) + 2 * K * threads(); }
  __device__ Pack<Y, N>* grad(int stage, int k) const {
    char* const after = memory_ + 4 * K * threads() * sizeof(Pack<X, N>);
    return reinterpret_cast<Pack<Y, N>*>(after) + place(stage, k);
  }

 private:
  __device__ static unsigned threads() { return blockDim.x * blockDim.y; }
  __device__ static unsigned place(int stage, int k) {
    return (stage * K + k) * threads() + threadIdx.y * blockDim.x + threadIdx.x;
  }
  template <class T>
  __device__ static void copy(Pack<T, N>* to, const void* from, int64_t index) {
    if constexpr (N > 1) {  // else there are none
      __pipeline_memcpy_async(to, static_cast<const T*>(from) + index, sizeof(Pack<T, N>));
    }
  }

  char* memory_;
  const NormBackward& arguments_;
};

// With h = (x - mean) rstd and d = grad_output weight:
//   grad_input = rstd (d - mean(d) - h mean(d h)) + grad_sum,  mean(d) only where centred.
// Blocks stay: each takes every gridDim.x-th group of rows and keeps column sums, in registers
// where there is room for them, else in shared memory. Where it is `staged` the next row is copied
// to shared memory meanwhile: the arithmetic of a row takes about as long as its bytes.
template <class Types, int N, int K, int kThreads>
__global__ void __launch_bounds__(kThreads, blocks_for(kThreads, N* K))
    backward_rows(const NormBackward arguments, bool can_stage) {
  using X = typename Types::Input;
  using Y = typename Types::Output;
  using W = typename Types::Weight;
  using Sums = Pack<float, N>;
  constexpr bool kOwn = kInRegisters<N, K>;
  const bool staged = N > 1 && can_stage;
  extern __shared__ float4 dynamic_shared[];  // sums [parts, blockDim.y, width], then the stages
  __shared__ float2 shared[2][kThreads / 32];
  const int width = static_cast<int>(arguments.width);
  const int first = threadIdx.x * N;
  const int step = blockDim.x * N;
  const bool has_sums = arguments.workspace != nullptr;
  const bool has_delta_sums = arguments.delta_sums != nullptr;
  const int parts = has_delta_sums ? kSums : kSums - 1;
  float* const all_sums = reinterpret_cast<float*>(dynamic_shared);
  const auto sums_of = [&](int part) {
    return all_sums + (part * blockDim.y + threadIdx.y) * width;
  };
  const auto read_weights = [&](int at) {
    if (arguments.weight != nullptr) return load<W, N>(arguments.weight, at);
    Pack<W, N> ones;
#pragma unroll
    for (int i = 0; i < N; ++i) ones.elements[i] = from_float<W>(1);
    return ones;
  };
  // In registers, where there is room: fetched from the nearest cache for each row they would take
  // a third of the time.
  Pack<W, N> own_weights[kOwn ? K : 1];
  if constexpr (kOwn) {
#pragma unroll
    for (int k = 0; k < K; ++k) {
      if (first + k * step < width) own_weights[k] = read_weights(first + k * step);
    }
  }
  const auto weights_at = [&](int k, int at) {
    if constexpr (kOwn) return own_weights[k];
    return read_weights(at);
  };

  Sums own[kSums][kOwn ? K : 1] = {};
  if (!kOwn && has_sums) {
    for (int part = 0; part < parts; ++part) {
      for (int at = first; at < width; at += step) store<float, N>(sums_of(part), at, Sums{});
    }
  }
  // Sums in registers are left in shared memory only when all rows are done.
  const Stages<Types, N, K> stages(kOwn ? all_sums : all_sums + parts * blockDim.y * width,
                                   arguments);
  const int64_t row_step = static_cast<int64_t>(gridDim.x) * blockDim.y;
  int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  const auto statistics = [&](int64_t of) -> float2 {
    if (of >= arguments.rows) return {0, 0};
    return {arguments.mean != nullptr ? arguments.mean[of] : 0, arguments.rstd[of]};
  };
  if (staged) stages.fetch(row, 0);
  float2 next = statistics(row);
  int turn = 0;
  for (; row < arguments.rows; row += row_step, turn ^= 1) {
    const int64_t start = row * width;
    const float rstd = next.y, shift = -next.x * next.y;
    next = statistics(row + row_step);
    if (staged) {
      stages.fetch(row + row_step, turn ^ 1);
      stages.wait();
    }
    Pack<X, N> x[K];
    Pack<Y, N> grad[K];
#pragma unroll
    for (int k = 0; k < K; ++k) {
      const int at = first + k * step;
      if (at >= width) continue;
      x[k] = staged ? *stages.x(turn, k) : load<X, N>(arguments.x, start + at);
      grad[k] = staged ? *stages.grad(turn, k) : load<Y, N>(arguments.grad_output, start + at);
    }

    float2 sum = {0, 0};  // of d and of d h
#pragma unroll
    for (int k = 0; k < K; ++k) {
      const int at = first + k * step;
      if (at >= width) continue;
      const auto weight = weights_at(k, at);
      Sums weight_sum = {}, bias_sum = {};
      if constexpr (kOwn) {
        weight_sum = own[0][k];
        bias_sum = own[1][k];
      } else if (has_sums) {
        weight_sum = load<float, N>(sums_of(0), at);
        bias_sum = load<float, N>(sums_of(1), at);
      }
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const float h = to_float(x[k].elements[i]) * rstd + shift;
        const float g = to_float(grad[k].elements[i]);
        weight_sum.elements[i] += g * h;
        bias_sum.elements[i] += g;
        const float d = g * to_float(weight.elements[i]);
        sum.x += d;
        sum.y += d * h;
      }
      if constexpr (kOwn) {
        own[0][k] = weight_sum;
        own[1][k] = bias_sum;
      } else if (has_sums) {
        store<float, N>(sums_of(0), at, weight_sum);
        store<float, N>(sums_of(1), at, bias_sum);
      }
    }
    sum = sum_over_row(sum, shared[turn]);
    const float mean_d = arguments.mean != nullptr ? rstd * sum.x / width : 0;
    const float mean_dh = rstd * sum.y / width;
    if (arguments.grad_input == nullptr) continue;

#pragma unroll
    for (int k = 0; k < K; ++k) {
      const int at = first + k * step;
      if (at >= width) continue;
      const auto weight = weights_at(k, at);
      float values[N];
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const float h = to_float(x[k].elements[i]) * rstd + shift;
        const float d = to_float(grad[k].elements[i]) * to_float(weight.elements[i]);
        values[i] = rstd * d - mean_d - h * mean_dh;
      }
      if (arguments.grad_sum != nullptr) {
        const auto other =
            staged ? *stages.other(turn, k) : load<X, N>(arguments.grad_sum, start + at);
#pragma unroll
        for (int i = 0; i < N; ++i) values[i] += to_float(other.elements[i]);
      }
      if (has_delta_sums) {
        Sums delta_sum = {};
        if constexpr (kOwn) {
          delta_sum = own[2][k];
        } else {
          delta_sum = load<float, N>(sums_of(2), at);
        }
#pragma unroll
        for (int i = 0; i < N; ++i) delta_sum.elements[i] += values[i];
        if constexpr (kOwn) {
          own[2][k] = delta_sum;
        } else {
          store<float, N>(sums_of(2), at, delta_sum);
        }
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
  if constexpr (kOwn) {
    __syncthreads();  // nobody reads its stages any more
#pragma unroll
    for (int part = 0; part < kSums; ++part) {
#pragma unroll
      for (int k = 0; k < K; ++k) {
        const int at = first + k * step;
        if (at < width && part < parts) store<float, N>(sums_of(part), at, own[part][k]);
      }
    }
  }
  write_sums(arguments, all_sums);
}

int attribute(cudaDeviceAttr which) {
  int device = 0, value = 0;
  check(cudaGetDevice(&device), "a device query");
  check(cudaDeviceGetAttribute(&value, which, device), "a device query");
  return value;
}

constexpr int64_t kUnaskedShared = 47 * 1024;  // dynamic bytes a kernel may use without asking
constexpr int64_t kMostStaged = 96 * 1024;     // beyond, too few blocks would fit

int64_t sums_bytes(int64_t width, int rows, bool has_delta) {
  return (has_delta ? kSums : kSums - 1) * sizeof(float) * width * rows;
}

// How a launch uses shared memory.
struct Shared {
  int64_t bytes = 0;
  bool staged = false;
};

template <class Types, int N>
Shared shared_of(const NormBackward& arguments, const NormShape& shape) {
  const auto sums = sums_bytes(arguments.width, shape.rows, arguments.delta_sums != nullptr);
  const int64_t threads = static_cast<int64_t>(shape.threads) * shape.rows;
  const int64_t stages = 2 * threads * shape.packs * N *
                         (2 * sizeof(typename Types::Input) + sizeof(typename Types::Output));
  const int64_t both = shape.packs * N < 32 ? std::max(sums, stages) : sums + stages;
  if (N > 1 && both <= kMostStaged) return {both, true};
  return {sums, false};
}

template <class Types>
bool is_packed(const NormBackward& arguments) {
  constexpr int N = kPerLoad<typename Types::Input>;
  const bool read = is_aligned(arguments.x, 16) && is_aligned(arguments.grad_output, 16) &&
                    is_aligned(arguments.grad_sum, 16) && is_aligned(arguments.weight, 16);
  const bool written = is_aligned(arguments.grad_input, 16) && is_aligned(arguments.grad_delta, 16);
  return read && written && arguments.width % N == 0;
}

// Calls f(kernel, shape, shared memory) for the division of this width.
template <class Types, int N, class F>
void with_kernel(const NormBackward& arguments, const F& f) {
  const auto shape = norm_shape<CountsOf<N>>(arguments.width / N);
  const auto memory = shared_of<Types, N>(arguments, shape);
  with_count(shape.packs, CountsOf<N>{}, [&](auto count) {
    constexpr int K = decltype(count)::value;
    if constexpr (K == CountsOf<N>::kMost) {
      if (shape.threads > 256) return f(backward_rows<Types, N, K, 512>, shape, memory);
      if (shape.threads > 128) return f(backward_rows<Types, N, K, 256>, shape, memory);
    }
    f(backward_rows<Types, N, K, 128>, shape, memory);
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

template <class T>
void add_up(const NormBackward& arguments, Stream stream) {
  const int parts = arguments.grad_bias != nullptr ? 2 : 1;
  launch_add_partials(arguments.workspace, arguments.blocks, parts * arguments.width,
                      static_cast<T*>(arguments.grad_weight), static_cast<T*>(arguments.grad_bias),
                      arguments.width, /*accumulate=*/false, stream);
  if (arguments.delta_sums == nullptr) return;
  const float* const of_delta =
      arguments.workspace + static_cast<int64_t>(arguments.blocks) * parts * arguments.width;
  launch_add_partials<float>(of_delta, arguments.blocks, arguments.width, arguments.delta_sums,
                             nullptr, arguments.width, /*accumulate=*/false, stream);
}

}  // namespace

bool norm_takes(const NormTypes& types, int64_t width) {
  if (width < 1 || width > 16384 || !with_types(types, [](auto) {})) return false;
  const auto bytes = sums_bytes(width, 1, false) + 1024;  // and what the kernel has besides
  return bytes <= kUnaskedShared || bytes <= attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
}

int norm_backward_blocks(const NormBackward& arguments) {
  int64_t blocks = 1;
  with_kernel(arguments, [&](auto* kernel, const NormShape& shape, const Shared& memory) {
    const auto bytes = static_cast<int>(memory.bytes);
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
  with_kernel(arguments, [&](auto* kernel, const NormShape& shape, const Shared& memory) {
    kernel<<<arguments.blocks, dim3(shape.threads, shape.rows), memory.bytes, stream>>>(
        arguments, memory.staged);
  });
  check_launch("the gradient of the norm");
  if (arguments.workspace == nullptr) return;
  with_type(arguments.types.weight,
            [&](auto* of) { add_up<std::remove_pointer_t<decltype(of)>>(arguments, stream); });
}

}  // namespace lightning::cuda
