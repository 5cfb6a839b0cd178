#include <algorithm>
#include <array>
#include <atomic>
#include <cfloat>
#include <cstdint>
#include <type_traits>

#include "lightning/cuda/class_of.cuh"
#include "lightning/cuda/cross_entropy.h"
#include "lightning/cuda/elements.cuh"

namespace lightning::cuda {
namespace {

constexpr int kWarp = 32;
// More in a block would cost more in its merges than they hide: 1.9 ms instead of 1.6 for 32,768
// rows of 50,304 bfloat16 on an H200.
constexpr int kMostThreads = 512;
constexpr int kVectorBytes = 16;
constexpr int64_t kMostBlocks = (int64_t{1} << 31) - 1;
constexpr int64_t kFewBlocks = 528;  // of what mostly ends at once

template <class T>
using Vector = Pack<T, kPerLoad<T>>;

// e^x for a difference of logits. The difference is taken first, so that large logits lose nothing.
__device__ inline float exp_of(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x * 1.44269504f));
  return result;
}

__device__ inline void copy_async(void* shared, const void* global) {
  const auto place = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(place), "l"(global) : "memory");
}

// The calling thread's own copies have arrived.
__device__ inline void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// What the softmax of a part of a row is made of. The largest starts finite, so that a part of
// nothing but -infinity adds 0; a whole row of it ends in NaN, as ATen's.
struct Part {
  float largest = -FLT_MAX;
  float sum = 0;    // of exp(logit - largest)
  float total = 0;  // of the logits, for label smoothing
};

__device__ inline Part merged(const Part& a, const Part& b) {
  Part part;
  part.largest = fmaxf(a.largest, b.largest);
  part.sum = a.sum * exp_of(a.largest - part.largest) + b.sum * exp_of(b.largest - part.largest);
  part.total = a.total + b.total;
  return part;
}

template <int N, bool kSmooth>
__device__ inline void add(Part& part, const float (&logits)[N]) {
  float largest = logits[0];
#pragma unroll
  for (int i = 1; i < N; ++i) largest = fmaxf(largest, logits[i]);
  if (largest > part.largest) {
    part.sum *= exp_of(part.largest - largest);
    part.largest = largest;
  }
#pragma unroll
  for (int i = 0; i < N; ++i) {
    part.sum += exp_of(logits[i] - part.largest);
    if (kSmooth) part.total += logits[i];
  }
}

// The merged parts of all threads, in every thread. Barriers inside: the whole block calls it.
__device__ inline Part merged_over_block(Part part) {
  __shared__ Part of_warps[kMostThreads / kWarp];
#pragma unroll
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) {
    Part other;
    other.largest = __shfl_xor_sync(0xffffffffu, part.largest, lanes);
    other.sum = __shfl_xor_sync(0xffffffffu, part.sum, lanes);
    other.total = __shfl_xor_sync(0xffffffffu, part.total, lanes);
    part = merged(part, other);
  }
  const int warps = static_cast<int>(blockDim.x) / kWarp;
  __syncthreads();  // what is in of_warps has been read, and of the row what others overwrite
  if (warps == 1) return part;
  if (threadIdx.x % kWarp == 0) of_warps[threadIdx.x / kWarp] = part;
  __syncthreads();
  Part all = of_warps[0];
  for (int warp = 1; warp < warps; ++warp) all = merged(all, of_warps[warp]);
  return all;
}

// A row as scalars up to the first 16-byte boundary, vectors, scalars; all scalars where the
// other array's row does not share the boundaries.
template <class T>
struct Split {
  int head;
  int vectors;
  int tail;  // where the scalars after the vectors begin

  __device__ Split(const T* row, const T* other, int classes) {
    const auto address = reinterpret_cast<std::uintptr_t>(row);
    const auto other_address = reinterpret_cast<std::uintptr_t>(other);
    const int before = static_cast<int>((kVectorBytes - address % kVectorBytes) % kVectorBytes /
                                        static_cast<int>(sizeof(T)));
    const bool shared = (address - other_address) % kVectorBytes == 0;
    head = shared ? min(before, classes) : classes;
    vectors = (classes - head) / kPerLoad<T>;
    tail = head + vectors * kPerLoad<T>;
  }
};

// Calls f(index) for this thread's scalars: those of the head, then those of the tail.
template <class T, class F>
__device__ inline void for_scalars(const Split<T>& split, int classes, const F& f) {
  for (int i = threadIdx.x; i < split.head; i += blockDim.x) f(i);
  for (int i = split.tail + threadIdx.x; i < classes; i += blockDim.x) f(i);
}

