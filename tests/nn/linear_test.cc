#include "lightning/nn/linear.h"

#include <torch/torch.h>

#include <catch2/catch.hpp>
#include <tuple>
#include <vector>

#include "lightning/nn/compute.h"
#include "lightning/param/working_copy.h"
#include "tests/nn/gradients.h"

using namespace lightning;
using namespace lightning::testing;
using Catch::Contains;

namespace {

at::Tensor plain(const Tensors& p, const at::Tensor& x) {
  return at::linear(x, p.at("weight"),
                    p.count("bias") ? std::make_optional(p.at("bias")) : std::nullopt);
}

void check_close(const Tensors& got, const Tensors& expected, double tolerance) {
  REQUIRE(got.size() == expected.size());
  for (const auto& [name, value] : expected) {
    INFO(name);
    REQUIRE(got.at(name).defined());
    CHECK(got.at(name).sizes() == value.sizes());
    CHECK(relative_error(got.at(name), value) <= tolerance);
  }
}

}  // namespace

TEST_CASE("Linear gives what at::linear gives, of any rank and with any strides", "[nn]") {
  torch::manual_seed(1);
  const bool bias = GENERATE(true, false);
  const bool autocast = GENERATE(false, true);
  nn::Linear layer(torch::nn::LinearOptions(5, 3).bias(bias));
  if (!autocast) layer->to(at::kDouble);
  const auto dtype = autocast ? at::kFloat : at::kDouble;
  const std::vector<at::Tensor> inputs = {torch::randn({5}, dtype),
                                          torch::randn({7, 5}, dtype),
                                          torch::randn({5, 7}, dtype).t(),
                                          torch::randn({2, 3, 4, 5}, dtype),
                                          torch::randn({3, 2, 5}, dtype).transpose(0, 1),
                                          torch::randn({0, 5}, dtype)};
  for (const auto& input : inputs) {
    CAPTURE(bias, autocast, input.sizes());
    const auto gradient = torch::randn(nn::with_last(input.sizes(), 3), dtype);
    const auto leaves = parameters_of(*layer);
    const auto copies = copies_of(leaves, dtype);
    const auto got = results_of([&](const at::Tensor& x) { return layer->forward(x); }, leaves,
                                input, gradient, autocast);
    const auto expected = results_of([&](const at::Tensor& x) { return plain(copies, x); }, copies,
                                     input, gradient, autocast);
    CHECK(got.at("output").scalar_type() == (autocast ? at::kBFloat16 : at::kDouble));
    for (const auto& [name, value] : got) {
      if (name != "output") CHECK(value.scalar_type() == dtype);
    }
    check_close(got, expected, autocast ? 1e-2 : 1e-12);
  }
}

TEST_CASE("Linear has torch::nn::Linear's names and clones to its own kind", "[nn]") {
  nn::Linear layer(4, 2);
  CHECK(layer->named_parameters().keys() == torch::nn::Linear(4, 2)->named_parameters().keys());
  layer->eval();
  const auto clone = std::dynamic_pointer_cast<nn::LinearImpl>(layer->clone());
  REQUIRE(clone);
  CHECK_FALSE(clone->is_training());
  CHECK(at::equal(clone->weight, layer->weight));
  CHECK(clone->weight.data_ptr() != layer->weight.data_ptr());
  CHECK(at::equal(clone->bias, layer->bias));
  torch::nn::Sequential both(nn::Linear(4, 3), torch::nn::ReLU(), nn::Linear(3, 2));
  CHECK(both->forward(torch::randn({5, 4})).sizes() == at::IntArrayRef({5, 2}));
}

TEST_CASE("under autocast Linear reads the working copy of its weight", "[nn]") {
  nn::Linear layer(4, 2);
  WorkingCopies copies(at::kBFloat16);
  copies.want(layer->weight).zero_();  // shows which of the two is read
  const auto scope = WorkingCopies::use(&copies);
  const Autocast on(at::kCPU);
  const auto output = layer->forward(torch::randn({3, 4}));
  CHECK(at::equal(output, layer->bias.to(at::kBFloat16).expand({3, 2})));
}

TEST_CASE("under autocast Linear gives gradients only to those that want one", "[nn]") {
  nn::Linear layer(4, 2);
  layer->weight.requires_grad_(false);
  const auto x = torch::randn({3, 4}).requires_grad_();
  {
    const Autocast on(at::kCPU);
    layer->forward(x).sum().backward();
    CHECK(x.grad().defined());
    CHECK(layer->bias.grad().defined());
    CHECK_FALSE(layer->weight.grad().defined());
    layer->forward(torch::randn({3, 4})).sum().backward();
    layer->weight.requires_grad_();
    layer->forward(torch::randn({3, 4})).sum().backward();
  }
  CHECK(layer->weight.grad().defined());
  CHECK(layer->weight.grad().scalar_type() == at::kFloat);
}

