#include "lightning/metrics/mean_squared_error.h"

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/zeros.h>

#include "lightning/errors.h"

namespace lightning {
namespace {

enum : size_t { kSum, kTotal };

}  // namespace

MeanError::MeanError(const char* metric, const char* sum_name, int64_t num_outputs)
    : metric_(metric), num_outputs_(num_outputs) {
  if (num_outputs_ < 1) {
    throw MisconfigurationError(
        str(metric_, " got num_outputs ", num_outputs_, ", expected 1 or the number of columns."));
  }
  add_state(sum_name, num_outputs_ == 1 ? at::zeros({}) : at::zeros({num_outputs_}),
            Reduction::kSum);
  add_state("total", at::zeros({}, at::kLong), Reduction::kSum);
}

void MeanError::update(const at::Tensor& preds, const at::Tensor& target) {
  const at::NoGradGuard no_grad;
  follow(preds);
  const bool columns_fit = num_outputs_ == 1 || (preds.dim() == 2 && preds.size(1) == num_outputs_);
  if (!target.defined() || preds.sizes() != target.sizes() || !columns_fit) {
    throw MisconfigurationError(lightning::str(
        metric_, " got predictions of shape ", preds.sizes(), " and targets of shape ",
        target.defined() ? target.sizes() : at::IntArrayRef(), ", expected the same shape for both",
        num_outputs_ == 1 ? "" : str(", [N, ", num_outputs_, "]"), "."));
  }
  const auto as_float = [](const at::Tensor& x) {
    return x.is_floating_point() ? x : x.to(at::kFloat);
  };
  const at::Tensor errors = error(as_float(preds) - as_float(target));
  state(kSum).add_(num_outputs_ == 1 ? errors.sum() : errors.sum(0));
  state(kTotal).add_(num_outputs_ == 1 ? preds.numel() : preds.size(0));
}

at::Tensor MeanError::compute() const { return state(kSum) / state(kTotal); }

MeanSquaredError::MeanSquaredError(MeanSquaredErrorOptions options)
    : MeanError("MeanSquaredError", "sum_squared_error", options.num_outputs()),
      options_(std::move(options)) {}

at::Tensor MeanSquaredError::error(const at::Tensor& difference) const {
  return difference * difference;
}

at::Tensor MeanSquaredError::compute() const {
  const at::Tensor mean = MeanError::compute();
  return options_.squared() ? mean : mean.sqrt();
}

MeanAbsoluteError::MeanAbsoluteError(MeanAbsoluteErrorOptions options)
    : MeanError("MeanAbsoluteError", "sum_abs_error", options.num_outputs()) {}

at::Tensor MeanAbsoluteError::error(const at::Tensor& difference) const { return difference.abs(); }

}  // namespace lightning
