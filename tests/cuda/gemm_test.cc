#include "lightning/cuda/gemm.h"

#include <torch/torch.h>

#include <catch2/catch.hpp>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <limits>
#include <string>
#include <vector>

#include "lightning/scope.h"
#include "lightning/step/graph_device.h"
#include "tests/nn/gradients.h"

#if __has_include(<c10/cuda/impl/cuda_cmake_macros.h>) && __has_include(<cuda_runtime_api.h>)
#include <c10/cuda/CUDAFunctions.h>
#define HAS_SYNC_DEBUG_MODE 1
#endif

using namespace lightning;
using namespace lightning::testing;
using cuda::Gemm;
using cuda::GemmMode;

namespace {

bool no_gpu() {
  if (torch::cuda::is_available()) return false;
  WARN("needs a GPU");
  return true;
}

Scope in_mode(GemmMode mode) {
  const auto before = cuda::gemm_mode();
  cuda::set_gemm_mode(mode);
  return scope_exit([before] { cuda::set_gemm_mode(before); });
}

at::Tensor on_gpu(at::IntArrayRef sizes, at::ScalarType dtype) {
  return at::randn(sizes, at::device(at::kCUDA).dtype(dtype));
}

// [rows, columns], with its rows or its columns contiguous.
at::Tensor factor(int64_t rows, int64_t columns, bool transposed, at::ScalarType dtype) {
  return transposed ? on_gpu({columns, rows}, dtype).t() : on_gpu({rows, columns}, dtype);
}

// Where nothing was written, NaN is left.
at::Tensor unwritten(int64_t rows, int64_t columns, at::ScalarType dtype) {
  return at::full({rows, columns}, std::numeric_limits<double>::quiet_NaN(),
                  at::device(at::kCUDA).dtype(dtype));
}

at::Tensor exact_product(const Gemm& g) {
  const auto product = at::mm(g.a.to(at::kDouble), g.b.to(at::kDouble));
  return g.bias.defined() ? product + g.bias.to(at::kDouble) : product;
}

// What rounding to the dtype once allows; for float32 what sums of thousands on tensor cores, which
// cut off instead of rounding, come to.
double one_rounding(at::ScalarType dtype) {
  if (dtype == at::kFloat) return 5e-5;
  return dtype == at::kHalf ? 5e-4 : 4e-3;
}

// The device's tanh is no better than this.
constexpr double kTanhError = 5e-4;

struct Sizes {
  int64_t m, n, k;
};

// Odd and small m, k and n that are no multiple of a tile.
const std::vector<Sizes> kSizes = {{1, 8, 8},         {3, 16, 40},       {77, 768, 768},
                                   {1001, 2304, 776}, {4096, 768, 3072}, {8, 3072, 1000}};

}  // namespace

TEST_CASE("gemm leaves alone what lies on no GPU", "[cuda]") {
  const auto a = at::ones({8, 8}, at::kBFloat16), out = at::zeros({8, 8}, at::kBFloat16);
  CHECK_FALSE(cuda::can_use({a, a, out}));
  CHECK_FALSE(cuda::gemm({a, a, out}));
  CHECK(cuda::gemm_costs({a, a, out}).empty());
  CHECK(out.count_nonzero().item<int64_t>() == 0);
  CHECK_FALSE(cuda::gemm({}));
}

TEST_CASE("the measured algorithm is the first unless another is clearly better", "[cuda]") {
  const auto failed = std::numeric_limits<float>::infinity();
  CHECK(cuda::cheapest_gemm({1.0f}) == 0);
  CHECK(cuda::cheapest_gemm({1.0f, 0.995f, 1.2f}) == 0);
  CHECK(cuda::cheapest_gemm({1.0f, 0.9f, 0.8f, 0.85f}) == 2);
  CHECK(cuda::cheapest_gemm({failed, 2.0f, failed}) == 1);
}

TEST_CASE("the mode of gemm is one switch", "[cuda]") {
  const auto before = cuda::gemm_mode();
  {
    const auto off = in_mode(GemmMode::kOff);
    CHECK(cuda::gemm_mode() == GemmMode::kOff);
  }
  CHECK(cuda::gemm_mode() == before);
}

