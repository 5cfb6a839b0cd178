#include "lightning/nn/cross_entropy_rows.h"

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full_like.h>
#include <ATen/ops/logsumexp.h>
#include <ATen/ops/ones.h>
#include <c10/core/DeviceGuard.h>
#include <c10/util/Exception.h>

#include <limits>

#include "lightning/cuda/cross_entropy.h"
#include "lightning/cuda/launch.h"
#include "lightning/param/replay.h"

namespace lightning::nn {
namespace {

bool by_kernel(const at::Tensor& logits) {
  return cuda::has_dtype(logits.scalar_type()) && logits.size(1) > 0 &&
         logits.size(1) <= cuda::kMostClasses && cuda::can_run(logits);
}

cuda::CrossEntropyRows rows_of(const at::Tensor& logits, const RowTargets& targets) {
  cuda::CrossEntropyRows rows;
  rows.logits = logits.const_data_ptr();
  rows.dtype = cuda::dtype_of(logits);
  rows.rows = logits.size(0);
  rows.classes = logits.size(1);
  rows.row_stride = logits.stride(0);
  rows.targets = targets.classes.const_data_ptr<int64_t>();
  rows.ignore_index = targets.ignore_index;
  rows.label_smoothing = static_cast<float>(targets.label_smoothing);
  return rows;
}

// Rows that the kernels can step through: contiguous in themselves.
at::Tensor steppable(const at::Tensor& logits) {
  return logits.stride(1) == 1 || logits.size(1) == 1 ? logits : logits.contiguous();
}

at::Tensor is_ignored(const RowTargets& targets) {
  return targets.classes.eq(targets.ignore_index);
}

// [N, 1], with class 0 where a row is ignored.
at::Tensor columns_of(const at::Tensor& logits, const RowTargets& targets) {
  const auto columns = targets.classes.masked_fill(is_ignored(targets), 0);
  if (columns.is_cpu() && columns.numel() > 0) {
    const auto least = columns.min().item<int64_t>(), most = columns.max().item<int64_t>();
    TORCH_CHECK_INDEX(least >= 0 && most < logits.size(1), "The cross-entropy got a target of ",
                      least < 0 ? least : most, " for ", logits.size(1), " classes, expected 0 to ",
                      logits.size(1) - 1, " or the ignore_index, ", targets.ignore_index, ".");
  }
  return columns.unsqueeze(1);
}

RowLosses losses_by_aten(const at::Tensor& logits, const RowTargets& targets) {
  const auto values = logits.to(loss_dtype(logits.scalar_type()));
  const auto columns = columns_of(logits, targets);
  auto log_sums = at::logsumexp(values, {1}, /*keepdim=*/true);
  log_sums.masked_fill_(log_sums.isinf(), std::numeric_limits<double>::quiet_NaN());  // no softmax
  auto losses = log_sums - values.gather(1, columns);
  if (targets.label_smoothing != 0) {
    const auto of_all = log_sums - values.mean(1, /*keepdim=*/true);
    losses = losses * (1 - targets.label_smoothing) + of_all * targets.label_smoothing;
  }
  return {losses.squeeze(1).masked_fill_(is_ignored(targets), 0), log_sums};
}

// softmax - target, in the dtype of the losses; ignored rows are whatever they are.
at::Tensor difference_by_aten(const at::Tensor& logits, const at::Tensor& log_sums,
                              const RowTargets& targets) {
  auto difference = logits.to(log_sums.scalar_type()).sub(log_sums).exp_();
  const auto columns = columns_of(logits, targets);
  if (targets.label_smoothing != 0) {
    difference.sub_(targets.label_smoothing / static_cast<double>(logits.size(1)));
  }
  const auto wanted = at::full_like(columns, targets.label_smoothing - 1, difference.options());
  return difference.scatter_add_(1, columns, wanted);
}

void write_by_aten(const at::Tensor& gradient, const RowTargets& targets, const at::Tensor& into) {
  into.copy_(gradient.masked_fill_(is_ignored(targets).unsqueeze(1), 0));
}

// Losses, with whatever else the arguments ask for.
at::Tensor losses_by_kernel(const at::Tensor& logits, cuda::CrossEntropyForward arguments) {
  const c10::DeviceGuard guard(logits.device());
  const auto losses = at::empty({logits.size(0)}, logits.options().dtype(at::kFloat));
  arguments.losses = losses.mutable_data_ptr<float>();
  if constexpr (cuda::kBuilt) cuda::cross_entropy_forward(arguments, cuda::stream_of(logits));
  return losses;
}

}  // namespace

at::ScalarType loss_dtype(at::ScalarType logits) {
  return at::isReducedFloatingType(logits) ? at::kFloat : logits;
}

RowLosses cross_entropy_rows(const at::Tensor& logits, const RowTargets& targets) {
  const at::NoGradGuard no_grad;
  if (!by_kernel(logits)) return losses_by_aten(logits, targets);
  const c10::DeviceGuard guard(logits.device());
  const auto rows = steppable(logits);
  auto statistics =
      at::empty({logits.size(0), cuda::kRowStatistics}, logits.options().dtype(at::kFloat));
  cuda::CrossEntropyForward arguments;
  arguments.rows = rows_of(rows, targets);
  arguments.statistics = statistics.mutable_data_ptr<float>();
  auto losses = losses_by_kernel(rows, arguments);
  return {std::move(losses), std::move(statistics)};
}

at::Tensor cross_entropy_rows_in_place(const at::Tensor& logits, const RowTargets& targets) {
  const at::NoGradGuard no_grad;
  if (by_kernel(logits)) {
    TORCH_INTERNAL_ASSERT(logits.stride(1) == 1 || logits.size(1) == 1);
    cuda::CrossEntropyForward arguments;
    arguments.rows = rows_of(logits, targets);
    arguments.gradient = logits.mutable_data_ptr();
    auto losses = losses_by_kernel(logits, arguments);
    keep_for_replay(logits);
    return losses;
  }
  auto forward = losses_by_aten(logits, targets);
  write_by_aten(difference_by_aten(logits, forward.statistics, targets), targets, logits);
  return std::move(forward.losses);
}

void cross_entropy_rows_in_place_if(const at::Tensor& condition, const at::Tensor& logits,
                                    const RowTargets& targets, const at::Tensor& losses) {
  const c10::DeviceGuard guard(logits.device());
  cuda::CrossEntropyForward arguments;
  arguments.rows = rows_of(logits, targets);
  arguments.gradient = logits.mutable_data_ptr();
  arguments.losses = losses.mutable_data_ptr<float>();
  arguments.only_if = condition.const_data_ptr<int>();
  if constexpr (cuda::kBuilt) cuda::cross_entropy_forward(arguments, cuda::stream_of(logits));
}

void cross_entropy_gradient(const at::Tensor& logits, const RowLosses& forward,
                            const RowTargets& targets, const RowGradient& gradient,
                            const at::Tensor& into) {
  const at::NoGradGuard no_grad;
  const auto upstream = gradient.upstream.to(forward.statistics.scalar_type()).contiguous();
  if (!by_kernel(logits)) {
    auto difference = difference_by_aten(logits, forward.statistics, targets);
    difference.mul_(upstream.dim() == 0 ? upstream : upstream.unsqueeze(1));
    if (gradient.factor.defined()) difference.mul_(gradient.factor);
    return write_by_aten(difference, targets, into);
  }
  const c10::DeviceGuard guard(logits.device());
  const auto rows = steppable(logits);
  cuda::CrossEntropyBackward arguments;
  arguments.rows = rows_of(rows, targets);
  arguments.statistics = forward.statistics.const_data_ptr<float>();
  arguments.upstream = upstream.const_data_ptr<float>();
  arguments.upstream_stride = upstream.dim();
  if (gradient.factor.defined()) arguments.factor = gradient.factor.const_data_ptr<float>();
  arguments.gradient = into.mutable_data_ptr();
  arguments.gradient_stride = into.stride(0);
  if constexpr (cuda::kBuilt) cuda::cross_entropy_backward(arguments, cuda::stream_of(logits));
}

ReducedLoss reduced(const at::Tensor& losses, const RowTargets& targets, Reduction reduction) {
  const at::NoGradGuard no_grad;
  const bool mean = reduction == Reduction::kMean;
  if (losses.scalar_type() != at::kFloat || !cuda::can_run(losses)) {
    const auto sum = losses.sum();
    if (!mean) return {sum, at::ones({}, losses.options())};
    const auto count = is_ignored(targets).logical_not_().sum().to(losses.scalar_type());
    return {sum / count, count.reciprocal().masked_fill_(count.eq(0), 0)};
  }
  const c10::DeviceGuard guard(losses.device());
  const ReducedLoss result{at::empty({}, losses.options()), at::empty({}, losses.options())};
  cuda::CrossEntropySum arguments;
  arguments.losses = losses.const_data_ptr<float>();
  arguments.targets = targets.classes.const_data_ptr<int64_t>();
  arguments.rows = losses.size(0);
  arguments.ignore_index = targets.ignore_index;
  arguments.mean = mean;
  arguments.loss = result.loss.mutable_data_ptr<float>();
  arguments.factor = result.factor.mutable_data_ptr<float>();
  if constexpr (cuda::kBuilt) cuda::cross_entropy_sum(arguments, cuda::stream_of(losses));
  return result;
}

}  // namespace lightning::nn
