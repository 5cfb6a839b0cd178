#include "lightning/metrics/r2_score.h"

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <c10/core/InferenceMode.h>

#include <algorithm>
#include <limits>

#include "lightning/errors.h"

namespace lightning {
namespace {

enum : size_t { kSumSquared, kSum, kResidual, kTotal };

const std::vector<std::string> kMultioutput = {"raw_values", "uniform_average",
                                               "variance_weighted"};

// Sums below this count as 0, as in the original.
constexpr double kNothing = 1e-4;

}  // namespace

R2Score::R2Score(R2ScoreOptions options) : options_(std::move(options)) {
  if (options_.adjusted() < 0) {
    throw MisconfigurationError(
        str("R2Score got adjusted ", options_.adjusted(), ", expected 0 or more."));
  }
  const auto& multioutput = options_.multioutput();
  if (std::count(kMultioutput.begin(), kMultioutput.end(), multioutput) == 0) {
    throw MisconfigurationError(str("R2Score got multioutput \"", multioutput,
                                    "\", expected one of ", join(kMultioutput), ".",
                                    did_you_mean(multioutput, kMultioutput)));
  }
  const auto outputs = options_.num_outputs();
  if (outputs && *outputs < 1) {
    throw MisconfigurationError(
        str("R2Score got num_outputs ", *outputs, ", expected the number of columns."));
  }
  const auto zeros = outputs && *outputs > 1 ? at::zeros({*outputs}) : at::zeros({});
  for (const char* name : {"sum_squared_error", "sum_error", "residual"}) {
    add_state(name, zeros, Reduction::kSum);
  }
  add_state("total", at::zeros({}, at::kLong), Reduction::kSum);
}

void R2Score::add(size_t index, const at::Tensor& value) {
  at::Tensor& sum = state(index);
  if (sum.sizes() == value.sizes() && sum.scalar_type() == value.scalar_type()) {
    sum.add_(value);
  } else {  // the first batch gives shape and type
    const c10::InferenceMode off(false);
    sum = sum + value;
  }
}

void R2Score::update(const at::Tensor& preds, const at::Tensor& target) {
  const at::NoGradGuard no_grad;
  follow(preds);
  const auto outputs = options_.num_outputs();
  const bool columns_fit = !outputs || *outputs == (preds.dim() == 2 ? preds.size(1) : int64_t{1});
  if (!target.defined() || preds.sizes() != target.sizes() || preds.dim() < 1 || preds.dim() > 2 ||
      !columns_fit) {
    throw MisconfigurationError(lightning::str(
        "R2Score got predictions of shape ", preds.sizes(), " and targets of shape ",
        target.defined() ? target.sizes() : at::IntArrayRef(), ", expected [N] or [N, ",
        outputs ? std::to_string(*outputs) : "outputs", "] for both."));
  }
  const auto as_float = [](const at::Tensor& x) {
    const at::Tensor column = x.dim() == 2 && x.size(1) == 1 ? x.squeeze(1) : x;
    return column.is_floating_point() ? column : column.to(at::kFloat);
  };
  const at::Tensor y = as_float(target);
  const at::Tensor residual = y - as_float(preds);
  add(kSumSquared, (y * y).sum(0));
  add(kSum, y.sum(0));
  add(kResidual, (residual * residual).sum(0));
  state(kTotal).add_(y.size(0));
}

at::Tensor R2Score::compute() const {
  const at::NoGradGuard no_grad;
  const at::Tensor& rss = state(kResidual);
  const at::Tensor& n = state(kTotal);
  const at::Tensor tss = state(kSumSquared) - state(kSum) * (state(kSum) / n);
  const at::Tensor residual = rss.abs().le(kNothing).logical_not();
  const at::Tensor variance = tss.abs().le(kNothing).logical_not();
  const at::Tensor raw =
      at::where(residual, at::where(variance, 1 - rss / tss, at::zeros({}, rss.options())),
                at::ones_like(rss));
  at::Tensor score = raw;
  if (options_.multioutput() == "uniform_average") score = raw.mean();
  if (options_.multioutput() == "variance_weighted") score = (tss / tss.sum() * raw).sum();
  if (options_.adjusted() != 0) {
    // With no more samples than regressors the plain score stands, as in the original.
    const at::Tensor left = n - options_.adjusted() - 1;
    score = at::where(left.gt(0), 1 - (1 - score) * (n - 1) / left, score);
  }
  return at::where(n.lt(2), std::numeric_limits<double>::quiet_NaN(), score);
}

}  // namespace lightning
