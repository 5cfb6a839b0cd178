#include "lightning/nn/rms_norm.h"

#include <torch/torch.h>

#include <catch2/catch.hpp>
#include <sstream>

#include "tests/nn/gradients.h"
#include "tests/nn/norm_kernels.h"
#include "tests/support/python.h"

using namespace lightning;
using namespace lightning::testing;
using Catch::Contains;

namespace {

at::Tensor exact_norm(const at::Tensor& x, const at::Tensor& weight, double eps) {
  const auto h = x * (x.square().mean(-1, true) + eps).rsqrt();
  return weight.defined() ? h * weight : h;
}

void compare(const at::Tensor& input, bool affine, bool autocast, double tolerance) {
  const auto width = input.size(-1);
  nn::RMSNorm layer(nn::RMSNormOptions({width}).eps(1e-5).elementwise_affine(affine));
  layer->to(input.device());
  if (!autocast) layer->to(input.scalar_type());
  if (affine) {
    const at::NoGradGuard no_grad;
    layer->weight.copy_(at::randn_like(layer->weight));
  }
  const auto leaves = parameters_of(*layer);
  const auto exact = copies_of(leaves, at::kDouble);
  const auto dtype = autocast ? at::kBFloat16 : input.scalar_type();
  const auto gradient = at::randn_like(input, at::MemoryFormat::Contiguous).to(dtype);
  const auto got = results_of([&](const at::Tensor& x) { return layer->forward(x); }, leaves, input,
                              gradient, autocast);
  const auto expected = results_of(
      [&](const at::Tensor& x) {
        return exact_norm(x, affine ? exact.at("weight") : at::Tensor(), 1e-5);
      },
      exact, input.to(at::kDouble), gradient.to(at::kDouble));
  CHECK(got.at("output").scalar_type() == dtype);
  CHECK(got.at("input").scalar_type() == input.scalar_type());
  for (const auto& [name, value] : expected) {
    INFO(name);
    CHECK(got.at(name).sizes() == value.sizes());
    CHECK(relative_error(got.at(name), value) <= tolerance);
  }
}

void compare_adding(const at::Tensor& residual, const at::Tensor& delta, bool autocast,
                    double tolerance) {
  const auto width = residual.size(-1);
  nn::AddRMSNorm layer(nn::RMSNormOptions({width}).eps(1e-5));
  layer->to(residual.device());
  if (!autocast) layer->to(residual.scalar_type());
  const auto dtype = autocast ? at::kBFloat16 : residual.scalar_type();
  const auto r = residual.detach().requires_grad_(), d = delta.detach().requires_grad_();
  at::Tensor sum, normalized;
  {
    std::optional<Autocast> on;
    if (autocast) on.emplace(residual.device().type());
    std::tie(sum, normalized) = layer(r, d);
  }
  CHECK(sum.scalar_type() == residual.scalar_type());
  CHECK(normalized.scalar_type() == dtype);
  const auto grad = at::randn(residual.sizes(), residual.options()).to(at::kBFloat16);
  torch::autograd::backward({sum, normalized},
                            {grad.to(sum.scalar_type()), grad.to(normalized.scalar_type())});

  const auto x = residual.to(at::kDouble).detach().requires_grad_();
  const auto weight = layer->weight.detach().to(at::kDouble).requires_grad_();
  const auto exact_sum = x + delta.to(at::kDouble);
  const auto exact = exact_norm(exact_sum, weight, 1e-5);
  torch::autograd::backward({exact_sum, exact}, {grad.to(at::kDouble), grad.to(at::kDouble)});
  CHECK(relative_error(sum, exact_sum) <= tolerance);
  CHECK(relative_error(normalized, exact) <= tolerance);
  CHECK(relative_error(r.grad(), x.grad()) <= tolerance);
  CHECK(relative_error(d.grad(), x.grad()) <= tolerance);
  CHECK(relative_error(layer->weight.grad(), weight.grad()) <= tolerance);
}

}  // namespace

TEST_CASE("RMSNorm gives every gradient of its formula, of any rank and with any strides", "[nn]") {
  torch::manual_seed(1);
  for (const bool affine : {true, false}) {
    for (const int64_t width : {1, 5, 8}) {
      CAPTURE(affine, width);
      compare(at::randn({width}, at::kDouble), affine, false, 1e-10);
      compare(at::randn({2, 3, width}, at::kDouble), affine, false, 1e-10);
      compare(at::randn({width, 7}, at::kDouble).t(), affine, false, 1e-10);
    }
  }
  compare(at::randn({6, 16}), true, true, 6e-3);
  compare(at::randn({6, 16}).to(at::kBFloat16), true, true, 6e-3);
}

