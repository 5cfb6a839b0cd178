#include <torch/torch.h>

#include <catch2/catch.hpp>
#include <vector>

namespace {

// Sums in 16 bits that a second rounding would change.
at::Tensor rounded_twice(const torch::nn::Linear& linear, const at::Tensor& input) {
  return input.matmul(linear->weight.t()) + linear->bias;
}

}  // namespace

TEST_CASE("torch::nn::Linear adds its bias within the product, as Python's does", "[nn]") {
  torch::manual_seed(1);
  torch::nn::Linear linear(64, 48);
  torch::nn::Sequential sequence(linear);
  linear->to(at::kBFloat16);
  const auto input = torch::randn({4, 32, 64}).to(at::kBFloat16);
  const auto expected = at::linear(input, linear->weight, linear->bias);
  CHECK(at::equal(linear->forward(input), expected));
  CHECK(at::equal(linear(input), expected));
  CHECK(at::equal(sequence->forward(input), expected));
  CHECK_FALSE(at::equal(expected, rounded_twice(linear, input)));
}

TEST_CASE("torch::nn::Linear takes every rank, no bias, and a second derivative", "[nn]") {
  torch::manual_seed(1);
  const auto options = torch::nn::LinearOptions(5, 3).bias(GENERATE(true, false));
  torch::nn::Linear linear(options);
  linear->to(at::kDouble);
  for (const auto& sizes : std::vector<std::vector<int64_t>>{{5}, {2, 5}, {2, 3, 5}, {0, 5}}) {
    CAPTURE(sizes);
    const auto input = torch::randn(sizes, at::kDouble);
    auto expected = input.matmul(linear->weight.t());
    if (options.bias()) expected = expected + linear->bias;
    CHECK(at::allclose(linear->forward(input), expected));
  }
  const auto input = torch::randn({4, 5}, at::kDouble).requires_grad_();
  const auto output = linear->forward(input).square().sum();
  const auto first = torch::autograd::grad({output}, {input}, {}, true, /*create_graph=*/true)[0];
  const auto second = torch::autograd::grad({first.sum()}, {input})[0];
  CHECK(
      at::allclose(second, (2 * linear->weight.t().matmul(linear->weight)).sum(0).expand({4, 5})));
}
