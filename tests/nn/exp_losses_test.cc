#include "lightning/nn/exp_losses.h"

#include <torch/torch.h>

#include <algorithm>
#include <catch2/catch.hpp>
#include <cmath>
#include <limits>
#include <tuple>

#include "lightning/cuda/device.h"
#include "lightning/cuda/exp_product.h"
#include "tests/nn/gradients.h"

using namespace lightning;
using namespace lightning::testing;

namespace {

struct Case {
  at::Tensor hidden, weight;
  nn::RowTargets targets;
};

Case case_of(int64_t rows, int64_t depth, int64_t classes, double spread, at::Device device) {
  const auto options = at::device(device).dtype(at::kBFloat16);
  return {at::randn({rows, depth}, options),
          (spread / std::sqrt(depth) * at::randn({classes, depth}, options)).to(at::kBFloat16),
          {torch::randint(classes, {rows}, at::device(device).dtype(at::kLong))}};
}

struct Truth {
  at::Tensor losses, gradient;
};

// In float64, of the 16-bit inputs as they are.
Truth truth_of(const Case& c) {
  const auto logits = at::linear(c.hidden.to(at::kDouble), c.weight.to(at::kDouble));
  const auto ignored = c.targets.classes.eq(c.targets.ignore_index);
  const auto columns = c.targets.classes.masked_fill(ignored, 0).unsqueeze(1);
  auto gradient = at::softmax(logits, 1);
  const auto losses = -at::log_softmax(logits, 1).gather(1, columns).squeeze(1);
  gradient.scatter_add_(1, columns, at::full_like(columns, -1, gradient.options()));
  return {losses.masked_fill(ignored, 0), gradient.masked_fill(ignored.unsqueeze(1), 0)};
}

at::Tensor scaled(const nn::ExpLosses& result) {
  return result.gradient.to(at::kDouble) * result.scales.unsqueeze(1);
}

bool no_hopper() {
  if constexpr (cuda::kExpProductBuilt) {
    if (torch::cuda::is_available() && cuda::compute_capability(0) == 90) return false;
  }
  WARN("needs a Hopper GPU and a build with CUTLASS");
  return true;
}

}  // namespace

TEST_CASE("losses by exponentials are left to others where there is no kernel", "[nn]") {
  const auto c = case_of(16, 8, 16, 1, at::kCPU);
  CHECK_FALSE(nn::exp_losses(c.hidden, c.weight, c.targets));
}

TEST_CASE("on Hopper losses by exponentials are float64's but for the gradient's own rounding",
          "[nn][gpu]") {
  if (no_hopper()) return;
  torch::manual_seed(1);
  const auto [rows, depth, classes] =
      GENERATE(std::tuple<int64_t, int64_t, int64_t>{300, 96, 1000}, std::tuple{1, 8, 8},
               std::tuple{129, 64, 192}, std::tuple{128, 72, 200}, std::tuple{64, 768, 50304});
  auto c = case_of(rows, depth, classes, 3, at::kCUDA);
  if (rows > 5) c.targets.classes[5] = c.targets.ignore_index;
  CAPTURE(rows, depth, classes);
  const auto truth = truth_of(c);
  const auto result = nn::exp_losses(c.hidden, c.weight, c.targets);
  REQUIRE(result);
  CHECK((result->losses - truth.losses).abs().max().item<double>() < 1e-4);
  CHECK(relative_error(scaled(*result), truth.gradient) < 2e-3);
  const auto again = nn::exp_losses(c.hidden, c.weight, c.targets);
  CHECK(at::equal(again->losses, result->losses));
  CHECK(at::equal(again->gradient, result->gradient));
  CHECK(at::equal(again->scales, result->scales));
}

TEST_CASE("on Hopper a target that is too unlikely for exponentials has its loss all the same",
          "[nn][gpu]") {
  if (no_hopper()) return;
  torch::manual_seed(2);
  const double spread = GENERATE(10.0, 40.0, 300.0);
  auto c = case_of(200, 64, 504, spread, at::kCUDA);
  c.targets.classes[7] = c.targets.ignore_index;
  CAPTURE(spread);
  const auto truth = truth_of(c);
  const auto result = nn::exp_losses(c.hidden, c.weight, c.targets);
  REQUIRE(result);
  // Logits that are written are rounded to 16 bits.
  const auto off = spread * 8 / 256;
  CHECK((result->losses - truth.losses).abs().max().item<double>() < off);
  CHECK((scaled(*result) - truth.gradient).abs().max().item<double>() < std::min(off, 1.0));
  CHECK(result->scales[7].item<double>() * result->gradient[7].abs().max().item<double>() == 0);
}

TEST_CASE("on Hopper a row that is not a number stays alone with it", "[nn][gpu]") {
  if (no_hopper()) return;
  torch::manual_seed(3);
  auto c = case_of(40, 16, 64, 1, at::kCUDA);
  const auto truth = truth_of(c);
  c.hidden[3].fill_(std::numeric_limits<double>::quiet_NaN());
  const auto result = nn::exp_losses(c.hidden, c.weight, c.targets);
  REQUIRE(result);
  CHECK(result->losses.isnan().nonzero().item<int64_t>() == 3);
  const auto others = at::arange(4, 40, at::kCUDA);
  CHECK(relative_error(scaled(*result).index_select(0, others),
                       truth.gradient.index_select(0, others)) < 2e-2);
}

TEST_CASE("on Hopper losses by exponentials are refused for what their kernel does not take",
          "[nn][gpu]") {
  if (no_hopper()) return;
  const auto c = case_of(16, 8, 16, 1, at::kCUDA);
  const auto refused = [](const Case& of) {
    return !nn::exp_losses(of.hidden, of.weight, of.targets).has_value();
  };
  CHECK_FALSE(refused(c));
  auto smoothed = c;
  smoothed.targets.label_smoothing = 0.1;
  CHECK(refused(smoothed));
  CHECK(refused({c.hidden, c.weight.narrow(0, 0, 15), c.targets}));
  CHECK(refused({c.hidden.to(at::kHalf), c.weight.to(at::kHalf), c.targets}));
  CHECK(refused({at::randn({8, 16}, c.hidden.options()).t(), c.weight, c.targets}));
}
