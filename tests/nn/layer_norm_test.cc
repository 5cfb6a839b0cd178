#include "lightning/nn/layer_norm.h"

#include <torch/torch.h>

#include <catch2/catch.hpp>

#include "tests/nn/gradients.h"
#include "tests/nn/norm_kernels.h"

using namespace lightning;
using namespace lightning::testing;
using Catch::Contains;

namespace {

// Each of our layer's results beside LibTorch's in float64, from the same values.
void compare(const torch::nn::LayerNormOptions& options, const at::Tensor& input, bool autocast,
             double tolerance) {
  nn::LayerNorm layer(options);
  torch::nn::LayerNorm plain(options);
  layer->to(input.device());
  plain->to(input.device(), at::kDouble);
  if (!autocast) layer->to(input.scalar_type());
  const auto leaves = parameters_of(*layer), exact = parameters_of(*plain);
  for (const auto& [name, leaf] : leaves) {
    const at::NoGradGuard no_grad;
    leaf.copy_(at::randn_like(leaf));
    exact.at(name).copy_(leaf);
  }
  const auto gradient = at::randn_like(input, at::MemoryFormat::Contiguous);
  const auto got = results_of([&](const at::Tensor& x) { return layer->forward(x); }, leaves, input,
                              gradient, autocast);
  const auto dtype = autocast ? at::kBFloat16 : input.scalar_type();
  const auto expected = results_of([&](const at::Tensor& x) { return plain->forward(x); }, exact,
                                   input.to(at::kDouble), gradient.to(dtype).to(at::kDouble));
  CHECK(got.at("output").scalar_type() == dtype);
  for (const auto& [name, value] : expected) {
    INFO(name);
    if (name != "output") {
      CHECK(got.at(name).scalar_type() ==
            (name == "input" ? input.scalar_type() : leaves.at(name).scalar_type()));
    }
    CHECK(got.at(name).sizes() == value.sizes());
    CHECK(relative_error(got.at(name), value) <= tolerance);
  }
}

std::vector<at::Tensor> inputs_of(int64_t width, const at::TensorOptions& options) {
  return {at::randn({width}, options),
          at::randn({7, width}, options),
          at::randn({width, 7}, options).t(),
          at::randn({2, 3, 4, width}, options),
          at::randn({3, 2, width}, options).transpose(0, 1),
          at::randn({5, width + 3}, options).narrow(1, 1, width)};
}

}  // namespace

TEST_CASE("LayerNorm gives what torch::nn::LayerNorm gives, of any rank and with any strides",
          "[nn]") {
  torch::manual_seed(1);
  for (const bool affine : {true, false}) {
    for (const int64_t width : {1, 5, 8}) {
      for (const auto& input : inputs_of(width, at::kDouble)) {
        CAPTURE(affine, width, input.sizes(), input.strides());
        compare(torch::nn::LayerNormOptions({width}).elementwise_affine(affine), input, false,
                1e-12);
      }
    }
  }
  compare(torch::nn::LayerNormOptions({3, 4}).eps(0.1), at::randn({2, 5, 3, 4}, at::kDouble), false,
          1e-12);
}

TEST_CASE("LayerNorm under autocast gives autocast's dtype and gradients of the parameters'",
          "[nn]") {
  torch::manual_seed(2);
  for (const auto dtype : {at::kFloat, at::kBFloat16}) {
    for (const auto& input : inputs_of(16, dtype)) {
      CAPTURE(dtype, input.sizes());
      compare(torch::nn::LayerNormOptions({16}), input, true, 6e-3);
    }
  }
}

TEST_CASE("LayerNorm leaves a float64 input float64 under autocast", "[nn]") {
  nn::LayerNorm layer(std::vector<int64_t>{4});
  layer->to(at::kDouble);
  const Autocast autocast(at::kCPU);
  CHECK(layer(at::randn({2, 4}, at::kDouble)).scalar_type() == at::kDouble);
}

TEST_CASE("LayerNorm has torch::nn::LayerNorm's parameters and a copy is a LayerNorm of ours",
          "[nn]") {
  nn::LayerNorm layer(torch::nn::LayerNormOptions({3, 4}));
  CHECK(layer->named_parameters().keys() == std::vector<std::string>{"weight", "bias"});
  CHECK(layer->weight.sizes() == at::IntArrayRef({3, 4}));
  layer->eval();
  layer->bias.set_requires_grad(false);
  {
    const at::NoGradGuard no_grad;
    layer->weight.fill_(2);
  }
  const auto copy = std::dynamic_pointer_cast<nn::LayerNormImpl>(layer->clone());
  REQUIRE(copy != nullptr);
  CHECK(at::equal(copy->weight, layer->weight));
  CHECK_FALSE(copy->weight.is_alias_of(layer->weight));
  CHECK_FALSE(copy->bias.requires_grad());
  CHECK_FALSE(copy->is_training());
}

TEST_CASE("LayerNorm refuses an input of other sizes as LibTorch does", "[nn]") {
  nn::LayerNorm layer(std::vector<int64_t>{4});
  CHECK_THROWS_WITH(layer(at::randn({2, 5})), Contains("expected input with shape [*, 4]"));
}

TEST_CASE("LayerNorm's kernels agree with float64 and write every element", "[nn][gpu]") {
  if (!torch::cuda::is_available()) {
    WARN("needs a GPU");
    return;
  }
  check_norm_kernels(/*centred=*/true, /*adds=*/false);
}

TEST_CASE("LayerNorm on a GPU agrees with float64, with and without autocast", "[nn][gpu]") {
  if (!torch::cuda::is_available()) {
    WARN("needs a GPU");
    return;
  }
  torch::manual_seed(3);
  for (const int64_t width : {7, 768, 20000}) {
    for (const auto dtype : {at::kDouble, at::kFloat, at::kHalf, at::kBFloat16}) {
      for (const auto& input : inputs_of(width, at::device(at::kCUDA).dtype(dtype))) {
        CAPTURE(width, dtype, input.sizes(), input.strides());
        const double exact = dtype == at::kDouble ? 1e-12 : tolerance_of(dtype);
        compare(torch::nn::LayerNormOptions({width}), input, false, exact);
        compare(torch::nn::LayerNormOptions({width}).elementwise_affine(false), input, false,
                exact);
        if (dtype != at::kDouble) {
          compare(torch::nn::LayerNormOptions({width}), input, true, 1e-2);
        }
      }
    }
  }
}

TEST_CASE("LayerNorm's kernel gives only the gradients that are asked for and no second derivative",
          "[nn][gpu]") {
  if (!torch::cuda::is_available()) {
    WARN("needs a GPU");
    return;
  }
  nn::LayerNorm layer(std::vector<int64_t>{32});
  layer->to(at::kCUDA);
  const auto input = at::randn({4, 32}, at::device(at::kCUDA)).requires_grad_();
  CHECK_THROWS_WITH(torch::autograd::grad({layer(input).square().sum()}, {input}, {}, true,
                                          /*create_graph=*/true),
                    Contains("lightning::nn::LayerNorm") && Contains("torch::nn::LayerNorm"));
  layer->weight.set_requires_grad(false);
  layer(input.detach()).sum().backward();
  CHECK_FALSE(layer->weight.grad().defined());
  CHECK(relative_error(layer->bias.grad(), at::full({32}, 4.0, at::kCUDA)) < 1e-6);
  const at::NoGradGuard no_grad;
  CHECK_FALSE(layer(input).requires_grad());
}