TEST_CASE("on a GPU gemm is the product, rounded once, for any order of the factors",
          "[cuda][gpu]") {
  if (no_gpu()) return;
  torch::manual_seed(1);
  const auto mode = in_mode(GENERATE(GemmMode::kHeuristic, GemmMode::kMeasured));
  for (const auto dtype : {at::kBFloat16, at::kHalf}) {
    for (const auto out_dtype : {dtype, at::kFloat}) {
      for (const auto& [m, n, k] : kSizes) {
        for (const bool a_transposed : {false, true}) {
          for (const bool b_transposed : {false, true}) {
            const Gemm g{factor(m, k, a_transposed, dtype), factor(k, n, b_transposed, dtype),
                         unwritten(m, n, out_dtype)};
            CAPTURE(dtype, out_dtype, m, n, k, a_transposed, b_transposed);
            if (a_transposed && m % 8 != 0 && k > 1) {
              CHECK_FALSE(cuda::can_use(g));  // its columns lie m elements apart
              continue;
            }
            REQUIRE(cuda::gemm(g));
            CHECK(relative_error(g.out, exact_product(g)) <= one_rounding(out_dtype));
          }
        }
      }
    }
  }
}

TEST_CASE("on a GPU gemm adds a bias and applies GELU in the same pass", "[cuda][gpu]") {
  if (no_gpu()) return;
  torch::manual_seed(2);
  for (const auto dtype : {at::kBFloat16, at::kHalf}) {
    for (const auto& [m, n, k] : kSizes) {
      for (const bool has_bias : {true, false}) {
        CAPTURE(dtype, m, n, k, has_bias);
        const auto scale = 1 / std::sqrt(static_cast<double>(k));
        Gemm g{on_gpu({m, k}, dtype) * scale, factor(k, n, true, dtype), unwritten(m, n, dtype)};
        if (has_bias) g.bias = on_gpu({n}, dtype);
        REQUIRE(cuda::gemm(g));
        const auto before = exact_product(g);
        CHECK(relative_error(g.out, before) <= one_rounding(dtype));
        const auto rounded = g.out.clone();

        g.gelu = true;
        g.out = unwritten(m, n, dtype);
        REQUIRE(cuda::gemm(g));
        const auto expected = at::gelu(before, "tanh");
        const auto allowed = one_rounding(dtype) + kTanhError;
        CHECK(relative_error(g.out, expected) <= allowed);
        const auto of_rounded = at::gelu(rounded.to(at::kDouble), "tanh");
        CHECK(relative_error(g.out, of_rounded) <= allowed + 1.2 * one_rounding(dtype));

        g.aux = unwritten(m, n, dtype);
        g.out = unwritten(m, n, dtype);
        REQUIRE(cuda::gemm(g));
        CHECK(relative_error(g.out, expected) <= allowed);
        CHECK(relative_error(g.aux, before) <= one_rounding(dtype));
        // Another algorithm may sum in another order, which now and then rounds the other way.
        CHECK(relative_error(g.aux, rounded) <= 0.5 * one_rounding(dtype));
      }
    }
  }
}

TEST_CASE("on a GPU gemm multiplies by GELU's derivative in the same pass", "[cuda][gpu]") {
  if (no_gpu()) return;
  torch::manual_seed(6);
  const auto mode = in_mode(GENERATE(GemmMode::kHeuristic, GemmMode::kMeasured));
  for (const auto dtype : {at::kBFloat16, at::kHalf}) {
    for (const auto& [m, n, k] : kSizes) {
      CAPTURE(dtype, m, n, k);
      const auto scale = 1 / std::sqrt(static_cast<double>(k));
      Gemm g{on_gpu({m, k}, dtype) * scale, factor(k, n, false, dtype), unwritten(m, n, dtype)};
      g.gelu_gradient = true;
      CHECK_FALSE(cuda::can_use(g));  // the derivative at what?
      g.aux = on_gpu({m, n}, dtype);
      REQUIRE(cuda::gemm(g));
      const auto before = g.aux.to(at::kDouble).requires_grad_();
      at::gelu(before, "tanh").backward(exact_product(g));
      CHECK(relative_error(g.out, before.grad()) <= one_rounding(dtype) + 2 * kTanhError);
    }
  }
}

