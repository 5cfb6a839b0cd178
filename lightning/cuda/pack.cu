#include "lightning/cuda/pack.h"
#include "lightning/cuda/row_slices.cuh"

namespace lightning::cuda {
namespace {

// What the kernel reads, for one element type.
template <class T>
struct Sources {
  const T* q;  // null, as k and v, for what `packed` holds
  const T* k;
  const T* v;
  int heads;
  int kv_heads;
  int half;  // of a head
};

// A lane's pairs (i, i + half) of one head, from `first` on.
template <class T, int N>
struct Pairs {
  Pack<T, N> low, high;

  __device__ void read(const T* place, int half) {
    low = *reinterpret_cast<const Pack<T, N>*>(place);
    high = *reinterpret_cast<const Pack<T, N>*>(place + half);
  }

  __device__ void write(T* place, int half) const {
    *reinterpret_cast<Pack<T, N>*>(place) = low;
    *reinterpret_cast<Pack<T, N>*>(place + half) = high;
  }

  // By the angles' cosines and sines.
  __device__ void turn_back(const float2* angles) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float2 turn = angles[i];
      const float x = to_float(low.elements[i]), y = to_float(high.elements[i]);
      low.elements[i] = from_float<T>(x * turn.x + y * turn.y);
      high.elements[i] = from_float<T>(y * turn.x - x * turn.y);
    }
  }
};

// A lane takes N pairs of one of the first `taken` heads of a row, so that it can turn them; its
// warp a row. It reads the next one before it writes, which may go to where it read.
template <class T, int N>
__global__ void __launch_bounds__(kSliceLanes* kSliceWarps, 4)
    pack_kernel(Sources<T> from, T* packed, int64_t rows, int time, int taken,
                const float* __restrict__ table, float* __restrict__ sums) {
  const int half = from.half, per_head = half / N, size = 2 * half;
  const int unit = static_cast<int>(blockIdx.x) * kSliceLanes + static_cast<int>(threadIdx.x);
  const bool inside = unit < taken * per_head;
  const int head = unit / per_head, first = (unit - head * per_head) * N;
  const int64_t width = static_cast<int64_t>(from.heads + 2 * from.kv_heads) * size;
  const int64_t column = static_cast<int64_t>(head) * size + first;
  float low[N] = {}, high[N] = {};
  if (inside) {
    const bool is_q = head < from.heads, is_k = !is_q && head < from.heads + from.kv_heads;
    const bool in_place = from.q == nullptr, turned = table != nullptr && (is_q || is_k);
    const int before = is_q ? 0 : is_k ? from.heads : from.heads + from.kv_heads;
    const int64_t stride =
        in_place ? width : static_cast<int64_t>(is_q ? from.heads : from.kv_heads) * size;
    const int step = static_cast<int>(gridDim.y) * kSliceWarps;
    const int64_t start = static_cast<int64_t>(blockIdx.y) * kSliceWarps + threadIdx.y;
    T* target = packed + start * width + column;
    const T* source = in_place ? target
                               : (is_q   ? from.q
                                  : is_k ? from.k
                                         : from.v) +
                                     start * stride + (head - before) * size + first;
    const auto* const angles = reinterpret_cast<const float2*>(table) + first;
    const int position_step = step % time;
    int position = static_cast<int>(start % time);
    Pairs<T, N> next;
    int left = start < rows ? static_cast<int>((rows - start - 1) / step) + 1 : 0;
    if (left > 0) next.read(source, half);
    for (; left > 0; --left) {
      Pairs<T, N> pairs = next;
      source += step * stride;
      if (left > 1) next.read(source, half);
      if (turned) {
        pairs.turn_back(angles + static_cast<int64_t>(position) * half);
        position += position_step;
        if (position >= time) position -= time;
      }
#pragma unroll
      for (int i = 0; i < N; ++i) {
        low[i] += to_float(pairs.low.elements[i]);
        high[i] += to_float(pairs.high.elements[i]);
      }
      if (turned || !in_place) pairs.write(target, half);
      target += step * width;
    }
  }
  if (sums == nullptr) return;  // the same for every thread
  float* const place = sums + blockIdx.y * width + column;
  leave_partials(low, inside, [&](int i) { return place + i; });
  leave_partials(high, inside, [&](int i) { return place + half + i; });
}

int64_t width_of(const PackHeads& arguments) {
  return (arguments.heads + 2 * arguments.kv_heads) * arguments.head_size;
}

bool in_place(const PackHeads& arguments) { return arguments.q == nullptr; }

// The heads of a row that the kernel has to see.
int64_t taken_heads(const PackHeads& arguments) {
  const auto turned = arguments.heads + arguments.kv_heads;
  if (!in_place(arguments) || arguments.sums != nullptr) return turned + arguments.kv_heads;
  return arguments.table != nullptr ? turned : 0;
}

template <class T, int N>
void launch(const PackHeads& arguments, Stream stream) {
  const int64_t width = width_of(arguments), taken = taken_heads(arguments);
  const auto shape = row_slices(arguments.rows, taken * arguments.head_size / 2 / N);
  const Sources<T> from{
      static_cast<const T*>(arguments.q),   static_cast<const T*>(arguments.k),
      static_cast<const T*>(arguments.v),   static_cast<int>(arguments.heads),
      static_cast<int>(arguments.kv_heads), static_cast<int>(arguments.head_size / 2)};
  pack_kernel<T, N><<<grid_of(shape), slice_threads(), 0, stream>>>(
      from, static_cast<T*>(arguments.packed), arguments.rows, static_cast<int>(arguments.time),
      static_cast<int>(taken), arguments.table,
      partials_of(shape, arguments.sums, arguments.workspace));
  check_launch("the packing of gradients");
  finish_partials(shape, width, arguments.sums, arguments.workspace, stream);
}

}  // namespace

// In units of a pair of packs: as many slices as for half the columns, each a row of all of them.
int64_t pack_workspace(const PackHeads& arguments) {
  return 2 * slice_workspace(arguments.rows, width_of(arguments) / 2, arguments.dtype);
}

void pack_heads(const PackHeads& arguments, Stream stream) {
  if (arguments.rows == 0 || taken_heads(arguments) * arguments.head_size == 0) return;
  with_type(arguments.dtype, [&](auto* of) {
    using T = std::remove_pointer_t<decltype(of)>;
    const bool packed = (arguments.head_size / 2) % kPerLoad<T> == 0 &&
                        is_aligned(arguments.q, 16) && is_aligned(arguments.k, 16) &&
                        is_aligned(arguments.v, 16) && is_aligned(arguments.packed, 16);
    packed ? launch<T, kPerLoad<T>>(arguments, stream) : launch<T, 1>(arguments, stream);
  });
}

}  // namespace lightning::cuda
