#include "lightning/cuda/pack.h"
#include "lightning/cuda/row_slices.cuh"

namespace lightning::cuda {
namespace {

// What the kernel reads, for one element type.
template <class T>
struct Sources {
  const T* q;
  const T* k;
  const T* v;
  int heads;
  int kv_heads;
  int half;  // of a head
};

// A lane takes N pairs (i, i + half) of one head, so that it can turn them; its warp a row.
template <class T, int N>
__global__ void __launch_bounds__(kSliceLanes* kSliceWarps, 4)
    pack_kernel(Sources<T> from, T* __restrict__ packed, int64_t rows, int64_t time,
                const float* __restrict__ table, float* __restrict__ sums) {
  using P = Pack<T, N>;
  const int per_head = from.half / N, size = 2 * from.half;
  const int all_heads = from.heads + 2 * from.kv_heads;
  const int unit = static_cast<int>(blockIdx.x) * kSliceLanes + static_cast<int>(threadIdx.x);
  const bool inside = unit < all_heads * per_head;
  const int head = unit / per_head, first = (unit - head * per_head) * N;
  const int64_t width = static_cast<int64_t>(all_heads) * size;
  const int64_t column = static_cast<int64_t>(head) * size + first;
  float low[N] = {}, high[N] = {};
  if (inside) {
    const bool is_q = head < from.heads, is_k = !is_q && head < from.heads + from.kv_heads;
    const int before = is_q ? 0 : is_k ? from.heads : from.heads + from.kv_heads;
    const T* const source = (is_q   ? from.q
                             : is_k ? from.k
                                    : from.v) +
                            static_cast<int64_t>(head - before) * size + first;
    const int64_t stride = static_cast<int64_t>(is_q ? from.heads : from.kv_heads) * size;
    const bool turned = table != nullptr && (is_q || is_k);
    const int64_t step = static_cast<int64_t>(gridDim.y) * kSliceWarps;
    const int64_t start = static_cast<int64_t>(blockIdx.y) * kSliceWarps + threadIdx.y;
    const int64_t position_step = step % time;
    int64_t position = start % time;
#pragma unroll 2
    for (int64_t row = start; row < rows; row += step) {
      P a = *reinterpret_cast<const P*>(source + row * stride);
      P b = *reinterpret_cast<const P*>(source + row * stride + from.half);
      if (turned) {
        const float* const angles = table + (position * from.half + first) * 2;
#pragma unroll
        for (int i = 0; i < N; ++i) {
          const float2 turn = reinterpret_cast<const float2*>(angles)[i];
          const float x = to_float(a.elements[i]), y = to_float(b.elements[i]);
          a.elements[i] = from_float<T>(x * turn.x + y * turn.y);
          b.elements[i] = from_float<T>(y * turn.x - x * turn.y);
        }
        position += position_step;
        if (position >= time) position -= time;
      }
#pragma unroll
      for (int i = 0; i < N; ++i) {
        low[i] += to_float(a.elements[i]);
        high[i] += to_float(b.elements[i]);
      }
      T* const place = packed + row * width + column;
      *reinterpret_cast<P*>(place) = a;
      *reinterpret_cast<P*>(place + from.half) = b;
    }
  }
  if (sums == nullptr) return;  // the same for every thread
  float* const place = sums + blockIdx.y * width + column;
  leave_partials(low, inside, [&](int i) { return place + i; });
  leave_partials(high, inside, [&](int i) { return place + from.half + i; });
}

int64_t width_of(const PackHeads& arguments) {
  return (arguments.heads + 2 * arguments.kv_heads) * arguments.head_size;
}

template <class T, int N>
void launch(const PackHeads& arguments, Stream stream) {
  const int64_t width = width_of(arguments);
  const auto shape = row_slices(arguments.rows, width / 2 / N);
  const Sources<T> from{
      static_cast<const T*>(arguments.q),   static_cast<const T*>(arguments.k),
      static_cast<const T*>(arguments.v),   static_cast<int>(arguments.heads),
      static_cast<int>(arguments.kv_heads), static_cast<int>(arguments.head_size / 2)};
  pack_kernel<T, N><<<grid_of(shape), slice_threads(), 0, stream>>>(
      from, static_cast<T*>(arguments.packed), arguments.rows, arguments.time, arguments.table,
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
  if (arguments.rows == 0 || width_of(arguments) == 0) return;
  with_type(arguments.dtype, [&](auto* of) {
    using T = std::remove_pointer_t<decltype(of)>;
    const bool packed = (arguments.head_size / 2) % kPerLoad<T> == 0 &&
                        is_aligned(arguments.q, 16) && is_aligned(arguments.k, 16) &&
                        is_aligned(arguments.v, 16) && is_aligned(arguments.packed, 16);
    packed ? launch<T, kPerLoad<T>>(arguments, stream) : launch<T, 1>(arguments, stream);
  });
}

}  // namespace lightning::cuda