TEST_CASE("on a GPU gemm takes a factor from the device", "[cuda][gpu]") {
  if (no_gpu()) return;
  torch::manual_seed(7);
  const auto mode = in_mode(GENERATE(GemmMode::kHeuristic, GemmMode::kMeasured));
  for (const auto dtype : {at::kBFloat16, at::kHalf}) {
    for (const auto out_dtype : {dtype, at::kFloat}) {
      for (const auto& [m, n, k] : kSizes) {
        CAPTURE(dtype, out_dtype, m, n, k);
        Gemm g{on_gpu({m, k}, dtype), factor(k, n, true, dtype), unwritten(m, n, out_dtype)};
        g.factor = at::full({}, -0.37, at::device(at::kCUDA).dtype(at::kFloat));
        const auto expected = exact_product(g) * g.factor.to(at::kDouble);
        REQUIRE(cuda::gemm(g));
        CHECK(relative_error(g.out, expected) <= one_rounding(out_dtype));
        g.factor = g.factor * 2;
        REQUIRE(cuda::gemm(g));
        CHECK(relative_error(g.out, expected * 2) <= one_rounding(out_dtype));
        g.factor = at::ones({}, at::kFloat);
        CHECK_FALSE(cuda::can_use(g));  // of the host
      }
    }
  }
}

TEST_CASE("on a GPU gemm adds to what is there once, also when it is measured", "[cuda][gpu]") {
  if (no_gpu()) return;
  torch::manual_seed(3);
  const auto mode = in_mode(GENERATE(GemmMode::kHeuristic, GemmMode::kMeasured));
  for (const auto dtype : {at::kFloat, at::kBFloat16}) {
    for (const int64_t rows : {501, 8000}) {
      CAPTURE(dtype, rows);
      Gemm g{factor(768, rows, true, at::kBFloat16), on_gpu({rows, 256}, at::kBFloat16),
             on_gpu({768, 256}, dtype)};
      g.accumulate = true;
      const auto expected = exact_product(g) + g.out.to(at::kDouble);
      const auto twice = exact_product(g) + expected;
      REQUIRE(cuda::gemm(g));
      CHECK(relative_error(g.out, expected) <= one_rounding(dtype));
      REQUIRE(cuda::gemm(g));
      CHECK(relative_error(g.out, twice) <= 2 * one_rounding(dtype));
    }
  }
}

TEST_CASE("on a GPU gemm reads and writes parts of wider matrices", "[cuda][gpu]") {
  if (no_gpu()) return;
  torch::manual_seed(4);
  const auto wide = on_gpu({100, 2304}, at::kBFloat16), weight = on_gpu({256, 768}, at::kBFloat16);
  const auto all = unwritten(100, 512, at::kBFloat16);
  const Gemm g{wide.narrow(1, 768, 768), weight.t(), all.narrow(1, 256, 256)};
  REQUIRE(cuda::gemm(g));
  CHECK(relative_error(g.out, exact_product(g)) <= one_rounding(at::kBFloat16));
  CHECK(at::isnan(all.narrow(1, 0, 256)).all().item<bool>());
}

TEST_CASE("on a GPU gemm refuses what cuBLASLt would read slowly or not at all", "[cuda][gpu]") {
  if (no_gpu()) return;
  const auto dtype = at::kBFloat16;
  const auto a = on_gpu({16, 64}, dtype), b = on_gpu({64, 32}, dtype), bias = on_gpu({32}, dtype);
  const auto out = on_gpu({16, 32}, dtype), floats = on_gpu({16, 32}, at::kFloat);
  REQUIRE(cuda::can_use({a, b, out}));
  REQUIRE(cuda::can_use({a, b, floats, {}, true}));
  REQUIRE(cuda::can_use({a, b, out, bias, false, true, at::empty_like(out)}));
  CHECK_FALSE(cuda::can_use({a, on_gpu({65, 32}, dtype), out}));
  CHECK_FALSE(cuda::can_use({a, b.to(at::kHalf), out}));
  CHECK_FALSE(cuda::can_use({a.to(at::kFloat), b.to(at::kFloat), floats}));
  CHECK_FALSE(cuda::can_use({a, b, out.cpu()}));
  CHECK_FALSE(cuda::can_use({a, on_gpu({64, 33}, dtype), on_gpu({16, 33}, dtype)}));
  CHECK_FALSE(cuda::can_use({on_gpu({16, 72}, dtype).narrow(1, 4, 64), b, out}));
  CHECK_FALSE(cuda::can_use({on_gpu({1, 64}, dtype).expand({16, 64}), b, out}));
  CHECK_FALSE(cuda::can_use({on_gpu({0, 64}, dtype), b, on_gpu({0, 32}, dtype)}));
  CHECK_FALSE(cuda::can_use({a, b, floats, bias}));
  CHECK_FALSE(cuda::can_use({a, b, out, bias, true}));
  CHECK_FALSE(cuda::can_use({a, b, out, on_gpu({31}, dtype)}));
  CHECK_FALSE(cuda::can_use({a, b, out, {}, false, false, at::empty_like(out)}));
  const auto off = in_mode(GemmMode::kOff);
  CHECK_FALSE(cuda::can_use({a, b, out}));
}

