#include "lightning/nn/add_layer_norm.h"

#include <torch/torch.h>

#include <catch2/catch.hpp>

#include "lightning/nn/linear.h"
#include "tests/nn/gradients.h"
#include "tests/nn/norm_kernels.h"

using namespace lightning;
using namespace lightning::testing;

namespace {

enum class Uses { kBoth, kResidual, kNormalized };

// The residual's and delta's gradients and the parameters', for gradients of both outputs or one.
template <class Add>
Tensors gradients_of(const Add& add, const at::Tensor& residual, const at::Tensor& delta,
                     const Tensors& leaves, const std::vector<at::Tensor>& grads, Uses uses,
                     bool autocast) {
  const auto r = residual.detach().requires_grad_(), d = delta.detach().requires_grad_();
  at::Tensor sum, normalized;
  {
    std::optional<Autocast> on;
    if (autocast) on.emplace(residual.device().type());
    std::tie(sum, normalized) = add(r, d);
  }
  std::vector<at::Tensor> outputs, given;
  if (uses != Uses::kNormalized) {
    outputs.push_back(sum);
    given.push_back(grads[0].to(sum.scalar_type()));
  }
  if (uses != Uses::kResidual) {
    outputs.push_back(normalized);
    given.push_back(grads[1].to(normalized.scalar_type()));
  }
  torch::autograd::backward(outputs, given);
  Tensors result{{"sum", sum.detach()},
                 {"normalized", normalized.detach()},
                 {"residual", r.grad()},
                 {"delta", d.grad()}};
  for (auto [name, leaf] : leaves) {
    result[name] = leaf.grad();
    leaf.mutable_grad().reset();
  }
  return result;
}

// Ours beside the sum and torch::nn::LayerNorm in float64.
void compare(const at::Tensor& residual, const at::Tensor& delta, bool autocast, Uses uses,
             double tolerance) {
  const auto width = residual.size(-1);
  nn::AddLayerNorm layer(std::vector<int64_t>{width});
  torch::nn::LayerNorm plain(std::vector<int64_t>{width});
  layer->to(residual.device());
  plain->to(residual.device(), at::kDouble);
  if (!autocast) layer->to(residual.scalar_type());
  const auto leaves = parameters_of(*layer), exact = parameters_of(*plain);
  for (const auto& [name, leaf] : leaves) {
    const at::NoGradGuard no_grad;
    leaf.copy_(at::randn_like(leaf));
    exact.at(name).copy_(leaf);
  }
  const auto sizes = residual.sizes();
  const std::vector<at::Tensor> grads = {at::randn(sizes, residual.options()).to(at::kBFloat16),
                                         at::randn(sizes, residual.options()).to(at::kBFloat16)};
  const auto got = gradients_of([&](const auto& r, const auto& d) { return layer(r, d); }, residual,
                                delta, leaves, grads, uses, autocast);
  const auto expected = gradients_of(
      [&](const auto& r, const auto& d) {
        const auto sum = r + d;
        return std::make_tuple(sum, plain(sum));
      },
      residual.to(at::kDouble), delta.to(at::kDouble), exact, grads, uses, false);
  CHECK(got.at("sum").scalar_type() == residual.scalar_type());
  CHECK(got.at("normalized").scalar_type() == (autocast ? at::kBFloat16 : residual.scalar_type()));
  CHECK(got.at("delta").scalar_type() == delta.scalar_type());
  for (const auto& [name, value] : expected) {
    INFO(name);
    CHECK(got.at(name).defined() == value.defined());
    if (value.defined()) CHECK(relative_error(got.at(name), value) <= tolerance);
  }
}

}  // namespace

TEST_CASE("AddLayerNorm gives the sum, its norm and every gradient of the two steps", "[nn]") {
  torch::manual_seed(1);
  const auto uses = GENERATE(Uses::kBoth, Uses::kResidual, Uses::kNormalized);
  for (const int64_t width : {1, 5, 8}) {
    const auto residual = at::randn({3, 2, width}, at::kDouble);
    CAPTURE(width, static_cast<int>(uses));
    compare(residual, at::randn({3, 2, width}, at::kDouble), false, uses, 1e-12);
    compare(residual.transpose(0, 1), at::randn({2, 3, width}, at::kDouble), false, uses, 1e-12);
  }
}

