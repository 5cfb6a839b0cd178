#include <algorithm>

#include "lightning/cuda/adam.h"
#include "lightning/cuda/elements.cuh"

namespace lightning::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kBlock = kThreads * 32;  // numbers that a block takes
constexpr int kTensors = 54;           // a launch, within 4 KB of arguments

struct Part {
  AdamTensor tensor;
  uint32_t first_block;
};

struct Arguments {
  Part parts[kTensors];
  int count;
  float lr;
  const float* lr_on_device;
  double beta1, beta2;  // for the corrections, which need their digits
  float keep1, take1, keep2, take2;
  float eps, weight_decay;
  const float* grad_scale;
  const float* found_inf;
};
static_assert(sizeof(Arguments) <= 4096, "more than every CUDA takes as arguments");

// What one step of a tensor multiplies with, the same for all of its numbers.
struct Factors {
  float shrink;      // lr * weight_decay
  float step_size;   // lr / (1 - beta1 ^ step)
  float correction;  // sqrt(1 - beta2 ^ step)
};

__device__ Factors factors_of(const Arguments& arguments, float step) {
  const double lr = arguments.lr_on_device != nullptr ? *arguments.lr_on_device : arguments.lr;
  return {static_cast<float>(lr * arguments.weight_decay),
          static_cast<float>(lr / (1 - pow(arguments.beta1, static_cast<double>(step)))),
          static_cast<float>(sqrt(1 - pow(arguments.beta2, static_cast<double>(step))))};
}

// One number of each tensor, in registers.
struct Number {
  float parameter, gradient, mean, squares, largest;
};

template <bool kDecoupled, bool kAmsgrad>
__device__ __forceinline__ void update(Number& n, const Arguments& arguments,
                                       const Factors& factors) {
  float gradient = n.gradient;
  if (kDecoupled) {
    if (factors.shrink != 0) n.parameter = fmaf(-factors.shrink, n.parameter, n.parameter);
  } else if (arguments.weight_decay != 0) {
    gradient = fmaf(arguments.weight_decay, n.parameter, gradient);
  }
  n.mean = fmaf(arguments.keep1, n.mean, arguments.take1 * gradient);
  n.squares = fmaf(arguments.keep2, n.squares, arguments.take2 * gradient * gradient);
  if (kAmsgrad) n.largest = fmaxf(n.largest, n.squares);
  const float root = __fsqrt_rn(kAmsgrad ? n.largest : n.squares);
  const float denominator = __fdiv_rn(root, factors.correction) + arguments.eps;
  n.parameter -= __fdiv_rn(factors.step_size * n.mean, denominator);
}

// Parameter, gradient and state are of type P, the copy of type T.
template <class P, class T>
struct Pointers {
  explicit __device__ Pointers(const AdamTensor& t)
      : parameter(static_cast<P*>(t.parameter)),
        gradient(static_cast<P*>(t.gradient)),
        mean(static_cast<P*>(t.mean)),
        squares(static_cast<P*>(t.squares)),
        largest(static_cast<P*>(t.largest)),
        copy(static_cast<T*>(t.copy)) {}
  P *parameter, *gradient, *mean, *squares, *largest;
  T* copy;
};

template <int N, class T>
__device__ __forceinline__ Pack<T, N> load(const T* from) {
  return *reinterpret_cast<const Pack<T, N>*>(from);
}
template <int N, class T>
__device__ __forceinline__ void store(T* to, const Pack<T, N>& values) {
  *reinterpret_cast<Pack<T, N>*>(to) = values;
}

// The part that this block works on: the last one whose first block is not after it.
__device__ __forceinline__ int part_of(const Arguments& arguments, uint32_t block) {
  int low = 0, high = arguments.count - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (arguments.parts[middle].first_block <= block) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

// N numbers from `at` on; with more than one all pointers are aligned to a pack of them.
template <int N, bool kDecoupled, bool kAmsgrad, class P, class T>
__device__ __forceinline__ void update_pack(const Pointers<P, T>& t, int64_t at,
                                            const Arguments& arguments, const Factors& factors,
                                            float scale) {
  auto parameter = load<N>(t.parameter + at), gradient = load<N>(t.gradient + at);
  auto mean = load<N>(t.mean + at), squares = load<N>(t.squares + at);
  Pack<P, N> largest{};
  if (kAmsgrad) largest = load<N>(t.largest + at);
  Pack<T, N> copy;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    Number n{to_float(parameter.elements[i]), to_float(gradient.elements[i]),
             to_float(mean.elements[i]), to_float(squares.elements[i]),
             to_float(largest.elements[i])};
    if (scale != 1) n.gradient = __fdiv_rn(n.gradient, scale);
    gradient.elements[i] = from_float<P>(n.gradient);
    update<kDecoupled, kAmsgrad>(n, arguments, factors);
    parameter.elements[i] = from_float<P>(n.parameter);
    mean.elements[i] = from_float<P>(n.mean);
    squares.elements[i] = from_float<P>(n.squares);
    largest.elements[i] = from_float<P>(n.largest);
    copy.elements[i] = from_float<T>(n.parameter);
  }
  store(t.parameter + at, parameter);
  store(t.mean + at, mean);
  store(t.squares + at, squares);
  if (kAmsgrad) store(t.largest + at, largest);
  if (scale != 1) store(t.gradient + at, gradient);
  if (t.copy != nullptr) store(t.copy + at, copy);
}

