#include "lightning/metrics/auroc.h"

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/bucketize.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linspace.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/trapezoid.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>

#include <algorithm>

#include "lightning/errors.h"
#include "lightning/log.h"

namespace lightning {

using classification::safe_divide;
using classification::Task;

namespace {

enum : size_t { kPreds, kTarget };
enum : size_t { kBins };

at::Tensor threshold_values(const std::optional<AUROCOptions::Thresholds>& option) {
  if (!option) return {};
  if (const auto* n = std::get_if<int64_t>(&*option)) {
    if (*n >= 2) return at::linspace(0, 1, *n, at::kFloat);
    throw MisconfigurationError(str("AUROC got thresholds ", *n, ", expected 2 or more."));
  }
  auto values = std::get<std::vector<double>>(*option);
  std::sort(values.begin(), values.end());
  if (values.size() < 2 || values.front() < 0 || values.back() > 1) {
    throw MisconfigurationError(
        str("AUROC got ", values.size(), " thresholds, expected 2 or more, all from 0 to 1."));
  }
  return at::tensor(values, at::kFloat);
}

// Area under a curve of ascending rates, both [points].
at::Tensor area(const at::Tensor& fpr, const at::Tensor& tpr) { return at::trapezoid(tpr, fpr); }

// The area up to max_fpr, brought to 0.5 for a random and 1 for a perfect score (McClish, 1989).
at::Tensor partial_area(const at::Tensor& fpr, const at::Tensor& tpr, double max_fpr) {
  const int64_t inside = fpr.le(max_fpr).sum().item<int64_t>();
  const double fpr0 = fpr[inside - 1].item<double>();
  const double fpr1 = fpr[inside].item<double>();
  const at::Tensor part = tpr[inside - 1].lerp(tpr[inside], (max_fpr - fpr0) / (fpr1 - fpr0));
  const at::Tensor x = at::cat({fpr.slice(0, 0, inside), fpr.new_full({1}, max_fpr)});
  const at::Tensor y = at::cat({tpr.slice(0, 0, inside), part.view({1})});
  const double least = 0.5 * max_fpr * max_fpr;
  return 0.5 * (1 + (area(x, y) - least) / (max_fpr - least));
}

at::Tensor area_up_to(const at::Tensor& fpr, const at::Tensor& tpr, std::optional<double> max_fpr) {
  if (!max_fpr || *max_fpr == 1) return area(fpr, tpr);
  if (fpr.sum().item<double>() == 0 || tpr.sum().item<double>() == 0) return area(fpr, tpr);
  return partial_area(fpr, tpr, *max_fpr);
}

// The exact area over scores [M] and truth values [M]. In double: float32 cannot count beyond 2^24.
at::Tensor exact_area(const at::Tensor& preds, const at::Tensor& positive,
                      std::optional<double> max_fpr) {
  const auto result = preds.options().dtype(at::kFloat);
  const int64_t total = preds.numel();
  const int64_t positives = positive.sum().item<int64_t>();
  if (positives == 0 || positives == total) {
    warn_once(str("AUROC got ", positives, " positive targets of ", total,
                  " for a class; without both kinds there is no area, and 0 is given."),
              "AUROC of one kind");
    return at::zeros({}, result);
  }
  const auto [score, order] = preds.sort(0, /*descending=*/true);
  const at::Tensor hits = positive.index_select(0, order).to(at::kDouble).cumsum(0);
  // Equal scores are one point of the curve: the last of each run.
  const at::Tensor changes = score.slice(0, 1).ne(score.slice(0, 0, -1));
  const at::Tensor ends =
      at::cat({changes.nonzero().squeeze(1), at::arange(total - 1, total, order.options())});
  const at::Tensor origin = at::zeros({1}, hits.options());
  const at::Tensor tps = at::cat({origin, hits.index_select(0, ends)});
  const at::Tensor all = at::cat({origin, (ends + 1).to(at::kDouble)});
  return area_up_to((all - tps) / static_cast<double>(total - positives),
                    tps / static_cast<double>(positives), max_fpr)
      .to(at::kFloat);
}

// What the states keep: apart from the batch, whose memory may be used again.
at::Tensor kept(const at::Tensor& tensor, const at::Tensor& batch) {
  return tensor.is_alias_of(batch) ? tensor.clone() : tensor;
}

}  // namespace

AUROC::AUROC(const AUROCOptions& options)
    : setup_(classification::check("AUROC", options)),
      average_(options.average()),
      max_fpr_(options.max_fpr()),
      thresholds_(threshold_values(options.thresholds())) {
  const bool binary = setup_.task == Task::kBinary;
  const std::vector<std::string> averages = {"macro", "weighted", "none", "micro"};
  const size_t known = binary ? 1 : setup_.task == Task::kMulticlass ? 3 : 4;
  classification::check_one_of(setup_, "average", average_,
                               {averages.begin(), averages.begin() + static_cast<int64_t>(known)});
  if (max_fpr_ && (!binary || *max_fpr_ <= 0 || *max_fpr_ > 1)) {
    throw MisconfigurationError(str(
        "AUROC got max_fpr ", *max_fpr_,
        binary ? ", expected a rate above 0 and at most 1." : ", which only the binary task has."));
  }
  if (thresholds_.defined()) {
    const auto bins = at::zeros({setup_.classes, 2, thresholds_.numel() + 1}, at::kLong);
    add_state("bins", bins, Reduction::kSum);
    return;
  }
  const std::vector<int64_t> flat = {0};
  const std::vector<int64_t> table = {0, setup_.classes};
  add_state("preds", at::empty(binary ? flat : table, at::kFloat), Reduction::kCat);
  add_state("target", at::empty(setup_.task == Task::kMultilabel ? table : flat, at::kLong),
            Reduction::kCat);
}

AUROC::Scores AUROC::scores(const at::Tensor& preds, const at::Tensor& target) const {
  const auto rows = [](const at::Tensor& x) {  // [N, C, ...] to [M, C]
    return x.dim() == 2 ? x : x.movedim(1, -1).flatten(0, -2);
  };
  const auto widened = [](const at::Tensor& x) {
    return x.scalar_type() == at::kDouble ? x : x.to(at::kFloat);
  };
  Scores batch;
  const bool multilabel = setup_.task == Task::kMultilabel;
  batch.target = (multilabel ? rows(target) : target.flatten()).to(at::kLong);
  batch.counted = classification::counted(setup_, batch.target);
  if (setup_.task == Task::kBinary) {
    batch.preds = widened(classification::probabilities(preds.flatten(), batch.counted));
  } else if (multilabel) {
    batch.preds = widened(classification::probabilities(rows(preds), {}));
  } else {
    const at::Tensor counted = batch.counted.defined() ? batch.counted.unsqueeze(1) : batch.counted;
    batch.preds = widened(classification::probabilities(rows(preds), counted, 1));
  }
  return batch;
}

void AUROC::update(const at::Tensor& preds, const at::Tensor& target) {
  const at::NoGradGuard no_grad;
  follow(preds);
  classification::check_batch(setup_, preds, target);
  if (!preds.is_floating_point()) {
    throw MisconfigurationError(
        "AUROC got integers as predictions, expected probabilities or logits, which it can order.");
  }
  const Scores batch = scores(preds, target);
  if (thresholds_.defined()) return update_bins(batch);
  append(kPreds, kept(batch.preds, preds));
  append(kTarget, kept(batch.target, target));
}

// A score falls in bin b when it reaches b of the thresholds.
void AUROC::update_bins(const Scores& batch) {
  if (thresholds_.device() != batch.preds.device()) {  // once
    thresholds_ = thresholds_.to(batch.preds.device());
  }
  const int64_t n = thresholds_.numel();
  const at::Tensor edges = thresholds_.to(batch.preds.scalar_type());
  at::Tensor bin = at::bucketize(batch.preds, edges, /*out_int32=*/false, /*right=*/true);
  at::Tensor positive = batch.target.eq(1);
  at::Tensor counted = batch.counted;
  if (setup_.task == Task::kBinary) {
    bin = bin.unsqueeze(1);
    positive = positive.unsqueeze(1);
    if (counted.defined()) counted = counted.unsqueeze(1);
  }
  const at::Tensor classes = at::arange(setup_.classes, bin.options());
  if (setup_.task == Task::kMulticlass) {
    positive = batch.target.unsqueeze(1).eq(classes);
    if (counted.defined()) counted = counted.unsqueeze(1);
  }
  const at::Tensor cell = (classes * 2 + positive.to(at::kLong)) * (n + 1) + bin;
  const at::Tensor weight = counted.defined() ? counted.to(at::kLong).expand_as(cell)
                                              : cell.new_ones({1}).expand_as(cell);
  at::Tensor& bins = state(kBins);
  bins.add_(
      classification::histogram(cell.flatten(), weight.flatten(), bins.numel()).view(bins.sizes()));
}

at::Tensor AUROC::averaged(const at::Tensor& areas, const at::Tensor& positives) const {
  if (average_ == "none") return areas;
  if (average_ == "macro") return areas.mean();
  return (areas * safe_divide(positives.to(at::kFloat), positives.sum())).sum();
}

at::Tensor AUROC::compute() const {
  const at::NoGradGuard no_grad;
  return thresholds_.defined() ? compute_binned() : compute_exact();
}

at::Tensor AUROC::compute_exact() const {
  at::Tensor preds = cat(kPreds);
  at::Tensor target = cat(kTarget);
  const auto binary_area = [&](const at::Tensor& scores, const at::Tensor& truth) {
    const at::Tensor counted = classification::counted(setup_, truth);
    return counted.defined() ? exact_area(scores.masked_select(counted),
                                          truth.masked_select(counted).eq(1), max_fpr_)
                             : exact_area(scores, truth.eq(1), max_fpr_);
  };
  if (setup_.task == Task::kBinary) return binary_area(preds, target);
  if (average_ == "micro") return binary_area(preds.flatten(), target.flatten());

  std::vector<at::Tensor> areas;
  if (setup_.task == Task::kMultilabel) {
    for (int64_t i = 0; i < setup_.classes; ++i) {
      areas.push_back(binary_area(preds.select(1, i), target.select(1, i)));
    }
    return averaged(at::stack(areas), target.eq(1).sum(0));
  }
  if (setup_.ignore_index) {
    const at::Tensor counted = classification::counted(setup_, target).nonzero().squeeze(1);
    preds = preds.index_select(0, counted);
    target = target.index_select(0, counted);
  }
  std::vector<at::Tensor> positives;
  for (int64_t i = 0; i < setup_.classes; ++i) {
    const at::Tensor truth = target.eq(i);
    areas.push_back(exact_area(preds.select(1, i), truth, max_fpr_));
    positives.push_back(truth.sum());
  }
  return averaged(at::stack(areas), at::stack(positives));
}

at::Tensor AUROC::compute_binned() const {
  at::Tensor bins = state(kBins);
  if (average_ == "micro") bins = bins.sum(0, /*keepdim=*/true);
  // At threshold i, those in a bin above i are predicted positive. From the highest threshold down,
  // both rates ascend.
  const at::Tensor above = bins.flip(2).cumsum(2).slice(2, 0, -1);
  const at::Tensor totals = bins.sum(2);  // [classes, 2]
  const at::Tensor fpr = safe_divide(above.select(1, 0), totals.select(1, 0).unsqueeze(1));
  const at::Tensor tpr = safe_divide(above.select(1, 1), totals.select(1, 1).unsqueeze(1));
  if (setup_.task == Task::kBinary) return area_up_to(fpr[0], tpr[0], max_fpr_);
  const at::Tensor areas = at::trapezoid(tpr, fpr);
  return average_ == "micro" ? areas[0] : averaged(areas, totals.select(1, 1));
}

}  // namespace lightning