TEST_CASE("AddLayerNorm under autocast keeps a float32 stream and normalizes in 16 bits", "[nn]") {
  torch::manual_seed(2);
  const auto uses = GENERATE(Uses::kBoth, Uses::kResidual, Uses::kNormalized);
  const auto residual = at::randn({3, 5, 16});
  compare(residual, at::randn({3, 5, 16}), true, uses, 1e-2);
  compare(residual, at::randn({3, 5, 16}).to(at::kBFloat16), true, uses, 1e-2);
  compare(residual.to(at::kBFloat16), at::randn({3, 5, 16}), true, uses, 1e-2);
}

TEST_CASE("A copy of AddLayerNorm is an AddLayerNorm with its values", "[nn]") {
  nn::AddLayerNorm layer(std::vector<int64_t>{4});
  {
    const at::NoGradGuard no_grad;
    layer->weight.fill_(3);
  }
  const auto copy = std::dynamic_pointer_cast<nn::AddLayerNormImpl>(layer->clone());
  REQUIRE(copy != nullptr);
  CHECK(at::equal(copy->weight, layer->weight));
}

TEST_CASE("AddLayerNorm's kernels agree with float64 and write every element", "[nn][gpu]") {
  if (!torch::cuda::is_available()) {
    WARN("needs a GPU");
    return;
  }
  check_norm_kernels(/*centred=*/true, /*adds=*/true);
}

TEST_CASE("AddLayerNorm on a GPU agrees with float64 whichever outputs are used", "[nn][gpu]") {
  if (!torch::cuda::is_available()) {
    WARN("needs a GPU");
    return;
  }
  torch::manual_seed(3);
  const auto uses = GENERATE(Uses::kBoth, Uses::kResidual, Uses::kNormalized);
  for (const int64_t width : {7, 768, 20000}) {
    const auto residual = at::randn({4, 3, width}, at::device(at::kCUDA));
    const auto delta = at::randn({4, 3, width}, at::device(at::kCUDA));
    CAPTURE(width, static_cast<int>(uses));
    compare(residual, delta, false, uses, 1e-5);
    compare(residual.transpose(0, 1), delta.transpose(0, 1), false, uses, 1e-5);
    compare(residual, delta, true, uses, 1e-2);
    compare(residual, delta.to(at::kBFloat16), true, uses, 1e-2);
    compare(residual.to(at::kBFloat16), delta.to(at::kBFloat16), false, uses, 2e-2);
    compare(residual.to(at::kBFloat16), delta, true, uses, 2e-2);
  }
}

TEST_CASE("on a GPU a bias before AddLayerNorm gets its gradient from the norm", "[nn][gpu]") {
  if (!torch::cuda::is_available()) {
    WARN("needs a GPU");
    return;
  }
  torch::manual_seed(1);
  for (const auto stream : {at::kFloat, at::kBFloat16}) {
    nn::Linear linear(768, 768);
    nn::AddLayerNorm norm(std::vector<int64_t>{768});
    linear->to(at::kCUDA);
    norm->to(at::kCUDA);
    const auto residual = at::randn({3, 1000, 768}, at::device(at::kCUDA).dtype(stream));
    const auto input = at::randn({3, 1000, 768}, at::device(at::kCUDA)).requires_grad_();
    at::Tensor sum, normalized, delta;
    {
      const Autocast on(at::kCUDA);
      delta = linear->forward(input);
      delta.retain_grad();
      std::tie(sum, normalized) = norm->forward(residual, delta);
    }
    (sum.pow(2).mean() * 0.1 + normalized.pow(3).mean()).backward();
    const auto exact = delta.grad().to(at::kDouble).sum(at::IntArrayRef{0, 1});
    CHECK(relative_error(linear->bias.grad(), exact) <= 5e-3);
  }
}