TEST_CASE("on a GPU gemm under deterministic algorithms gives the same bits", "[cuda][gpu]") {
  if (no_gpu()) return;
  torch::manual_seed(5);
  const Gemm g{factor(768, 8192, true, at::kBFloat16), on_gpu({8192, 768}, at::kBFloat16),
               unwritten(768, 768, at::kFloat)};
  const auto mode = in_mode(GemmMode::kHeuristic);
  REQUIRE(cuda::gemm(g));
  const auto first = g.out.clone();
  cuda::set_gemm_mode(GemmMode::kMeasured);
  REQUIRE(cuda::gemm(g));
  at::globalContext().setDeterministicAlgorithms(true, /*warn_only=*/false);
  const Scope after =
      scope_exit([] { at::globalContext().setDeterministicAlgorithms(false, false); });
  for (int i = 0; i < 5; ++i) {
    REQUIRE(cuda::gemm(g));
    CHECK(at::equal(g.out, first));
  }
}

TEST_CASE("on a GPU gemm can be recorded, whether its problem was met before or not",
          "[cuda][gpu]") {
  if (no_gpu()) return;
  if (std::getenv("PYTORCH_NO_CUDA_MEMORY_CACHING") != nullptr) return;  // cannot be recorded
  REQUIRE(cuda_graph_device());
  torch::manual_seed(6);
  const auto device = cuda_graph_device()(c10::Device(c10::kCUDA, 0));
  const Gemm met{on_gpu({520, 768}, at::kBFloat16), factor(768, 136, true, at::kBFloat16),
                 unwritten(520, 136, at::kBFloat16), on_gpu({136}, at::kBFloat16)};
  const Gemm unmet{factor(136, 5000, true, at::kBFloat16), on_gpu({5000, 128}, at::kBFloat16),
                   unwritten(136, 128, at::kFloat)};
  device->warm_up([&] { REQUIRE(cuda::gemm(met)); });
  const auto work = device->record([&] {
    REQUIRE(cuda::gemm(met));
    REQUIRE(cuda::gemm(unmet));
  });
  for (int i = 0; i < 2; ++i) {
    met.a.normal_();
    unmet.a.normal_();
    met.out.zero_();
    unmet.out.zero_();
    work->launch();
    CHECK(relative_error(met.out, exact_product(met)) <= one_rounding(at::kBFloat16));
    CHECK(relative_error(unmet.out, exact_product(unmet)) <= one_rounding(at::kFloat));
  }
}

TEST_CASE("on a GPU gemm is measured even where LibTorch would refuse to wait", "[cuda][gpu]") {
  if (no_gpu()) return;
#ifdef HAS_SYNC_DEBUG_MODE
  const Gemm g{on_gpu({264, 768}, at::kBFloat16), on_gpu({768, 392}, at::kBFloat16),
               unwritten(264, 392, at::kBFloat16)};
  auto& state = c10::cuda::warning_state();
  state.set_sync_debug_mode(c10::cuda::SyncDebugMode::L_ERROR);
  const Scope after =
      scope_exit([&] { state.set_sync_debug_mode(c10::cuda::SyncDebugMode::L_DISABLED); });
  bool ran = false;
  CHECK_NOTHROW(ran = cuda::gemm(g));
  CHECK(ran);
#endif
}

