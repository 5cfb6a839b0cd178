// Matrix products of 16-bit tensors by cuBLASLt: with bias, tanh GELU or its derivative and a
// factor in the same pass, float32 or 16-bit results, and, where asked for, the algorithm that is
// measured to be the best.
//
//   if (cuda::gemm({matrix, weight.t(), rows, bias})) return;  // else at::addmm_out(rows, ...)
//
// Which algorithm: cuBLASLt proposes up to 24 for a problem (sizes, strides, dtypes, alignment
// and what is fused), its guess of the best first. kMeasured times them, and on Hopper tiles that
// it seldom proposes, on the operands the first time that a problem is met, which waits for the
// device up to a second or two, and keeps for the process the one with the least time, weighed by
// what it takes of a card at the limit of its power, where training keeps it. Two algorithms may
// sum in different orders, so two runs, or two ranks, may differ in last bits. kHeuristic always
// takes the first, and so does kMeasured under deterministic algorithms (at::Context) and, for a
// problem not met before, while a graph is recorded.
//
// Results depend on the operands and the algorithm alone: sums over k are float32, also where an
// algorithm splits them. Any thread, on the current stream.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

namespace lightning::cuda {

enum class GemmMode { kOff, kHeuristic, kMeasured };

// Holds for the process. At first what the environment's LIGHTNING_GEMM says: off, heuristic or
// measured; heuristic where it says nothing. The Trainer's benchmark flag makes it measured.
// Errors: MisconfigurationError where it says something else.
GemmMode gemm_mode();
void set_gemm_mode(GemmMode mode);
// What the Trainer's benchmark flag asks for: kMeasured or kHeuristic. What the environment says
// stands.
void choose_gemm_mode(bool benchmark);

// out = factor a b, then what is asked for: + out, + bias over rows, the GELU of that, or times the
// derivative of the GELU.
struct Gemm {
  at::Tensor a;                // [m, k], float16 or bfloat16; rows or columns contiguous
  at::Tensor b;                // [k, n], of a's dtype; rows or columns contiguous
  at::Tensor out;              // [m, n], of a's dtype or float32; rows contiguous
  at::Tensor bias{};           // [n], of a's dtype, or undefined
  bool accumulate = false;     // adds to what `out` holds; without bias and GELU
  bool gelu = false;           // by tanh, of the float32 sum; out in 16 bits, as with a bias
  at::Tensor aux{};            // [m, n], as `out`. With gelu, where defined: gets what precedes it
  bool gelu_gradient = false;  // times the derivative of the GELU by tanh at `aux`; neither bias
                               // nor sum, out in 16 bits
  at::Tensor factor{};         // one float32 on the device, or undefined for 1; without the rest
};

// Whether gemm() may run it: a build with cuBLASLt, a GPU of Ampere or later, not switched off, and
// operands as above whose addresses are multiples of 16 bytes and whose strides are multiples of 8
// elements.
bool can_use(const Gemm& problem);

// Launches it. False, and nothing written, where can_use() says no or cuBLASLt has no algorithm.
// `out` and `aux` overlap no operand. A workspace of at most 32 MiB comes from LibTorch's allocator
// for the call, so it belongs to the stream or, while a graph is recorded, to the graph.
// at::RecordFunction sees it as lightning::gemm(a, b). Errors: c10::Error with cuBLASLt's words.
bool gemm(const Gemm& problem);

// Of each algorithm that kMeasured tries, cuBLASLt's proposals first and in its order: milliseconds
// times a measure of its energy (gemm.cc), infinity for one that fails or is far from the best.
// Empty where gemm() would not run. Overwrites `out`, unless the problem accumulates, and `aux`;
// waits for the device. Not while a graph is recorded.
std::vector<float> gemm_costs(const Gemm& problem);

// Which of these kMeasured takes: the least, but the first unless it is beaten clearly, so that
// noise decides nothing.
size_t cheapest_gemm(const std::vector<float>& costs);

}  // namespace lightning::cuda
