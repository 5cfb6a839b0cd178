// What the classification metrics have in common: their options, checked once at construction, and
// the way from predictions to labels. No operation here waits for an accelerator.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string>
#include <vector>

#include "lightning/options.h"

namespace lightning {

template <class Derived>
struct ClassificationOptions : Options<Derived> {
  using Self = Derived;

  OPTION(std::string, task, "", "binary, multiclass or multilabel.");
  OPTION(std::optional<int64_t>, num_classes, std::nullopt,
         "Classes of the multiclass task, 2 or more.");
  OPTION(std::optional<int64_t>, num_labels, std::nullopt,
         "Labels of the multilabel task, 2 or more.");
  OPTION(std::optional<int64_t>, ignore_index, std::nullopt,
         "Elements with this target do not count; it may be outside of the classes.");
  OPTION(bool, validate_args, true,
         "Refuse labels that are no class. On a GPU the check is an assertion of the device, so "
         "that nothing waits for it.");
};

namespace classification {

enum class Task { kBinary, kMulticlass, kMultilabel };

// The shared options, checked, with the name of the metric for errors.
struct Setup {
  std::string metric;
  Task task = Task::kBinary;
  int64_t classes = 1;  // or labels of the multilabel task
  std::optional<int64_t> ignore_index;
  bool validate_args = true;
};

// Errors: MisconfigurationError for an unknown task, a missing or too small num_classes or
// num_labels, or one that the task has no use for.
Setup check(std::string metric, const std::string& task, std::optional<int64_t> num_classes,
            std::optional<int64_t> num_labels, std::optional<int64_t> ignore_index,
            bool validate_args);
template <class O>
Setup check(std::string metric, const O& options) {
  return check(std::move(metric), options.task(), options.num_classes(), options.num_labels(),
               options.ignore_index(), options.validate_args());
}

// Errors: MisconfigurationError for a value that is not among `known`, with near matches.
void check_one_of(const Setup& setup, const char* option, const std::string& value,
                  const std::vector<std::string>& known);
// Errors: MisconfigurationError for a threshold outside of [0, 1].
void check_threshold(const Setup& setup, double threshold);

// Shapes always, values of labels if validate_args: what the task expects of a batch.
//
//   binary      preds [N, ...] labels, probabilities or logits; target [N, ...]
//   multiclass  preds [N, C, ...] scores or [N, ...] labels; target [N, ...]
//   multilabel  preds and target [N, L, ...]
//
// Errors: MisconfigurationError with the shapes or values.
void check_batch(const Setup& setup, const at::Tensor& preds, const at::Tensor& target);

// Where a target counts; undefined when all do.
at::Tensor counted(const Setup& setup, const at::Tensor& target);

// Probabilities as they are; logits, which a value outside of [0, 1] among the counted ones gives
// away, through a sigmoid or, with `softmax_dim`, a softmax.
at::Tensor probabilities(const at::Tensor& preds, const at::Tensor& counted,
                         std::optional<int64_t> softmax_dim = std::nullopt);

// Binary and multilabel: true where the prediction is positive, in the shape of `preds`.
at::Tensor positive(const at::Tensor& preds, double threshold, const at::Tensor& counted = {});

// Multiclass: the class predicted for each target, flat. With top_k > 1 that is the target itself
// where it is among the k best, else the best.
at::Tensor predicted_classes(const at::Tensor& preds, const at::Tensor& target, int64_t top_k = 1);

// How often each index in [0, bins) occurs in `index`, a flat int64 tensor; weighted by `weight`.
at::Tensor histogram(const at::Tensor& index, const at::Tensor& weight, int64_t bins);

// num / denom as float, `zero_division` where denom is 0.
at::Tensor safe_divide(const at::Tensor& num, const at::Tensor& denom, double zero_division = 0);

}  // namespace classification
}  // namespace lightning
