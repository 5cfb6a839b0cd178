#include "lightning/nn/attention.h"

#include <ATen/SDPBackend.h>
#include <ATen/record_function.h>
#include <torch/torch.h>

#include <atomic>
#include <catch2/catch.hpp>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#include "lightning/recording.h"
#include "lightning/scope.h"
#include "tests/nn/gradients.h"

using namespace lightning;
using namespace lightning::testing;
using Catch::Contains;

namespace {

at::Tensor layer(const Tensors& p, const std::string& name, const at::Tensor& x) {
  const auto bias = p.find(name + ".bias");
  return at::linear(x, p.at(name + ".weight"),
                    bias == p.end() ? std::nullopt : std::make_optional(bias->second));
}

// [batch, heads, time, size], by the formula.
at::Tensor turned(const at::Tensor& x, double base) {
  const auto time = x.size(2), size = x.size(3);
  const auto options = x.options().dtype(at::kDouble).requires_grad(false);
  const auto powers = at::arange(0, size, 2, options) * (-std::log(base) / size);
  const auto angles = at::outer(at::arange(time, options), at::exp(powers));
  const auto cosine = at::cos(angles).to(x.scalar_type());
  const auto sine = at::sin(angles).to(x.scalar_type());
  const auto halves = x.chunk(2, -1);
  return at::cat({halves[0] * cosine - halves[1] * sine, halves[1] * cosine + halves[0] * sine},
                 -1);
}

// Attention from its definition: no fused operator.
at::Tensor plain(const nn::AttentionOptions& o, const Tensors& p, const at::Tensor& x,
                 bool by_operator = false) {
  const auto batch = x.size(0), time = x.size(1), size = o.head_size();
  const auto packed = layer(p, "qkv", x);
  const auto part = [&](int64_t from, int64_t heads) {
    return packed.narrow(2, from * size, heads * size)
        .reshape({batch, time, heads, size})
        .transpose(1, 2);
  };
  auto q = part(0, o.heads()), k = part(o.heads(), o.kv_heads());
  auto v = part(o.heads() + o.kv_heads(), o.kv_heads());
  if (o.rotary()) {
    q = turned(q, o.rotary_base());
    k = turned(k, o.rotary_base());
  }
  k = k.repeat_interleave(o.heads() / o.kv_heads(), 1);
  v = v.repeat_interleave(o.heads() / o.kv_heads(), 1);
  at::Tensor output;
  if (by_operator) {
    output = at::scaled_dot_product_attention(q, k, v, {}, 0.0, o.causal());
  } else {
    auto scores = at::matmul(q, k.transpose(2, 3)) / std::sqrt(static_cast<double>(size));
    if (o.causal()) {
      const auto later = at::ones({time, time}, scores.options().dtype(at::kBool)).triu(1);
      scores = scores.masked_fill(later, -INFINITY);
    }
    output = at::matmul(at::softmax(scores, -1), v);
  }
  return layer(p, "proj", output.transpose(1, 2).reshape({batch, time, o.heads() * size}));
}

// Whether LibTorch may choose cuDNN, while it lives.
Scope with_cudnn(bool may) {
  auto& context = at::globalContext();
  const bool before = context.userEnabledCuDNNSDP();
  context.setSDPUseCuDNN(may);
  return scope_exit([before] { at::globalContext().setSDPUseCuDNN(before); });
}

// Counts what is recorded under a name while it lives, on any thread.
class CallsOf {
 public:
  explicit CallsOf(const char* name) {
    name_ = name;
    count_ = 0;
    handle_ = at::addGlobalCallback(at::RecordFunctionCallback(
        [](const at::RecordFunction& function) -> std::unique_ptr<at::ObserverContext> {
          if (std::strcmp(function.name(), name_) == 0) ++count_;
          return nullptr;
        }));
  }
  ~CallsOf() { at::removeCallback(handle_); }
  CallsOf(const CallsOf&) = delete;

  int count() const { return count_; }

 private:
  static inline const char* name_ = nullptr;
  static inline std::atomic<int> count_ = 0;
  at::CallbackHandle handle_;
};

}  // namespace

