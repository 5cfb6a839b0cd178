#include "lightning/nn/mlp.h"

#include <torch/torch.h>

#include <catch2/catch.hpp>

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

at::Tensor plain(const std::string& activation, const Tensors& p, const at::Tensor& x) {
  if (activation == "swiglu") {
    return layer(p, "down", at::silu(layer(p, "gate", x)) * layer(p, "up", x));
  }
  const auto before = layer(p, "fc1", x);
  if (activation == "relu") return layer(p, "fc2", at::relu(before));
  return layer(p, "fc2", at::gelu(before, activation == "gelu" ? "none" : "tanh"));
}

}  // namespace

TEST_CASE("MLP is its products with the activation between them", "[nn]") {
  torch::manual_seed(1);
  const auto* const activation = GENERATE("gelu", "gelu_tanh", "relu", "swiglu");
  const auto [autocast, bias] =
      GENERATE(table<bool, bool>({{false, true}, {false, false}, {true, true}}));
  nn::MLP mlp(nn::MLPOptions(5, 7).activation(activation).bias(bias));
  const auto dtype = autocast ? at::kFloat : at::kDouble;
  mlp->to(dtype);
  for (const auto& input : {torch::randn({3, 5}, dtype), torch::randn({2, 3, 5}, dtype),
                            torch::randn({5, 2, 3}, dtype).permute({1, 2, 0})}) {
    const auto leaves = parameters_of(*mlp);
    const auto copies = copies_of(leaves, dtype);
    const auto gradient = torch::randn(input.sizes(), dtype);
    const auto got = results_of([&](const at::Tensor& x) { return mlp->forward(x); }, leaves, input,
                                gradient, autocast);
    const auto expected =
        results_of([&](const at::Tensor& x) { return plain(activation, copies, x); }, copies, input,
                   gradient, autocast);
    REQUIRE(got.size() == expected.size());
    for (const auto& [name, value] : expected) {
      CAPTURE(activation, autocast, bias, input.sizes(), name);
      CHECK(got.at(name).scalar_type() == value.scalar_type());
      CHECK(relative_error(got.at(name), value) <= (autocast ? 1e-2 : 1e-12));
    }
  }
}

TEST_CASE("MLP's parameters have the names of its layers", "[nn]") {
  nn::MLP gelu(4, 0);
  CHECK(gelu->named_parameters().keys() ==
        std::vector<std::string>{"fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"});
  CHECK(gelu->fc1->weight.sizes() == at::IntArrayRef({16, 4}));  // four times as wide
  nn::MLP swiglu(nn::MLPOptions(4, 6).activation("swiglu").bias(false));
  CHECK(swiglu->named_parameters().keys() ==
        std::vector<std::string>{"gate.weight", "up.weight", "down.weight"});
  CHECK(swiglu->down->weight.sizes() == at::IntArrayRef({4, 6}));
  const auto clone = std::dynamic_pointer_cast<nn::MLPImpl>(swiglu->clone());
  REQUIRE(clone);
  const auto x = torch::randn({3, 4});
  CHECK(at::equal(clone->forward(x), swiglu->forward(x)));
}

TEST_CASE("MLP drops elements of its output while it trains", "[nn]") {
  torch::manual_seed(1);
  nn::MLP mlp(nn::MLPOptions(8, 16).dropout(0.5));
  const auto x = torch::randn({50, 8});
  const auto zeros = (mlp->forward(x) == 0).sum().item<int64_t>();
  CHECK(zeros > 150);
  CHECK(zeros < 250);
  mlp->eval();
  CHECK((mlp->forward(x) == 0).sum().item<int64_t>() == 0);
}

