#include "lightning/metrics/accuracy.h"

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>

namespace lightning {

using classification::safe_divide;

at::Tensor Accuracy::compute() const {
  const at::NoGradGuard no_grad;
  const auto right = [](const at::Tensor& tp, const at::Tensor& fp, const at::Tensor& tn,
                        const at::Tensor& fn) { return safe_divide(tp + tn, tp + tn + fp + fn); };
  if (binary()) return right(tp(), fp(), tn(), fn());
  if (average() == "micro") {
    return multilabel() ? right(tp().sum(), fp().sum(), tn().sum(), fn().sum())
                        : safe_divide(tp(), tp() + fn());
  }
  const at::Tensor score =
      multilabel() ? right(tp(), fp(), tn(), fn()) : safe_divide(tp(), tp() + fn());
  return averaged(score, top_k());
}

}  // namespace lightning