TEST_CASE("Linear's output may be changed in place, and costs no graph without gradients", "[nn]") {
  nn::Linear layer(4, 2);
  const auto x = torch::randn({3, 5, 4});
  const Autocast on(at::kCPU);
  layer->forward(x).relu_().sum().backward();
  CHECK(layer->weight.grad().defined());
  {
    const torch::NoGradGuard no_grad;
    CHECK_FALSE(layer->forward(x).requires_grad());
  }
  const c10::InferenceMode inference;
  CHECK(layer->forward(x).is_inference());
}

TEST_CASE("Linear under autocast refuses a second derivative and says what has one", "[nn]") {
  nn::Linear layer(4, 2);
  const auto x = torch::randn({3, 4}).requires_grad_();
  const auto first = [&](const at::Tensor& output) {
    return torch::autograd::grad({output.pow(2).sum()}, {x}, {}, true, true)[0];
  };
  first(layer->forward(x)).sum().backward();  // without autocast there is one
  CHECK(layer->weight.grad().defined());
  const Autocast on(at::kCPU);
  CHECK_THROWS_WITH(first(layer->forward(x)),
                    Contains("create_graph") && Contains("Use torch::nn::Linear"));
}

TEST_CASE("Linear says which shapes do not fit", "[nn]") {
  nn::Linear layer(4, 2);
  const Autocast on(at::kCPU);
  CHECK_THROWS_WITH(layer->forward(torch::randn({3, 5})),
                    Contains("[3, 5]") && Contains("[2, 4]") && Contains("in_features"));
}

TEST_CASE("under autocast on a GPU Linear is as near to float64 as plain ATen", "[nn][gpu]") {
  if (!torch::cuda::is_available()) {
    WARN("needs a GPU");
    return;
  }
  torch::manual_seed(1);
  const auto [rows, in, out, bias] =
      GENERATE(table<int64_t, int64_t, int64_t, bool>({{4096, 768, 2304, true},
                                                       {4096, 3072, 768, true},
                                                       {1000, 96, 40, false},
                                                       {77, 33, 17, true},
                                                       {1, 5, 3, true}}));
  nn::Linear layer(torch::nn::LinearOptions(in, out).bias(bias));
  layer->to(torch::kCUDA);
  const auto input = torch::randn({2, rows, in}, torch::kCUDA);
  const auto gradient = torch::randn({2, rows, out}, torch::kCUDA);
  const auto leaves = parameters_of(*layer);
  const auto floats = copies_of(leaves, at::kFloat), doubles = copies_of(leaves, at::kDouble);
  const auto ours = results_of([&](const at::Tensor& x) { return layer->forward(x); }, leaves,
                               input, gradient, true);
  const auto aten = results_of([&](const at::Tensor& x) { return plain(floats, x); }, floats, input,
                               gradient, true);
  const auto exact = results_of([&](const at::Tensor& x) { return plain(doubles, x); }, doubles,
                                input.to(at::kDouble), gradient);
  for (const auto& [name, value] : exact) {
    const auto error = relative_error(ours.at(name), value);
    const auto allowed = relative_error(aten.at(name), value);
    CAPTURE(rows, in, out, name, error, allowed);
    // Of few elements the errors are chance: one more rounding to bfloat16.
    const double chance = value.numel() < 16 ? 2e-3 : 1e-6;
    CHECK(error <= 1.2 * allowed + chance);
    if (name != "output") CHECK(ours.at(name).scalar_type() == at::kFloat);
  }
}

TEST_CASE("in 16 bits on a GPU Linear is as near to float64 as at::linear", "[nn][gpu]") {
  if (!torch::cuda::is_available()) {
    WARN("needs a GPU");
    return;
  }
  torch::manual_seed(2);
  const auto dtype = GENERATE(at::kBFloat16, at::kHalf);
  const bool bias = GENERATE(true, false);
  for (const auto& [rows, in, out] :
       std::vector<std::tuple<int64_t, int64_t, int64_t>>{{4096, 768, 2304}, {77, 33, 17}}) {
    nn::Linear layer(torch::nn::LinearOptions(in, out).bias(bias));
    layer->to(torch::kCUDA, dtype);
    const auto input = torch::randn({2, rows, in}, torch::kCUDA).to(dtype);
    const auto gradient = torch::randn({2, rows, out}, torch::kCUDA).to(dtype);
    const auto leaves = parameters_of(*layer);
    const auto same = copies_of(leaves, dtype), doubles = copies_of(leaves, at::kDouble);
    const auto ours =
        results_of([&](const at::Tensor& x) { return layer->forward(x); }, leaves, input, gradient);
    const auto aten =
        results_of([&](const at::Tensor& x) { return plain(same, x); }, same, input, gradient);
    const auto exact = results_of([&](const at::Tensor& x) { return plain(doubles, x); }, doubles,
                                  input.to(at::kDouble), gradient);
    for (const auto& [name, value] : exact) {
      const auto error = relative_error(ours.at(name), value);
      const auto allowed = relative_error(aten.at(name), value);
      CAPTURE(dtype, bias, rows, in, out, name, error, allowed);
      CHECK(error <= 1.2 * allowed + 1e-4);
      CHECK(ours.at(name).scalar_type() == dtype);
    }
    const torch::NoGradGuard no_grad;
    CHECK(layer->forward(input.slice(0, 0, 0)).numel() == 0);
  }
}
