#include "lightning/metrics/classification.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/_assert_async.h>
#include <ATen/ops/scalar_tensor.h>
#include <ATen/ops/softmax.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>

#include <algorithm>

#include "lightning/errors.h"

namespace lightning::classification {
namespace {

const char* const kTaskNames[] = {"binary", "multiclass", "multilabel"};

int64_t require_size(const Setup& setup, const char* option, std::optional<int64_t> size) {
  if (size && *size >= 2) return *size;
  throw MisconfigurationError(str(setup.metric, " got ",
                                  size ? str(option, " ", *size) : str("no ", option), " for the ",
                                  kTaskNames[static_cast<int>(setup.task)],
                                  " task, expected 2 or more: write .", option, "(10)."));
}

void refuse_size(const Setup& setup, const char* option, std::optional<int64_t> size) {
  if (!size) return;
  throw MisconfigurationError(str(setup.metric, " got ", option, " ", *size, " for the ",
                                  kTaskNames[static_cast<int>(setup.task)],
                                  " task, which has no use for it. Leave it out, or change the "
                                  "task."));
}

// Reports on the host where that costs nothing, else by an assertion of the device.
void require(const Setup& setup, const char* what, const at::Tensor& labels, const at::Tensor& good,
             const std::string& expected) {
  if (labels.numel() == 0) return;
  if (labels.is_cuda()) {
    at::_assert_async(good.all(), setup.metric + " got " + what + " that are not " + expected);
  } else if (labels.is_cpu() && !good.all().item<bool>()) {
    const at::Tensor bad = labels.masked_select(good.logical_not());
    throw MisconfigurationError(str(setup.metric, " got ", bad.numel(), " ", what, " from ",
                                    bad.min().item().toDouble(), " to ",
                                    bad.max().item().toDouble(), ", expected ", expected, "."));
  }
}

std::string except_ignored(const Setup& setup) {
  return setup.ignore_index ? str(" or the ignore_index ", *setup.ignore_index) : "";
}

void check_binary_values(const Setup& setup, const at::Tensor& preds, const at::Tensor& target) {
  at::Tensor good = target.eq(0).logical_or(target.eq(1));
  if (setup.ignore_index) good = good.logical_or(target.eq(*setup.ignore_index));
  require(setup, "targets", target, good, "0 or 1" + except_ignored(setup));
  if (!preds.is_floating_point()) {
    require(setup, "predicted labels", preds, preds.eq(0).logical_or(preds.eq(1)), "0 or 1");
  }
}

void check_class_values(const Setup& setup, const at::Tensor& preds, const at::Tensor& target) {
  const auto is_class = [&](const at::Tensor& x) {
    return x.ge(0).logical_and(x.lt(setup.classes));
  };
  const std::string expected = str("classes 0 to ", setup.classes - 1);
  at::Tensor good = is_class(target);
  if (setup.ignore_index) good = good.logical_or(target.eq(*setup.ignore_index));
  require(setup, "targets", target, good, expected + except_ignored(setup));
  if (!preds.is_floating_point()) {
    require(setup, "predicted labels", preds, is_class(preds), expected);
  }
}

[[noreturn]] void refuse_shapes(const Setup& setup, const at::Tensor& preds,
                                const at::Tensor& target, const std::string& expected) {
  throw MisconfigurationError(lightning::str(setup.metric, " got predictions of shape ",
                                             preds.sizes(), " and targets of shape ",
                                             target.sizes(), ", expected ", expected, "."));
}

void check_multiclass(const Setup& setup, const at::Tensor& preds, const at::Tensor& target) {
  if (target.is_floating_point()) {
    throw MisconfigurationError(str(setup.metric,
                                    " got targets of a floating-point type, expected "
                                    "class indices: write target.to(at::kLong)."));
  }
  const std::string expected =
      str("[N, ", setup.classes, ", ...] scores or [N, ...] labels, and targets [N, ...]");
  if (preds.dim() == target.dim()) {
    if (preds.sizes() != target.sizes()) refuse_shapes(setup, preds, target, expected);
    if (preds.is_floating_point()) {
      throw MisconfigurationError(
          lightning::str(setup.metric,
                         " got floating-point predictions of the shape of the "
                         "targets, ",
                         preds.sizes(), ", expected ", expected, "."));
    }
  } else {
    const bool fits = preds.dim() == target.dim() + 1 && preds.dim() >= 2 &&
                      preds.size(1) == setup.classes && preds.size(0) == target.size(0) &&
                      preds.sizes().slice(2) == target.sizes().slice(1);
    if (!fits) refuse_shapes(setup, preds, target, expected);
    if (!preds.is_floating_point()) {
      throw MisconfigurationError(str(setup.metric,
                                      " got integers as scores of the classes, "
                                      "expected a floating-point type."));
    }
  }
  if (setup.validate_args) check_class_values(setup, preds, target);
}

}  // namespace

Setup check(std::string metric, const std::string& task, std::optional<int64_t> num_classes,
            std::optional<int64_t> num_labels, std::optional<int64_t> ignore_index,
            bool validate_args) {
  Setup setup{std::move(metric), Task::kBinary, 1, ignore_index, validate_args};
  const auto* const end = std::end(kTaskNames);
  const auto* const found = std::find(std::begin(kTaskNames), end, task);
  if (found == end) {
    const std::vector<std::string> known(std::begin(kTaskNames), end);
    throw MisconfigurationError(str(setup.metric, task.empty() ? " got no task" : " got task \"",
                                    task, task.empty() ? "" : "\"",
                                    ", expected binary, multiclass or multilabel.",
                                    did_you_mean(task, known)));
  }
  setup.task = static_cast<Task>(found - std::begin(kTaskNames));
  if (setup.task == Task::kMulticlass) {
    setup.classes = require_size(setup, "num_classes", num_classes);
  } else {
    refuse_size(setup, "num_classes", num_classes);
  }
  if (setup.task == Task::kMultilabel) {
    setup.classes = require_size(setup, "num_labels", num_labels);
  } else {
    refuse_size(setup, "num_labels", num_labels);
  }
  return setup;
}

void check_one_of(const Setup& setup, const char* option, const std::string& value,
                  const std::vector<std::string>& known) {
  if (std::count(known.begin(), known.end(), value) > 0) return;
  throw MisconfigurationError(str(setup.metric, " got ", option, " \"", value, "\" for the ",
                                  kTaskNames[static_cast<int>(setup.task)],
                                  " task, expected one of ", join(known), ".",
                                  did_you_mean(value, known)));
}

void check_threshold(const Setup& setup, double threshold) {
  if (threshold >= 0 && threshold <= 1) return;
  throw MisconfigurationError(
      str(setup.metric, " got threshold ", threshold, ", expected a probability from 0 to 1."));
}

void check_batch(const Setup& setup, const at::Tensor& preds, const at::Tensor& target) {
  if (!preds.defined() || !target.defined()) {
    throw MisconfigurationError(setup.metric +
                                " takes predictions and targets: update(preds, "
                                "target).");
  }
  if (setup.task == Task::kMulticlass) return check_multiclass(setup, preds, target);
  const bool labels_fit =
      setup.task == Task::kBinary || (preds.dim() >= 2 && preds.size(1) == setup.classes);
  if (preds.sizes() != target.sizes() || !labels_fit) {
    refuse_shapes(setup, preds, target,
                  setup.task == Task::kBinary ? "the same shape for both"
                                              : str("[N, ", setup.classes, ", ...] for both"));
  }
  if (setup.validate_args) check_binary_values(setup, preds, target);
}

at::Tensor counted(const Setup& setup, const at::Tensor& target) {
  return setup.ignore_index ? target.ne(*setup.ignore_index) : at::Tensor();
}

at::Tensor probabilities(const at::Tensor& preds, const at::Tensor& counted,
                         std::optional<int64_t> softmax_dim) {
  const auto normalized = [&] {
    return softmax_dim ? at::softmax(preds, *softmax_dim) : preds.sigmoid();
  };
  at::Tensor inside = preds.ge(0).logical_and(preds.le(1));
  if (counted.defined()) inside = inside.logical_or(counted.logical_not());
  const at::Tensor all = inside.all();
  if (preds.is_cpu()) return all.item<bool>() ? preds : normalized();
  return at::where(all, preds, normalized());
}

at::Tensor positive(const at::Tensor& preds, double threshold, const at::Tensor& counted) {
  if (!preds.is_floating_point()) return preds.ne(0);
  return probabilities(preds, counted).gt(threshold);
}

at::Tensor predicted_classes(const at::Tensor& preds, const at::Tensor& target, int64_t top_k) {
  if (preds.dim() == target.dim()) return preds.flatten().to(at::kLong);
  if (top_k == 1) return preds.argmax(1).flatten();
  const at::Tensor best = std::get<1>(preds.topk(top_k, 1));
  const at::Tensor hit = best.eq(target.unsqueeze(1)).any(1);
  return at::where(hit, target.to(at::kLong), best.select(1, 0)).flatten();
}

// scatter_add_ rather than bincount, which reads the largest index on the host.
at::Tensor histogram(const at::Tensor& index, const at::Tensor& weight, int64_t bins) {
  return at::zeros({bins}, index.options().dtype(at::kLong)).scatter_add_(0, index, weight);
}

at::Tensor safe_divide(const at::Tensor& num, const at::Tensor& denom, double zero_division) {
  const at::Tensor n = num.is_floating_point() ? num : num.to(at::kFloat);
  const at::Tensor d = denom.is_floating_point() ? denom : denom.to(at::kFloat);
  return at::where(d.ne(0), n / d, at::scalar_tensor(zero_division, n.options()));
}

}  // namespace lightning::classification