template <class T>
__device__ inline void load(const Vector<T>& from, float (&values)[kPerLoad<T>]) {
  const Vector<T> vector = from;
#pragma unroll
  for (int i = 0; i < kPerLoad<T>; ++i) values[i] = to_float(vector.elements[i]);
}

// Calls f(index, logits) for this thread's vectors in [begin, end). Several are on their way at
// once, without which memory is waited for; f may write over those that it is given.
template <class T, class F>
__device__ inline void for_vectors(const Vector<T>* vectors, int begin, int end, const F& f) {
  constexpr int kAhead = 4;
  const int step = static_cast<int>(blockDim.x);
  float values[kPerLoad<T>];
  int i = begin + static_cast<int>(threadIdx.x);
  for (; i + (kAhead - 1) * step < end; i += kAhead * step) {
    Vector<T> ahead[kAhead];
#pragma unroll
    for (int j = 0; j < kAhead; ++j) ahead[j] = vectors[i + j * step];
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
      load(ahead[j], values);
      f(i + j * step, values);
    }
  }
  for (; i < end; i += step) {
    load(vectors[i], values);
    f(i, values);
  }
}

// From logits to the gradient of a row's loss.
struct Gradient {
  float largest;
  float inverse;  // of the sum
  float others;   // what label smoothing wants of every class
  float wanted;   // what the target's class is wanted to have beyond that
  float factor;
  int target;

  __device__ float operator()(float logit, int index) const {
    return (exp_of(logit - largest) * inverse - others - (index == target ? wanted : 0.0f)) *
           factor;
  }
};

template <class T>
__device__ inline void write(const Gradient& gradient, const float (&logits)[kPerLoad<T>],
                             int first, Vector<T>& place) {
  constexpr int kN = kPerLoad<T>;
  float values[kN];
#pragma unroll
  for (int i = 0; i < kN; ++i) {
    values[i] = exp_of(logits[i] - gradient.largest) * gradient.inverse - gradient.others;
  }
  // Only one vector of the row holds the target.
  if (static_cast<unsigned>(gradient.target - first) < static_cast<unsigned>(kN)) {
#pragma unroll
    for (int i = 0; i < kN; ++i) {
      if (first + i == gradient.target) values[i] -= gradient.wanted;
    }
  }
  Vector<T> vector;
#pragma unroll
  for (int i = 0; i < kN; ++i) vector.elements[i] = from_float<T>(values[i] * gradient.factor);
  place = vector;
}

template <class T>
__device__ inline void write_zeros(T* row, int classes) {
  const Split<T> split(row, row, classes);
  auto* vectors = reinterpret_cast<Vector<T>*>(row + split.head);
  Vector<T> zeros;
#pragma unroll
  for (int i = 0; i < kPerLoad<T>; ++i) zeros.elements[i] = from_float<T>(0.0f);
  for (int i = threadIdx.x; i < split.vectors; i += blockDim.x) vectors[i] = zeros;
  for_scalars(split, classes, [&](int i) { row[i] = from_float<T>(0.0f); });
}