TEST_CASE("MLP refuses options that make no layer", "[nn]") {
  CHECK_THROWS_WITH(nn::MLP(nn::MLPOptions(4, 8).activation("gelu_tan")),
                    Contains("gelu_tan") && Contains("Did you mean \"gelu_tanh\""));
  CHECK_THROWS_WITH(nn::MLP(nn::MLPOptions()), Contains("0 features"));
  CHECK_THROWS_WITH(nn::MLP(nn::MLPOptions(4, 8).dropout(1.5)), Contains("1.5"));
}

TEST_CASE("on a GPU MLP is as near to float64 as plain ATen", "[nn][gpu]") {
  if (!torch::cuda::is_available()) {
    WARN("needs a GPU");
    return;
  }
  torch::manual_seed(1);
  const auto* const activation = GENERATE("gelu", "gelu_tanh", "relu", "swiglu");
  const auto [rows, features, hidden, bias, recompute, autocast] =
      GENERATE(table<int64_t, int64_t, int64_t, bool, bool, bool>({
          {4096, 768, 3072, true, false, true},
          {1001, 768, 3072, true, true, true},
          {500, 64, 200, false, false, true},
          {77, 17, 33, true, true, true},  // the path of single elements
          {77, 17, 33, false, false, true},
          {500, 64, 200, true, true, false},  // float32
          {3, 17, 33, true, false, false},
          {1, 8, 16, true, false, false},
      }));
  nn::MLP mlp(
      nn::MLPOptions(features, hidden).activation(activation).bias(bias).recompute(recompute));
  mlp->to(torch::kCUDA);
  const auto leaves = parameters_of(*mlp);
  const auto floats = copies_of(leaves, at::kFloat), doubles = copies_of(leaves, at::kDouble);
  const auto input = torch::randn({2, rows, features}, torch::kCUDA) * 2;
  const auto gradient = torch::randn({2, rows, features}, torch::kCUDA);
  const auto ours = results_of([&](const at::Tensor& x) { return mlp->forward(x); }, leaves, input,
                               gradient, autocast);
  const auto aten = results_of([&](const at::Tensor& x) { return plain(activation, floats, x); },
                               floats, input, gradient, autocast);
  const auto exact = results_of([&](const at::Tensor& x) { return plain(activation, doubles, x); },
                                doubles, input.to(at::kDouble), gradient);
  for (const auto& [name, value] : exact) {
    const auto error = relative_error(ours.at(name), value);
    const auto allowed = relative_error(aten.at(name), value);
    CAPTURE(activation, rows, features, hidden, bias, recompute, autocast, name, error, allowed);
    CHECK(error <= 1.2 * allowed + 1e-6);
    if (name != "output") CHECK(ours.at(name).scalar_type() == at::kFloat);
  }
}

TEST_CASE("on a GPU MLP gives the same bits each time, and gradients only where asked",
          "[nn][gpu]") {
  if (!torch::cuda::is_available()) {
    WARN("needs a GPU");
    return;
  }
  const auto* const activation = GENERATE("gelu", "swiglu");
  nn::MLP mlp(nn::MLPOptions(64, 256).activation(activation));
  mlp->to(torch::kCUDA);
  const auto input = torch::randn({4, 100, 64}, torch::kCUDA);
  const auto gradient = torch::randn({4, 100, 64}, torch::kCUDA);
  const auto run = [&] {
    return results_of([&](const at::Tensor& x) { return mlp->forward(x); }, parameters_of(*mlp),
                      input, gradient, true);
  };
  const auto first = run(), second = run();
  for (const auto& [name, value] : first) CHECK(at::equal(second.at(name), value));
  for (auto& parameter : mlp->parameters()) parameter.requires_grad_(false);
  const auto frozen = run();
  CHECK(at::equal(frozen.at("input"), first.at("input")));
  for (const auto& parameter : mlp->parameters()) CHECK_FALSE(parameter.grad().defined());
  const Autocast on(at::kCUDA);
  const auto x = input.clone().requires_grad_();
  CHECK_THROWS_WITH(torch::autograd::grad({mlp->forward(x).sum()}, {x}, {}, true, true),
                    Contains("create_graph"));
}