TEST_CASE("Attention is the definition between two projections", "[nn]") {
  torch::manual_seed(1);
  const auto [features, heads, kv_heads, size] = GENERATE(table<int64_t, int64_t, int64_t, int64_t>(
      {{12, 3, 0, 0}, {12, 4, 2, 0}, {10, 2, 1, 6}, {9, 3, 3, 3}}));
  const bool causal = GENERATE(true, false), rotary = GENERATE(false, true);
  const auto actual_size = size > 0 ? size : features / heads;
  if (rotary && actual_size % 2 != 0) return;
  nn::Attention attention(nn::AttentionOptions(features, heads)
                              .kv_heads(kv_heads)
                              .head_size(size)
                              .causal(causal)
                              .rotary(rotary)
                              .rotary_base(100)
                              .bias(!rotary));
  attention->to(at::kDouble);
  // A longer sequence after a shorter one, then a shorter one again: the table grows.
  for (const int64_t time : {5, 7, 3}) {
    const auto input = torch::randn({time, 2, features}, at::kDouble).transpose(0, 1);
    const auto gradient = torch::randn({2, time, features}, at::kDouble);
    const auto leaves = parameters_of(*attention);
    const auto copies = copies_of(leaves, at::kDouble);
    const auto got = results_of([&](const at::Tensor& x) { return attention->forward(x); }, leaves,
                                input, gradient);
    const auto expected =
        results_of([&](const at::Tensor& x) { return plain(attention->options, copies, x); },
                   copies, input, gradient);
    REQUIRE(got.size() == expected.size());
    for (const auto& [name, value] : expected) {
      CAPTURE(features, heads, kv_heads, size, causal, rotary, time, name);
      CHECK(relative_error(got.at(name), value) <= 1e-12);
    }
  }
}

TEST_CASE("under autocast on a CPU Attention gives bfloat16 and float32 gradients", "[nn]") {
  torch::manual_seed(1);
  nn::Attention attention(nn::AttentionOptions(16, 2).rotary(true));
  const auto leaves = parameters_of(*attention);
  const auto copies = copies_of(leaves, at::kDouble);
  const auto input = torch::randn({2, 6, 16}), gradient = torch::randn({2, 6, 16});
  const auto got = results_of([&](const at::Tensor& x) { return attention->forward(x); }, leaves,
                              input, gradient, true);
  const auto expected =
      results_of([&](const at::Tensor& x) { return plain(attention->options, copies, x); }, copies,
                 input.to(at::kDouble), gradient);
  CHECK(got.at("output").scalar_type() == at::kBFloat16);
  for (const auto& [name, value] : expected) {
    CAPTURE(name);
    if (name != "output") CHECK(got.at(name).scalar_type() == at::kFloat);
    CHECK(relative_error(got.at(name), value) <= 3e-2);
  }
}

TEST_CASE("a rotary table first made in inference mode serves training", "[nn]") {
  nn::Attention attention(nn::AttentionOptions(8, 2).rotary(true));
  {
    const c10::InferenceMode inference;
    attention->forward(torch::randn({1, 4, 8}));
  }
  attention->forward(torch::randn({1, 4, 8})).sum().backward();
  CHECK(attention->qkv->weight.grad().defined());
}

TEST_CASE("a recording keeps the rotary table that its replays read", "[nn]") {
  nn::Attention attention(nn::AttentionOptions(8, 2).rotary(true));
  const torch::NoGradGuard no_grad;
  std::vector<at::Tensor> kept;
  {
    const RecordingScope recording(kept);
    attention->forward(torch::randn({1, 4, 8}));
  }
  REQUIRE(kept.size() == 1);
  const auto values = kept[0].clone();
  attention->forward(torch::randn({1, 500, 8}));  // a longer table takes its place
  CHECK(kept.size() == 1);
  CHECK(at::equal(kept[0], values));
}

TEST_CASE("Attention's parameters have the names of its projections", "[nn]") {
  nn::Attention attention(nn::AttentionOptions(12, 6).kv_heads(2).bias(false));
  CHECK(attention->named_parameters().keys() ==
        std::vector<std::string>{"qkv.weight", "proj.weight"});
  CHECK(attention->qkv->weight.sizes() == at::IntArrayRef({(6 + 2 * 2) * 2, 12}));
  const auto clone = std::dynamic_pointer_cast<nn::AttentionImpl>(attention->clone());
  REQUIRE(clone);
  const auto x = torch::randn({1, 3, 12});
  CHECK(at::equal(clone->forward(x), attention->forward(x)));
}