namespace {

// Milliseconds of one call, of many in a row.
double milliseconds(const std::function<void()>& call) {
  constexpr int kCalls = 20;
  for (int i = 0; i < 3; ++i) call();
  torch::cuda::synchronize();
  const auto start = std::chrono::steady_clock::now();
  for (int i = 0; i < kCalls; ++i) call();
  torch::cuda::synchronize();
  const std::chrono::duration<double, std::milli> spent = std::chrono::steady_clock::now() - start;
  return spent.count() / kCalls;
}

struct Compared {
  std::string name;
  Gemm problem;
  std::function<void()> aten;
  double calls = 12;  // of a step of GPT-2
};

// One layer of GPT-2's: forward, and the gradients of its input and its weight.
void add_layer(std::vector<Compared>& to, const std::string& name, int64_t rows, int64_t in,
               int64_t out, bool gelu, double calls) {
  const auto dtype = at::kBFloat16;
  const bool has_bias = calls > 1;  // the head has none
  const auto x = on_gpu({rows, in}, dtype), weight = on_gpu({out, in}, dtype) * 0.02;
  const auto y = at::empty({rows, out}, x.options()), gradient = on_gpu({rows, out}, dtype);
  const auto bias = has_bias ? on_gpu({out}, dtype) : at::Tensor();
  const auto aten = [=] {
    auto rows_out = y;
    if (has_bias) {
      at::addmm_out(rows_out, bias, x, weight.t());
    } else {
      at::mm_out(rows_out, x, weight.t());
    }
  };
  to.push_back({name + " forward", {x, weight.t(), y, bias}, aten, calls});
  if (gelu) {
    const auto after = at::empty_like(y);
    to.back().name += " (no GELU)";
    to.back().calls = 0;
    to.push_back({name + " forward, GELU",
                  {x, weight.t(), after, bias, false, true, y},
                  [=] {
                    aten();
                    auto result = after;
                    at::gelu_out(result, y, "tanh");
                  },
                  calls});
    to.push_back({name + " forward, GELU, no aux",
                  {x, weight.t(), after, bias, false, true},
                  to.back().aten,
                  0});
  }
  const auto dx = at::empty_like(x);
  to.push_back({name + " dX",
                {gradient, weight, dx},
                [=] {
                  auto result = dx;
                  at::mm_out(result, gradient, weight);
                },
                calls});
  const auto dw = at::empty({out, in}, x.options().dtype(at::kFloat));
  to.push_back(
      {name + " dW", {gradient.t(), x, dw}, [=] { at::mm(gradient.t(), x, at::kFloat); }, calls});
}

}  // namespace

TEST_CASE("on a GPU gemm's times for GPT-2's products", "[cuda][gpu][.times]") {
  if (no_gpu()) return;
  torch::manual_seed(7);
  const auto mode = in_mode(GemmMode::kMeasured);
  constexpr int64_t kRows = 32768;
  double all_aten = 0, all_first = 0, all_chosen = 0;
  std::printf("%-32s %8s %8s %8s %9s  %s\n", "ms for M = 32768", "ATen", "first", "chosen",
              "TFLOP/s", "choice, costs in the heuristic's order");
  const auto compare = [&](const Compared& one) {
    const auto& g = one.problem;
    REQUIRE(cuda::can_use(g));
    const auto costs = cuda::gemm_costs(g);
    const auto best = cuda::cheapest_gemm(costs);
    const auto run = [&] { cuda::gemm(g); };
    cuda::set_gemm_mode(GemmMode::kHeuristic);
    const double first = milliseconds(run);
    cuda::set_gemm_mode(GemmMode::kMeasured);
    const double chosen = milliseconds(run), aten = milliseconds(one.aten);
    const double flops = 2.0 * g.a.size(0) * g.a.size(1) * g.b.size(1);
    std::printf("%-32s %8.4f %8.4f %8.4f %9.1f  %zu:", one.name.c_str(), aten, first, chosen,
                flops / chosen * 1e-9, best);
    for (const float cost : costs) std::printf(" %.4f", cost);
    std::printf("\n");
    all_aten += one.calls * aten;
    all_first += one.calls * first;
    all_chosen += one.calls * chosen;
  };
  // Each layer's tensors go before the next one's come.
  const auto layer = [&](const char* name, int64_t in, int64_t out, bool gelu, double calls) {
    std::vector<Compared> problems;
    add_layer(problems, name, kRows, in, out, gelu, calls);
    for (const auto& one : problems) compare(one);
  };
  layer("qkv 768x2304", 768, 2304, false, 12);
  layer("proj 768x768", 768, 768, false, 12);
  layer("fc1 768x3072", 768, 3072, true, 12);
  layer("fc2 3072x768", 3072, 768, false, 12);
  layer("head 768x50304", 768, 50304, false, 1);
  std::printf("%-32s %8.3f %8.3f %8.3f\n", "a step of 12 layers", all_aten, all_first, all_chosen);
  CHECK(all_chosen <= 1.05 * all_aten);
}