// A block takes whole rows. `kept` vectors of a row stay in shared memory between the two passes;
// each thread reads and writes the same elements in both, so no thread waits for another's copy
// and the gradient may lie over the logits.
template <class T, bool kSmooth>
__global__ void __launch_bounds__(kMostThreads, 2)
    forward(CrossEntropyForward arguments, int kept) {
  constexpr int kN = kPerLoad<T>;
  extern __shared__ uint4 memory[];
  auto* kept_vectors = reinterpret_cast<Vector<T>*>(memory);
  const CrossEntropyRows& rows = arguments.rows;
  const int classes = static_cast<int>(rows.classes);
  if (arguments.only_if != nullptr && *arguments.only_if == 0) return;

  for (int64_t row = blockIdx.x; row < rows.rows; row += gridDim.x) {
    const int64_t target_index = rows.targets[row];
    const T* logits = static_cast<const T*>(rows.logits) + row * rows.row_stride;
    T* gradient = arguments.gradient == nullptr
                      ? nullptr
                      : static_cast<T*>(arguments.gradient) + row * rows.row_stride;
    if (target_index == rows.ignore_index) {
      if (threadIdx.x == 0) arguments.losses[row] = 0;
      if (gradient != nullptr) write_zeros(gradient, classes);
      continue;
    }
    const int target = class_of(target_index, classes);
    // The gradient may lie over the logits: it is written after the barriers of the merge.
    const float target_logit = to_float(logits[target]);

    const Split<T> split(logits, gradient == nullptr ? logits : gradient, classes);
    const auto* vectors = reinterpret_cast<const Vector<T>*>(logits + split.head);
    const int in_memory = min(kept, split.vectors);
    for (int i = threadIdx.x; i < in_memory; i += blockDim.x) {
      copy_async(kept_vectors + i, vectors + i);
    }
    Part part;
    for_scalars(split, classes, [&](int i) {
      const float logit[1] = {to_float(logits[i])};
      add<1, kSmooth>(part, logit);
    });
    for_vectors(vectors, in_memory, split.vectors,
                [&](int, const float(&values)[kN]) { add<kN, kSmooth>(part, values); });
    wait_for_copies();
    for (int i = threadIdx.x; i < in_memory; i += blockDim.x) {
      float values[kN];
      load(kept_vectors[i], values);
      add<kN, kSmooth>(part, values);
    }
    part = merged_over_block(part);
    const float inverse = 1.0f / part.sum;
    const float smoothing = kSmooth ? rows.label_smoothing : 0.0f;
    if (threadIdx.x == 0) {
      const float log_sum = logf(part.sum);
      float loss = log_sum + (part.largest - target_logit);
      if (kSmooth) {
        const float mean = log_sum + (part.largest - part.total / static_cast<float>(classes));
        loss = (1.0f - smoothing) * loss + smoothing * mean;
      }
      arguments.losses[row] = loss;
      if (arguments.statistics != nullptr) {
        arguments.statistics[row * kRowStatistics] = part.largest;
        arguments.statistics[row * kRowStatistics + 1] = inverse;
      }
    }
    if (gradient == nullptr) continue;

    const Gradient to_gradient{part.largest,     inverse, smoothing / static_cast<float>(classes),
                               1.0f - smoothing, 1.0f,    target};
    auto* gradients = reinterpret_cast<Vector<T>*>(gradient + split.head);
    const auto write_vector = [&](int i, const float(&values)[kN]) {
      write(to_gradient, values, split.head + i * kN, gradients[i]);
    };
    // What was read last is in the cache.
    for_vectors(vectors, in_memory, split.vectors, write_vector);
    for (int i = threadIdx.x; i < in_memory; i += blockDim.x) {
      float values[kN];
      load(kept_vectors[i], values);
      write_vector(i, values);
    }
    for_scalars(split, classes,
                [&](int i) { gradient[i] = from_float<T>(to_gradient(to_float(logits[i]), i)); });
  }
}

template <class T>
__global__ void __launch_bounds__(kMostThreads, 2) backward(CrossEntropyBackward arguments) {
  constexpr int kN = kPerLoad<T>;
  const CrossEntropyRows& rows = arguments.rows;
  const int classes = static_cast<int>(rows.classes);

  for (int64_t row = blockIdx.x; row < rows.rows; row += gridDim.x) {
    const int64_t target = rows.targets[row];
    const T* logits = static_cast<const T*>(rows.logits) + row * rows.row_stride;
    T* gradient = static_cast<T*>(arguments.gradient) + row * arguments.gradient_stride;
    if (target == rows.ignore_index) {
      write_zeros(gradient, classes);
      continue;
    }
    float factor = arguments.upstream[row * arguments.upstream_stride];
    if (arguments.factor != nullptr) factor *= *arguments.factor;
    const Gradient to_gradient{arguments.statistics[row * kRowStatistics],
                               arguments.statistics[row * kRowStatistics + 1],
                               rows.label_smoothing / static_cast<float>(classes),
                               1.0f - rows.label_smoothing,
                               factor,
                               static_cast<int>(target)};
    const Split<T> split(logits, gradient, classes);
    const auto* vectors = reinterpret_cast<const Vector<T>*>(logits + split.head);
    auto* gradients = reinterpret_cast<Vector<T>*>(gradient + split.head);
    for_vectors(vectors, 0, split.vectors, [&](int i, const float(&values)[kN]) {
      write(to_gradient, values, split.head + i * kN, gradients[i]);
    });
    for_scalars(split, classes,
                [&](int i) { gradient[i] = from_float<T>(to_gradient(to_float(logits[i]), i)); });
  }
}

