#include <torch/torch.h>

#include <array>
#include <catch2/catch.hpp>
#include <vector>

#include "tests/nn/gradients.h"

using namespace lightning;
using namespace lightning::testing;

namespace {

bool no_gpu() {
  if (torch::cuda::is_available()) return false;
  WARN("needs a GPU");
  return true;
}

}  // namespace

TEST_CASE("under autocast on a GPU torch::nn::Linear adds its bias in float32, rounded once",
          "[nn][gpu]") {
  if (no_gpu()) return;
  torch::manual_seed(1);
  const auto dtype = GENERATE(at::kBFloat16, at::kHalf);
  for (const auto& [batch, time, in, out] :
       std::vector<std::array<int64_t, 4>>{{2, 1000, 64, 768}, {3, 5, 8, 7}, {1, 1, 3, 1}}) {
    CAPTURE(dtype, batch, time, in, out);
    torch::nn::Linear linear(in, out);
    linear->to(at::kCUDA);
    const auto x = at::randn({batch, time, in}, at::kCUDA).requires_grad_();
    const auto gradient = at::randn({batch, time, out}, at::kCUDA).to(dtype);
    at::Tensor output, product;
    {
      const Autocast on(at::kCUDA, dtype);
      output = linear->forward(x);
      const torch::NoGradGuard no_grad;
      product = x.matmul(linear->weight.t());
      CHECK(at::equal(linear->forward(x), output));  // without a graph
    }
    CHECK(output.scalar_type() == dtype);
    CHECK(at::equal(output, (product.to(at::kFloat) + linear->bias).to(dtype)));
    output.backward(gradient);
    const auto exact = gradient.to(at::kDouble).sum(at::IntArrayRef{0, 1});
    CHECK(linear->bias.grad().scalar_type() == at::kFloat);
    CHECK(relative_error(linear->bias.grad(), exact) <= 1e-5);
    CHECK(linear->weight.grad().defined());
    CHECK(x.grad().defined());
  }
}

TEST_CASE("on a GPU torch::nn::Linear in 16 bits adds its bias as LibTorch does", "[nn][gpu]") {
  if (no_gpu()) return;
  torch::manual_seed(1);
  const auto dtype = GENERATE(at::kBFloat16, at::kHalf);
  for (const auto& [batch, time, in, out] :
       std::vector<std::array<int64_t, 4>>{{2, 1000, 64, 768}, {3, 5, 8, 7}, {1, 1, 3, 1}}) {
    CAPTURE(dtype, batch, time, in, out);
    torch::nn::Linear linear(in, out);
    linear->to(at::kCUDA, dtype);
    const auto x = at::randn({batch, time, in}, at::kCUDA).to(dtype).requires_grad_();
    const auto output = linear->forward(x);
    const auto product = x.matmul(linear->weight.t());
    CHECK(at::equal(output, product + linear->bias));
    const auto version = product._version();
    const torch::NoGradGuard no_grad;
    product.add_(linear->bias);
    CHECK(at::equal(product, output));
    CHECK(product._version() == version + 1);
    const auto gradient = at::randn_like(output);
    const torch::AutoGradMode with_gradients(true);
    output.backward(gradient);
    CHECK(at::equal(linear->bias.grad(), gradient.sum(at::IntArrayRef{0, 1})));
  }
}

TEST_CASE("under autocast on a GPU a bias that was added can be differentiated twice",
          "[nn][gpu]") {
  if (no_gpu()) return;
  torch::nn::Linear linear(8, 16);
  linear->to(at::kCUDA);
  const auto x = at::randn({2, 3, 8}, at::kCUDA).requires_grad_();
  at::Tensor output;
  {
    const Autocast on(at::kCUDA);
    output = linear->forward(x);
  }
  const auto first = torch::autograd::grad({output.to(at::kFloat).pow(2).sum()}, {linear->bias}, {},
                                           /*retain_graph=*/true, /*create_graph=*/true)[0];
  first.sum().backward();
  // The sum of squares of rows y = p + b: twice the derivative is 2 a row and an element.
  CHECK(at::allclose(linear->bias.grad(), at::full({16}, 12.0, linear->bias.options())));
}

TEST_CASE("under autocast on a GPU other sums in place are LibTorch's own", "[nn][gpu]") {
  if (no_gpu()) return;
  const auto options = at::device(at::kCUDA).dtype(at::kBFloat16);
  const auto bias = at::randn({8}, at::kCUDA);
  const auto sum_of = [&](at::Tensor rows, const at::Tensor& other, double alpha = 1) {
    const auto exact = (rows.to(at::kFloat) + alpha * other.to(at::kFloat)).to(rows.scalar_type());
    const Autocast on(at::kCUDA);
    rows.add_(other, alpha);
    CHECK(at::equal(rows, exact));
  };
  auto square = at::randn({8, 8}, options);
  const auto first = (square + square[0]).clone();
  square.add_(square[0].clone());
  CHECK(at::equal(square, first));
  sum_of(at::randn({4, 8}, options), bias);
  sum_of(at::randn({8, 4}, options).t(), bias);
  sum_of(at::randn({4, 16}, options).narrow(1, 8, 8), bias);
  sum_of(at::randn({4, 8}, options), at::randn({4, 8}, at::kCUDA));
  sum_of(at::randn({4, 8}, options), at::randn({1}, at::kCUDA));
  sum_of(at::randn({4, 8}, options), bias.to(at::kBFloat16));
  sum_of(at::randn({4, 8}, at::kCUDA), bias);
  sum_of(at::randn({0, 8}, options), bias);
  // A leaf that wants a gradient cannot be written.
  const Autocast on(at::kCUDA);
  auto leaf = at::randn({4, 8}, options).requires_grad_();
  CHECK_THROWS(leaf += bias);
}