TEST_CASE("Attention drops attention weights while it trains", "[nn]") {
  torch::manual_seed(1);
  nn::Attention attention(nn::AttentionOptions(8, 2).dropout(0.5));
  const auto x = torch::randn({2, 6, 8});
  CHECK_FALSE(at::equal(attention->forward(x), attention->forward(x)));
  attention->eval();
  CHECK(at::equal(attention->forward(x), attention->forward(x)));
}

TEST_CASE("Attention refuses heads that do not fit and says what would", "[nn]") {
  CHECK_THROWS_WITH(nn::Attention(10, 3), Contains("10 features") && Contains("head_size"));
  CHECK_THROWS_WITH(nn::Attention(nn::AttentionOptions(12, 4).kv_heads(3)),
                    Contains("kv_heads 3") && Contains("divisor"));
  CHECK_THROWS_WITH(nn::Attention(nn::AttentionOptions(9, 3).rotary(true)),
                    Contains("head_size 3") && Contains("even"));
  CHECK_THROWS_WITH(nn::Attention(nn::AttentionOptions(8, 2).dropout(1)), Contains("dropout 1"));
  CHECK_THROWS_WITH(nn::Attention(8, 2)->forward(torch::randn({4, 8})),
                    Contains("[batch, time, 8]"));
}

TEST_CASE("under autocast on a GPU Attention is as near to float64 as plain ATen", "[nn][gpu]") {
  if (!torch::cuda::is_available()) {
    WARN("needs a GPU");
    return;
  }
  torch::manual_seed(1);
  const auto [features, heads, kv_heads, size, time, causal] =
      GENERATE(table<int64_t, int64_t, int64_t, int64_t, int64_t, bool>({
          {768, 12, 12, 0, 1024, true},
          {512, 8, 2, 0, 300, true},  // grouped queries
          {256, 2, 2, 128, 256, false},
          {384, 4, 2, 96, 77, false},
          {160, 4, 4, 40, 77, true},  // pairs that do not move in packs
          {64, 2, 1, 8, 33, true},
          {60, 4, 4, 15, 50, true},  // a head size that only plain ATen takes
      }));
  const bool rotary = GENERATE(false, true), bias = GENERATE(true, false);
  const auto dtype = GENERATE(at::kBFloat16, at::kHalf);
  const bool cudnn = GENERATE(true, false);  // where it is chosen; else flash attention
  const auto choice = with_cudnn(cudnn);
  const auto actual_size = size > 0 ? size : features / heads;
  if (rotary && actual_size % 2 != 0) return;
  nn::Attention attention(nn::AttentionOptions(features, heads)
                              .kv_heads(kv_heads)
                              .head_size(size)
                              .causal(causal)
                              .rotary(rotary)
                              .bias(bias));
  attention->to(torch::kCUDA);
  const auto leaves = parameters_of(*attention);
  const auto floats = copies_of(leaves, at::kFloat), doubles = copies_of(leaves, at::kDouble);
  const auto input = torch::randn({2, time, features}, torch::kCUDA) * 2;
  const auto gradient = torch::randn({2, time, features}, torch::kCUDA);
  const auto& options = attention->options;
  const auto in_16_bits = [&](const std::function<at::Tensor(const at::Tensor&)>& model) {
    return [model, dtype](const at::Tensor& x) {
      const Autocast on(at::kCUDA, dtype);
      return model(x);
    };
  };
  const auto ours =
      results_of(in_16_bits([&](const at::Tensor& x) { return attention->forward(x); }), leaves,
                 input, gradient);
  const auto aten =
      results_of(in_16_bits([&](const at::Tensor& x) { return plain(options, floats, x, true); }),
                 floats, input, gradient);
  const auto exact = results_of([&](const at::Tensor& x) { return plain(options, doubles, x); },
                                doubles, input.to(at::kDouble), gradient);
  for (const auto& [name, value] : exact) {
    const auto error = relative_error(ours.at(name), value);
    const auto allowed = relative_error(aten.at(name), value);
    CAPTURE(features, heads, kv_heads, actual_size, time, causal, rotary, bias, dtype, cudnn, name,
            error, allowed);
    CHECK(error <= 1.2 * allowed + 1e-6);
    if (name != "output") CHECK(ours.at(name).scalar_type() == at::kFloat);
  }
}