TEST_CASE("AddRMSNorm gives the sum, its norm and their gradients", "[nn]") {
  torch::manual_seed(2);
  compare_adding(at::randn({3, 2, 5}, at::kDouble), at::randn({3, 2, 5}, at::kDouble), false,
                 1e-12);
  compare_adding(at::randn({3, 16}), at::randn({3, 16}), true, 1e-2);
  compare_adding(at::randn({3, 16}), at::randn({3, 16}).to(at::kBFloat16), true, 1e-2);
}

TEST_CASE("RMSNorm has the values of Python's torch.nn.RMSNorm, with its epsilon by default",
          "[nn]") {
  const auto printed = run_python(R"(
import torch
for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
    for eps in (None, 0.1):
        x = (torch.arange(24, dtype=torch.float64).sin() * 1e-3).to(dtype).view(2, 3, 4)
        norm = torch.nn.RMSNorm((3, 4), eps=eps, dtype=dtype)
        torch.nn.init.constant_(norm.weight, 1.25)
        print(*(f"{v:.17g}" for v in norm(x).double().flatten().tolist()))
)");
  std::istringstream lines(printed);
  for (const auto dtype : {at::kDouble, at::kFloat, at::kBFloat16, at::kHalf}) {
    for (const auto eps : {std::optional<double>(), std::optional<double>(0.1)}) {
      nn::RMSNorm layer(nn::RMSNormOptions({3, 4}).eps(eps));
      layer->to(dtype);
      {
        const at::NoGradGuard no_grad;
        layer->weight.fill_(1.25);
      }
      const auto x = (at::arange(24, at::kDouble).sin() * 1e-3).to(dtype).view({2, 3, 4});
      const auto got = layer(x).to(at::kDouble).flatten();
      for (int64_t i = 0; i < 24; ++i) {
        double expected = 0;
        lines >> expected;
        CAPTURE(dtype, eps.has_value(), i);
        CHECK(got[i].item<double>() == expected);
      }
    }
  }
}

TEST_CASE("RMSNorm has Python's parameters and says what it is", "[nn]") {
  nn::RMSNorm layer(std::vector<int64_t>{8});
  CHECK(layer->named_parameters().keys() == std::vector<std::string>{"weight"});
  CHECK(at::equal(layer->weight, at::ones({8})));
  CHECK(nn::RMSNorm(nn::RMSNormOptions({8}).elementwise_affine(false))->parameters().empty());
  std::ostringstream text;
  layer->pretty_print(text);
  CHECK(text.str() == "lightning::nn::RMSNorm([8], eps=None, elementwise_affine=true)");
  CHECK(std::dynamic_pointer_cast<nn::RMSNormImpl>(layer->clone()) != nullptr);
  nn::AddRMSNorm adds(std::vector<int64_t>{8});
  CHECK(std::dynamic_pointer_cast<nn::AddRMSNormImpl>(adds->clone()) != nullptr);
}

TEST_CASE("RMSNorm's kernels agree with float64 and write every element", "[nn][gpu]") {
  if (!torch::cuda::is_available()) {
    WARN("needs a GPU");
    return;
  }
  check_norm_kernels(/*centred=*/false, /*adds=*/false);
  check_norm_kernels(/*centred=*/false, /*adds=*/true);
}

TEST_CASE("RMSNorm and AddRMSNorm on a GPU agree with float64", "[nn][gpu]") {
  if (!torch::cuda::is_available()) {
    WARN("needs a GPU");
    return;
  }
  torch::manual_seed(3);
  for (const int64_t width : {7, 768, 20000}) {
    for (const auto dtype : {at::kFloat, at::kHalf, at::kBFloat16}) {
      CAPTURE(width, dtype);
      const auto options = at::device(at::kCUDA).dtype(dtype);
      const double exact = dtype == at::kFloat ? 1e-5 : 1e-2;
      compare(at::randn({5, 3, width}, options), true, false, exact);
      compare(at::randn({width, 9}, options).t(), false, false, exact);
      compare(at::randn({9, width}, options), true, true, 1e-2);
      compare_adding(at::randn({9, width}, options), at::randn({9, width}, options), false,
                     2 * exact);
      compare_adding(at::randn({9, width}, options), at::randn({9, width}, options), true, 2e-2);
    }
  }
}
