#include "lightning/metrics/confusion_matrix.h"

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>

#include "lightning/errors.h"

namespace lightning {

using classification::Task;

ConfusionMatrix::ConfusionMatrix(const ConfusionMatrixOptions& options)
    : setup_(classification::check("ConfusionMatrix", options)),
      threshold_(options.threshold()),
      normalize_(options.normalize()) {
  classification::check_threshold(setup_, threshold_);
  classification::check_one_of(setup_, "normalize", normalize_, {"true", "pred", "all", "none"});
  const int64_t n = setup_.classes;
  const auto zeros = setup_.task == Task::kBinary       ? at::zeros({2, 2}, at::kLong)
                     : setup_.task == Task::kMulticlass ? at::zeros({n, n}, at::kLong)
                                                        : at::zeros({n, 2, 2}, at::kLong);
  add_state("confmat", zeros, Reduction::kSum);
}

void ConfusionMatrix::update(const at::Tensor& preds, const at::Tensor& target) {
  const at::NoGradGuard no_grad;
  follow(preds);
  classification::check_batch(setup_, preds, target);
  const at::Tensor counted = classification::counted(setup_, target);
  at::Tensor cell;  // of the matrix, for each element
  if (setup_.task == Task::kMulticlass) {
    cell = target.flatten().to(at::kLong) * setup_.classes +
           classification::predicted_classes(preds, target);
  } else {
    const bool binary = setup_.task == Task::kBinary;
    // Whether predictions are logits is decided over all elements of the multilabel task, but over
    // the counted ones of the binary task, as in the original.
    cell =
        2 * target.to(at::kLong) +
        classification::positive(preds, threshold_, binary ? counted : at::Tensor()).to(at::kLong);
    if (!binary) {
      const auto label = at::arange(setup_.classes, cell.options()).mul_(4);
      cell = cell.transpose(1, -1) + label;
    }
    cell = cell.flatten();
  }
  at::Tensor weight = cell.new_ones(cell.sizes());
  if (counted.defined()) {
    const bool multilabel = setup_.task == Task::kMultilabel;
    weight = (multilabel ? counted.transpose(1, -1) : counted).flatten().to(at::kLong);
    cell = at::where(weight.ne(0), cell, 0);
  }
  at::Tensor& matrix = state(0);
  matrix.add_(classification::histogram(cell, weight, matrix.numel()).view(matrix.sizes()));
}

at::Tensor ConfusionMatrix::compute() const {
  const at::NoGradGuard no_grad;
  const at::Tensor& counts = state(0);
  if (normalize_ == "none") return counts.clone();
  const at::Tensor matrix = counts.to(at::kFloat);
  const at::Tensor sum = normalize_ == "true"   ? matrix.sum(-1, /*keepdim=*/true)
                         : normalize_ == "pred" ? matrix.sum(-2, /*keepdim=*/true)
                                                : matrix.sum(at::IntArrayRef{-2, -1}, true);
  return classification::safe_divide(matrix, sum);
}

}  // namespace lightning