TEST_CASE("on a GPU Attention has cuDNN write its packed gradient, except with dropout",
          "[nn][gpu]") {
#ifndef LIGHTNING_CUDNN
  WARN("needs a build with the headers of cuDNN and of its frontend");
  return;
#endif
  if (!torch::cuda::is_available()) {
    WARN("needs a GPU");
    return;
  }
  const auto options = at::device(at::kCUDA).dtype(at::kBFloat16);
  const auto q = at::empty({2, 4, 128, 64}, options);
  if (static_cast<at::SDPBackend>(at::_fused_sdp_choice(q, q, q, {}, 0.0, true)) !=
      at::SDPBackend::cudnn_attention) {
    WARN("needs a GPU for which LibTorch chooses cuDNN: Hopper");
    return;
  }
  const auto calls = [&](double dropout, bool cudnn) {
    const auto choice = with_cudnn(cudnn);
    nn::Attention attention(nn::AttentionOptions(256, 4).dropout(dropout));
    attention->to(torch::kCUDA, at::kBFloat16);
    const CallsOf counted("lightning::attention_backward");
    attention->forward(at::randn({2, 128, 256}, options)).sum().backward();
    return counted.count();
  };
  CHECK(calls(0, true) == 1);
  CHECK(calls(0.1, true) == 0);
  CHECK(calls(0, false) == 0);
}

TEST_CASE("on a GPU Attention gives the same bits under deterministic algorithms", "[nn][gpu]") {
  if (!torch::cuda::is_available()) {
    WARN("needs a GPU");
    return;
  }
  setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8", 1);  // LibTorch asks for it, for its products
  at::globalContext().setDeterministicAlgorithms(true, false);
  nn::Attention attention(nn::AttentionOptions(256, 4).rotary(true));
  attention->to(torch::kCUDA);
  const auto input = torch::randn({4, 500, 256}, torch::kCUDA);
  const auto gradient = torch::randn({4, 500, 256}, torch::kCUDA);
  const auto run = [&] {
    return results_of([&](const at::Tensor& x) { return attention->forward(x); },
                      parameters_of(*attention), input, gradient, true);
  };
  const auto first = run(), second = run();
  at::globalContext().setDeterministicAlgorithms(false, false);
  for (const auto& [name, value] : first) {
    CAPTURE(name);
    CHECK(at::equal(second.at(name), value));
  }
}

TEST_CASE("on a GPU Attention drops weights in training, the same ones in its backward",
          "[nn][gpu]") {
  if (!torch::cuda::is_available()) {
    WARN("needs a GPU");
    return;
  }
  torch::manual_seed(1);
  nn::Attention attention(nn::AttentionOptions(128, 2).dropout(0.3));
  attention->to(torch::kCUDA, at::kBFloat16);
  const auto x = torch::randn({2, 128, 128}, torch::dtype(at::kBFloat16).device(torch::kCUDA));
  CHECK_FALSE(at::equal(attention->forward(x), attention->forward(x)));
  // The output is linear in v, so its bias's gradient is the gradient along any step of that bias.
  auto step = torch::zeros_like(attention->qkv->bias);
  step.narrow(0, 256, 128).fill_(8);
  const auto output = [&] {
    torch::manual_seed(7);
    return attention->forward(x).to(at::kFloat).sum();
  };
  const auto before = output();
  before.backward();
  const auto slope = (attention->qkv->bias.grad() * step).sum().to(at::kFloat).item<double>();
  {
    const torch::NoGradGuard no_grad;
    attention->qkv->bias.add_(step);
  }
  const auto change = (output() - before).item<double>();
  CAPTURE(slope, change);
  CHECK(std::abs(slope - change) <= 0.05 * std::abs(change) + 5);
  attention->eval();
  CHECK(at::equal(attention->forward(x), attention->forward(x)));
}
