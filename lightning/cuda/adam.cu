#include <algorithm>

#include "lightning/cuda/adam.h"
#include "lightning/cuda/check.cuh"

namespace lightning::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWidth = 4;                            // numbers that a thread takes at a time
constexpr int kRounds = 8;                           // times that it does
constexpr int kBlock = kThreads * kWidth * kRounds;  // numbers that a block takes
constexpr int kTensors = 54;                         // a launch, within 4 KB of arguments

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

template <class T>
__device__ __forceinline__ T rounded(float x);
template <>
__device__ __forceinline__ __half rounded<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 rounded<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

template <class T>
struct alignas(4 * sizeof(T)) Four {
  T x[4];
};

__device__ __forceinline__ Four<float> load(const float* from) {
  return *reinterpret_cast<const Four<float>*>(from);
}
template <class T>
__device__ __forceinline__ void store(T* to, const Four<T>& values) {
  *reinterpret_cast<Four<T>*>(to) = values;
}

__device__ __forceinline__ bool aligned(const void* pointer, unsigned bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
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

// Four at a time; `end` - `at` is a multiple of kWidth, all pointers are aligned.
template <class T, bool kDecoupled, bool kAmsgrad>
__device__ __forceinline__ void update_four(const AdamTensor& t, T* copy, int64_t at,
                                            const Arguments& arguments, const Factors& factors,
                                            float scale) {
  auto parameter = load(t.parameter + at), gradient = load(t.gradient + at);
  auto mean = load(t.mean + at), squares = load(t.squares + at);
  Four<float> largest{};
  if (kAmsgrad) largest = load(t.largest + at);
  Four<T> out;
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    if (scale != 1) gradient.x[i] = __fdiv_rn(gradient.x[i], scale);
    Number n{parameter.x[i], gradient.x[i], mean.x[i], squares.x[i], largest.x[i]};
    update<kDecoupled, kAmsgrad>(n, arguments, factors);
    parameter.x[i] = n.parameter;
    mean.x[i] = n.mean;
    squares.x[i] = n.squares;
    largest.x[i] = n.largest;
    out.x[i] = rounded<T>(n.parameter);
  }
  store(t.parameter + at, parameter);
  store(t.mean + at, mean);
  store(t.squares + at, squares);
  if (kAmsgrad) store(t.largest + at, largest);
  if (scale != 1) store(t.gradient + at, gradient);
  if (copy != nullptr) store(copy + at, out);
}

template <class T, bool kDecoupled, bool kAmsgrad>
__device__ __forceinline__ void update_one(const AdamTensor& t, T* copy, int64_t at,
                                           const Arguments& arguments, const Factors& factors,
                                           float scale) {
  Number n{t.parameter[at], t.gradient[at], t.mean[at], t.squares[at],
           kAmsgrad ? t.largest[at] : 0};
  if (scale != 1) {
    n.gradient = __fdiv_rn(n.gradient, scale);
    t.gradient[at] = n.gradient;
  }
  update<kDecoupled, kAmsgrad>(n, arguments, factors);
  t.parameter[at] = n.parameter;
  t.mean[at] = n.mean;
  t.squares[at] = n.squares;
  if (kAmsgrad) t.largest[at] = n.largest;
  if (copy != nullptr) copy[at] = rounded<T>(n.parameter);
}

template <class T, bool kDecoupled, bool kAmsgrad>
__global__ void __launch_bounds__(kThreads)
    adam_kernel(const __grid_constant__ Arguments arguments) {
  const auto& part = arguments.parts[part_of(arguments, blockIdx.x)];
  const AdamTensor& t = part.tensor;
  auto* const copy = static_cast<T*>(t.copy);
  const int64_t begin = static_cast<int64_t>(blockIdx.x - part.first_block) * kBlock;
  const int64_t end = begin + kBlock < t.size ? begin + kBlock : t.size;

  if (arguments.found_inf != nullptr && *arguments.found_inf != 0) {
    if (copy == nullptr) return;
    for (int64_t at = begin + threadIdx.x; at < end; at += kThreads) {
      copy[at] = rounded<T>(t.parameter[at]);
    }
    return;
  }

  // The powers are float64, which some GPUs have little of: one thread computes them.
  __shared__ Factors shared;
  if (threadIdx.x == 0) shared = factors_of(arguments, *t.step);
  __syncthreads();
  const Factors factors = shared;
  const float scale = arguments.grad_scale != nullptr ? *arguments.grad_scale : 1;

  const bool vector = aligned(t.parameter, 16) && aligned(t.gradient, 16) && aligned(t.mean, 16) &&
                      aligned(t.squares, 16) && (!kAmsgrad || aligned(t.largest, 16)) &&
                      aligned(copy, 8);
  int64_t rest = begin;
  if (vector) {
    rest = begin + (end - begin) / kWidth * kWidth;
    for (int64_t at = begin + kWidth * threadIdx.x; at < rest; at += kWidth * kThreads) {
      update_four<T, kDecoupled, kAmsgrad>(t, copy, at, arguments, factors, scale);
    }
  }
  for (int64_t at = rest + threadIdx.x; at < end; at += kThreads) {
    update_one<T, kDecoupled, kAmsgrad>(t, copy, at, arguments, factors, scale);
  }
}

template <class T>
void launch(const Arguments& arguments, unsigned blocks, const AdamSettings& settings,
            Stream stream) {
  const auto with = [&](auto kernel) { kernel<<<blocks, kThreads, 0, stream>>>(arguments); };
  if (settings.decoupled) {
    settings.amsgrad ? with(adam_kernel<T, true, true>) : with(adam_kernel<T, true, false>);
  } else {
    settings.amsgrad ? with(adam_kernel<T, false, true>) : with(adam_kernel<T, false, false>);
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
    if (settings.copy_dtype == Dtype::kHalf) {
      launch<__half>(arguments, blocks, settings, stream);
    } else {
      launch<__nv_bfloat16>(arguments, blocks, settings, stream);
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
