#include "lightning/metrics/f1_score.h"

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>

#include "lightning/errors.h"

namespace lightning {

F1Score::F1Score(const F1ScoreOptions& options)
    : StatScores("F1Score", options), zero_division_(options.zero_division()) {
  if (zero_division_ != 0 && zero_division_ != 1) {
    throw MisconfigurationError(
        str("F1Score got zero_division ", zero_division_, ", expected 0 or 1."));
  }
}

at::Tensor F1Score::compute() const {
  const at::NoGradGuard no_grad;
  const auto score = [&](const at::Tensor& tp, const at::Tensor& fp, const at::Tensor& fn) {
    return classification::safe_divide(2 * tp, 2 * tp + fn + fp, zero_division_);
  };
  if (binary()) return score(tp(), fp(), fn());
  if (average() == "micro") return score(tp().sum(), fp().sum(), fn().sum());
  return averaged(score(tp(), fp(), fn()), /*top_k=*/1);
}

}  // namespace lightning
