#include "lightning/cuda/attention_backward.h"

#include <ATen/ops/_scaled_dot_product_cudnn_attention.h>
#include <ATen/ops/_scaled_dot_product_cudnn_attention_backward.h>
#include <torch/torch.h>

#include <catch2/catch.hpp>
#include <cstdlib>
#include <limits>
#include <vector>

#include "lightning/scope.h"
#include "lightning/step/graph_device.h"
#include "tests/nn/gradients.h"

using namespace lightning;
using namespace lightning::testing;
using cuda::AttentionBackward;

namespace {

bool no_cudnn() {
#ifdef LIGHTNING_CUDNN
  if (torch::cuda::is_available()) return false;
  WARN("needs a GPU");
#else
  WARN("needs a build with the headers of cuDNN and of its frontend");
#endif
  return true;
}

struct Sizes {
  int64_t batch, heads, kv_heads, time, head_size;
};

const std::vector<Sizes> kSizes = {{2, 12, 12, 1024, 64}, {3, 4, 4, 77, 64},   {2, 8, 2, 77, 96},
                                   {1, 6, 1, 300, 128},   {1, 1, 1, 129, 128}, {2, 2, 2, 33, 32}};

constexpr int64_t kBeside = 16;  // columns of a matrix behind what belongs to q, k and v

// Views [B, heads, T, D] of q, k and v in a matrix of [B * T, their width + kBeside].
std::vector<at::Tensor> parts_of(const at::Tensor& matrix, const Sizes& s) {
  std::vector<at::Tensor> parts;
  int64_t column = 0;
  for (const auto heads : {s.heads, s.kv_heads, s.kv_heads}) {
    parts.push_back(matrix.narrow(1, column, heads * s.head_size)
                        .view({s.batch, s.time, heads, s.head_size})
                        .transpose(1, 2));
    column += heads * s.head_size;
  }
  return parts;
}

at::Tensor matrix_for(const Sizes& s, at::ScalarType dtype) {
  return at::randn({s.batch * s.time, (s.heads + 2 * s.kv_heads) * s.head_size + kBeside},
                   at::device(at::kCUDA).dtype(dtype));
}

// With what forward gives. Where nothing was written, NaN is left.
AttentionBackward problem(const Sizes& s, at::ScalarType dtype, bool causal) {
  const auto in = parts_of(matrix_for(s, dtype), s);
  const auto forward = at::_scaled_dot_product_cudnn_attention(in[0], in[1], in[2], std::nullopt,
                                                               true, 0.0, causal, false);
  const auto out =
      parts_of(matrix_for(s, dtype).fill_(std::numeric_limits<double>::quiet_NaN()), s);
  const auto output = std::get<0>(forward);
  const auto rows = at::randn({s.batch, s.time, s.heads, s.head_size}, output.options());
  return {in[0],  in[1],  in[2],  output, std::get<1>(forward), rows.transpose(1, 2),
          out[0], out[1], out[2], causal};
}

std::vector<at::Tensor> by_libtorch(const AttentionBackward& p) {
  const auto none = at::Tensor();
  const auto seed = at::zeros({}, p.q.options().dtype(at::kLong));
  const auto [dq, dk, dv] = at::_scaled_dot_product_cudnn_attention_backward(
      p.gradient, p.q, p.k, p.v, p.output, p.logsumexp, seed, seed, none, none, none, p.q.size(2),
      p.q.size(2), 0.0, p.causal);
  return {dq, dk, dv};
}

// dQ is summed in any order, and then rounded once.
void check_gradients(const AttentionBackward& p) {
  const double allowed = p.q.scalar_type() == at::kHalf ? 5e-4 : 4e-3;
  const auto expected = by_libtorch(p);
  CHECK(relative_error(p.dq, expected[0]) <= allowed);
  CHECK(relative_error(p.dk, expected[1]) <= allowed);
  CHECK(relative_error(p.dv, expected[2]) <= allowed);
}

}  // namespace

TEST_CASE("attention_backward leaves alone what lies on no GPU", "[cuda]") {
  const auto x = at::ones({1, 2, 16, 8}, at::kBFloat16), out = at::zeros_like(x);
  CHECK_FALSE(cuda::attention_backward({x, x, x, x, at::ones({1, 2, 16}), x, out, out, out}));
  CHECK(out.count_nonzero().item<int64_t>() == 0);
}