// One block, so that the order of the sum is always the same.
__global__ void __launch_bounds__(kMostThreads) sum(CrossEntropySum arguments) {
  __shared__ double sums[kMostThreads / kWarp];
  __shared__ long long counts[kMostThreads / kWarp];
  double sum = 0;
  long long count = 0;
  for (int64_t row = threadIdx.x; row < arguments.rows; row += blockDim.x) {
    sum += arguments.losses[row];
    count += arguments.targets[row] == arguments.ignore_index ? 0 : 1;
  }
#pragma unroll
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) {
    sum += __shfl_xor_sync(0xffffffffu, sum, lanes);
    count += __shfl_xor_sync(0xffffffffu, count, lanes);
  }
  if (threadIdx.x % kWarp == 0) {
    sums[threadIdx.x / kWarp] = sum;
    counts[threadIdx.x / kWarp] = count;
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int warp = 1; warp < static_cast<int>(blockDim.x) / kWarp; ++warp) {
    sum += sums[warp];
    count += counts[warp];
  }
  const auto of = static_cast<double>(count);
  *arguments.loss = static_cast<float>(arguments.mean ? sum / of : sum);
  if (arguments.mean) {
    *arguments.factor = count == 0 ? 0.0f : static_cast<float>(1 / of);
  } else {
    *arguments.factor = 1.0f;
  }
}

// Four vectors for each thread, where a row has as many.
int threads_for(int64_t classes, int per_vector) {
  const int64_t wanted = classes / per_vector / 4;
  const int64_t warps = (wanted + kWarp - 1) / kWarp;
  return static_cast<int>(std::clamp<int64_t>(warps * kWarp, kWarp, kMostThreads));
}

unsigned blocks_for(int64_t rows, int64_t most = kMostBlocks) {
  return static_cast<unsigned>(std::min(rows, most));
}

// Bytes of a row that a block may keep, so that two blocks share a multiprocessor: one computes
// while the other's row arrives. CUDA takes 1 KiB of each block's.
int64_t bytes_to_keep() {
  constexpr int kOwn = 1024 + 512;
  static std::array<std::atomic<int>, 64> known{};
  int device = 0;
  check(cudaGetDevice(&device), "a device query");
  auto& place = known[static_cast<unsigned>(device) % known.size()];
  if (place != 0) return place;
  int bytes = 0;
  check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device),
        "a device query");
  return place = (bytes / 2 - kOwn) / kVectorBytes * kVectorBytes;
}

template <class T, bool kSmooth>
void launch_forward(const CrossEntropyForward& arguments, Stream stream) {
  const auto& rows = arguments.rows;
  // Without a gradient nothing is read twice.
  const int64_t bytes =
      arguments.gradient == nullptr
          ? 0
          : std::min(bytes_to_keep(),
                     rows.classes * static_cast<int64_t>(sizeof(T)) / kVectorBytes * kVectorBytes);
  // What CUDA allows unasked.
  if (bytes > 48 * 1024) {
    check(cudaFuncSetAttribute(forward<T, kSmooth>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(bytes)),
          "shared memory for the cross-entropy");
  }
  forward<T, kSmooth>
      <<<blocks_for(rows.rows, arguments.only_if == nullptr ? kMostBlocks : kFewBlocks),
         threads_for(rows.classes, kPerLoad<T>), static_cast<size_t>(bytes), stream>>>(
          arguments, static_cast<int>(bytes / kVectorBytes));
  check_launch("the cross-entropy");
}

}  // namespace

void cross_entropy_forward(const CrossEntropyForward& arguments, Stream stream) {
  if (arguments.rows.rows == 0) return;
  with_type(arguments.rows.dtype, [&](auto* of) {
    using T = std::remove_pointer_t<decltype(of)>;
    arguments.rows.label_smoothing == 0 ? launch_forward<T, false>(arguments, stream)
                                        : launch_forward<T, true>(arguments, stream);
  });
}

void cross_entropy_backward(const CrossEntropyBackward& arguments, Stream stream) {
  const auto& rows = arguments.rows;
  if (rows.rows == 0) return;
  with_type(rows.dtype, [&](auto* of) {
    using T = std::remove_pointer_t<decltype(of)>;
    backward<T>
        <<<blocks_for(rows.rows), threads_for(rows.classes, kPerLoad<T>), 0, stream>>>(arguments);
    check_launch("the gradient of the cross-entropy");
  });
}

void cross_entropy_sum(const CrossEntropySum& arguments, Stream stream) {
  const int64_t warps =
      std::min<int64_t>((arguments.rows + kWarp - 1) / kWarp, kMostThreads / kWarp);
  sum<<<1, static_cast<unsigned>(std::max<int64_t>(warps, 1) * kWarp), 0, stream>>>(arguments);
  check_launch("the sum of losses");
}

}  // namespace lightning::cuda
