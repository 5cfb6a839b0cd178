#include "lightning/metrics/stat_scores.h"

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/full.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>

#include "lightning/errors.h"

namespace lightning {

using classification::Task;

StatScores::StatScores(classification::Setup setup, double threshold, std::string average,
                       int64_t top_k)
    : setup_(std::move(setup)), threshold_(threshold), average_(std::move(average)), top_k_(top_k) {
  classification::check_threshold(setup_, threshold_);
  if (binary()) {
    classification::check_one_of(setup_, "average", average_, {"micro"});
  } else {
    classification::check_one_of(setup_, "average", average_,
                                 {"micro", "macro", "weighted", "none"});
  }
  if (setup_.task == Task::kMulticlass && threshold_ != 0.5) {
    throw MisconfigurationError(str(setup_.metric, " got threshold ", threshold_,
                                    " for the multiclass task, which takes the best class and has "
                                    "no use for it. Leave it out."));
  }
  const int64_t most = setup_.task == Task::kMulticlass ? setup_.classes : 1;
  if (top_k_ < 1 || top_k_ > most) {
    throw MisconfigurationError(str(setup_.metric, " got top_k ", top_k_, ", expected 1",
                                    most > 1 ? str(" to num_classes, ", most) : "",
                                    most > 1 ? "." : ": only the multiclass task has more."));
  }
  const bool one = binary() || (average_ == "micro" && !multilabel());
  const auto zeros = one ? at::zeros({}, at::kLong) : at::zeros({setup_.classes}, at::kLong);
  for (const char* name : {"tp", "fp", "tn", "fn"}) add_state(name, zeros, Reduction::kSum);
}

void StatScores::update(const at::Tensor& preds, const at::Tensor& target) {
  const at::NoGradGuard no_grad;
  follow(preds);
  classification::check_batch(setup_, preds, target);
  if (setup_.task != Task::kMulticlass) return update_labels(preds, target);
  if (top_k_ > 1 && preds.dim() == target.dim()) {
    throw MisconfigurationError(
        lightning::str(setup_.metric, " got top_k ", top_k_, " and labels of shape ", preds.sizes(),
                       ", expected scores [N, ", setup_.classes, ", ...] to take the k best of."));
  }
  const at::Tensor predicted = classification::predicted_classes(preds, target, top_k_);
  average_ == "micro" ? update_micro(predicted, target.flatten())
                      : update_classes(predicted, target.flatten());
}

void StatScores::update_labels(const at::Tensor& preds, const at::Tensor& target) {
  at::Tensor predicted = classification::positive(preds, threshold_);
  at::Tensor yes = target.eq(1);
  at::Tensor no = target.eq(0);
  if (setup_.ignore_index) {
    const at::Tensor counted = classification::counted(setup_, target);
    yes = yes.logical_and(counted);
    no = no.logical_and(counted);
  }
  const auto total = [&](const at::Tensor& mask) {
    return binary() ? mask.sum() : mask.transpose(0, 1).flatten(1).sum(1);
  };
  const at::Tensor tp = total(yes.logical_and(predicted));
  const at::Tensor fp = total(no.logical_and(predicted));
  add(tp, fp, total(no) - fp, total(yes) - tp);
}

void StatScores::update_micro(const at::Tensor& predicted, const at::Tensor& target) {
  at::Tensor hit = predicted.eq(target);
  at::Tensor n;
  if (setup_.ignore_index) {
    const at::Tensor counted = classification::counted(setup_, target);
    hit = hit.logical_and(counted);
    n = counted.sum();
  } else {
    n = at::full({}, target.numel(), target.options().dtype(at::kLong));
  }
  const at::Tensor tp = hit.sum();
  const at::Tensor wrong = n - tp;
  add(tp, wrong, n * setup_.classes - wrong - n, wrong);
}

void StatScores::update_classes(const at::Tensor& predicted, const at::Tensor& target) {
  at::Tensor index = target.to(at::kLong);
  at::Tensor guess = predicted;
  at::Tensor weight = at::ones_like(index);
  if (setup_.ignore_index) {
    // What is ignored is counted with weight 0 in a class that exists.
    const at::Tensor counted = classification::counted(setup_, target);
    weight = counted.to(at::kLong);
    index = at::where(counted, index, 0);
    guess = at::where(counted, guess, 0);
  }
  const at::Tensor hit = guess.eq(index).to(at::kLong) * weight;
  const at::Tensor tp = classification::histogram(index, hit, setup_.classes);
  const at::Tensor fp = classification::histogram(guess, weight, setup_.classes) - tp;
  const at::Tensor fn = classification::histogram(index, weight, setup_.classes) - tp;
  add(tp, fp, weight.sum() - tp - fp - fn, fn);
}

void StatScores::add(const at::Tensor& tp, const at::Tensor& fp, const at::Tensor& tn,
                     const at::Tensor& fn) {
  state(0).add_(tp);
  state(1).add_(fp);
  state(2).add_(tn);
  state(3).add_(fn);
}

at::Tensor StatScores::averaged(const at::Tensor& score, int64_t top_k) const {
  if (average_ == "none") return score;
  at::Tensor weights;
  if (average_ == "weighted") {
    weights = tp() + fn();
  } else {
    weights = at::ones_like(score);
    if (!multilabel()) {  // a class that neither occurs nor is predicted has no say
      const at::Tensor seen = top_k == 1 ? tp() + fp() + fn() : tp() + fn();
      weights = weights.masked_fill(seen.eq(0), 0);
    }
  }
  return classification::safe_divide(weights * score, weights.sum(-1, /*keepdim=*/true)).sum(-1);
}

}  // namespace lightning