template <class P, class T, bool kDecoupled, bool kAmsgrad>
__global__ void __launch_bounds__(kThreads)
    adam_kernel(const __grid_constant__ Arguments arguments) {
  const auto& part = arguments.parts[part_of(arguments, blockIdx.x)];
  const Pointers<P, T> t(part.tensor);
  const int64_t begin = static_cast<int64_t>(blockIdx.x - part.first_block) * kBlock;
  const int64_t end = min(begin + kBlock, part.tensor.size);

  if (arguments.found_inf != nullptr && *arguments.found_inf != 0) {
    if (t.copy == nullptr) return;
    for (int64_t at = begin + threadIdx.x; at < end; at += kThreads) {
      t.copy[at] = from_float<T>(to_float(t.parameter[at]));
    }
    return;
  }

  // The powers are float64, which some GPUs have little of: one thread computes them.
  __shared__ Factors shared;
  if (threadIdx.x == 0) shared = factors_of(arguments, *part.tensor.step);
  __syncthreads();
  const Factors factors = shared;
  const float scale = arguments.grad_scale != nullptr ? *arguments.grad_scale : 1;

  constexpr int kWidth = kPerLoad<P>;
  const bool vector = is_aligned(t.parameter, 16) && is_aligned(t.gradient, 16) &&
                      is_aligned(t.mean, 16) && is_aligned(t.squares, 16) &&
                      is_aligned(t.largest, 16) && is_aligned(t.copy, kWidth * sizeof(T));
  int64_t rest = begin;
  if (vector) {
    rest = begin + (end - begin) / kWidth * kWidth;
    for (int64_t at = begin + kWidth * threadIdx.x; at < rest; at += kWidth * kThreads) {
      update_pack<kWidth, kDecoupled, kAmsgrad>(t, at, arguments, factors, scale);
    }
  }
  for (int64_t at = rest + threadIdx.x; at < end; at += kThreads) {
    update_pack<1, kDecoupled, kAmsgrad>(t, at, arguments, factors, scale);
  }
}

template <class P, class T>
void launch(const Arguments& arguments, unsigned blocks, const AdamSettings& settings,
            Stream stream) {
  const auto with = [&](auto kernel) { kernel<<<blocks, kThreads, 0, stream>>>(arguments); };
  if (settings.decoupled) {
    settings.amsgrad ? with(adam_kernel<P, T, true, true>) : with(adam_kernel<P, T, true, false>);
  } else {
    settings.amsgrad ? with(adam_kernel<P, T, false, true>) : with(adam_kernel<P, T, false, false>);
  }
  check_launch("the Adam kernel");
}

Arguments arguments_of(const AdamSettings& settings) {
  Arguments arguments{};
  arguments.lr = settings.lr;
  arguments.lr_on_device = settings.lr_on_device;
  arguments.beta1 = settings.beta1;
  arguments.beta2 = settings.beta2;
  arguments.keep1 = static_cast<float>(settings.beta1);
  arguments.take1 = static_cast<float>(1 - settings.beta1);
  arguments.keep2 = static_cast<float>(settings.beta2);
  arguments.take2 = static_cast<float>(1 - settings.beta2);
  arguments.eps = static_cast<float>(settings.eps);
  arguments.weight_decay = static_cast<float>(settings.weight_decay);
  arguments.grad_scale = settings.grad_scale;
  arguments.found_inf = settings.found_inf;
  return arguments;
}

}  // namespace

void adam(const std::vector<AdamTensor>& tensors, const AdamSettings& settings, Stream stream) {
  Arguments arguments = arguments_of(settings);
  uint32_t blocks = 0;
  const auto flush = [&] {
    if (blocks == 0) return;
    if (settings.dtype == Dtype::kHalf) {
      launch<__half, __half>(arguments, blocks, settings, stream);
    } else if (settings.dtype == Dtype::kBFloat16) {
      launch<__nv_bfloat16, __nv_bfloat16>(arguments, blocks, settings, stream);
    } else if (settings.copy_dtype == Dtype::kHalf) {
      launch<float, __half>(arguments, blocks, settings, stream);
    } else {
      launch<float, __nv_bfloat16>(arguments, blocks, settings, stream);
    }
    blocks = 0;
    arguments.count = 0;
  };
  for (const auto& tensor : tensors) {
    if (tensor.size == 0) continue;
    arguments.parts[arguments.count++] = {tensor, blocks};
    blocks += static_cast<uint32_t>((tensor.size + kBlock - 1) / kBlock);
    if (arguments.count == kTensors) flush();
  }
  flush();
}

}  // namespace lightning::cuda