TEST_CASE("on a GPU attention_backward writes LibTorch's gradients into a packed matrix alone",
          "[cuda][gpu]") {
  if (no_cudnn()) return;
  torch::manual_seed(1);
  for (const auto dtype : {at::kBFloat16, at::kHalf}) {
    for (const auto& s : kSizes) {
      for (const bool causal : {true, false}) {
        for (int time = 0; time < 2; ++time) {  // with a new plan and with one that is there
          CAPTURE(dtype, s.batch, s.heads, s.kv_heads, s.time, s.head_size, causal, time);
          const auto p = problem(s, dtype, causal);
          REQUIRE(cuda::attention_backward(p));
          check_gradients(p);
          const auto all = p.dq.as_strided({s.batch * s.time, p.dq.stride(2)}, {p.dq.stride(2), 1});
          CHECK(at::isnan(all.slice(1, -kBeside)).all().item<bool>());
        }
      }
    }
  }
}

TEST_CASE("on a GPU attention_backward takes a gradient in another order", "[cuda][gpu]") {
  if (no_cudnn()) return;
  torch::manual_seed(2);
  auto p = problem({2, 4, 2, 77, 64}, at::kBFloat16, true);
  p.gradient = p.gradient.contiguous();
  REQUIRE(cuda::attention_backward(p));
  check_gradients(p);
}

TEST_CASE("on a GPU attention_backward refuses what cuDNN would misread, and writes nothing",
          "[cuda][gpu]") {
  if (no_cudnn()) return;
  const auto given = problem({2, 4, 4, 77, 64}, at::kBFloat16, true);
  const auto refuses = [&](const at::Tensor& gradient) {
    auto p = given;
    p.gradient = gradient;
    return !cuda::attention_backward(p) && at::isnan(p.dq).all().item<bool>();
  };
  const auto& good = given.gradient;
  CHECK(refuses(good.to(at::kHalf)));
  CHECK(refuses(good.to(at::kFloat)));
  CHECK(refuses(good.transpose(2, 3).contiguous().transpose(2, 3)));
  CHECK(refuses(at::ones({}, good.options()).expand(good.sizes())));
  CHECK(refuses(at::ones({2, 4, 77, 72}, good.options()).narrow(3, 4, 64)));
  CHECK(refuses(at::ones({2, 4, 77, 68}, good.options()).narrow(3, 0, 64)));
  CHECK_FALSE(refuses(good));
}

TEST_CASE("on a GPU attention_backward under deterministic algorithms gives the same bits",
          "[cuda][gpu]") {
  if (no_cudnn()) return;
  torch::manual_seed(3);
  const auto p = problem({4, 4, 4, 1000, 64}, at::kBFloat16, false);
  at::globalContext().setDeterministicAlgorithms(true, /*warn_only=*/false);
  const Scope after =
      scope_exit([] { at::globalContext().setDeterministicAlgorithms(false, false); });
  REQUIRE(cuda::attention_backward(p));
  const auto first = p.dq.clone();
  for (int i = 0; i < 5; ++i) {
    REQUIRE(cuda::attention_backward(p));
    CHECK(at::equal(p.dq, first));
  }
}

TEST_CASE("on a GPU attention_backward can be recorded, whether its sizes were met before or not",
          "[cuda][gpu]") {
  if (no_cudnn()) return;
  if (std::getenv("PYTORCH_NO_CUDA_MEMORY_CACHING") != nullptr) return;  // cannot be recorded
  REQUIRE(cuda_graph_device());
  torch::manual_seed(4);
  const auto device = cuda_graph_device()(c10::Device(c10::kCUDA, 0));
  const auto met = problem({2, 4, 4, 200, 64}, at::kBFloat16, true);
  const auto unmet = problem({2, 4, 2, 184, 64}, at::kBFloat16, true);
  device->warm_up([&] { REQUIRE(cuda::attention_backward(met)); });
  const auto work = device->record([&] {
    REQUIRE(cuda::attention_backward(met));
    REQUIRE(cuda::attention_backward(unmet));
  });
  for (int i = 0; i < 2; ++i) {
    for (const auto* one : {&met, &unmet}) one->gradient.normal_();
    work->launch();
    check_gradients(met);
    check_gradients(unmet);
  }
}
