// The area under the receiver operating characteristic: how likely a positive element gets a higher
// score than a negative one.
#pragma once

#include <optional>
#include <string>
#include <variant>
#include <vector>

#include "lightning/metrics/classification.h"
#include "lightning/metrics/metric.h"

namespace lightning {

struct AUROCOptions : ClassificationOptions<AUROCOptions> {
  using Thresholds = std::variant<int64_t, std::vector<double>>;

  AUROCOptions() = default;
  explicit AUROCOptions(std::string task) { this->task(std::move(task)); }

  OPTION(std::string, average, "macro",
         "Multiclass and multilabel: macro, weighted (by the targets of each class) or none; for "
         "multilabel also micro.");
  OPTION(std::optional<double>, max_fpr, std::nullopt,
         "Binary: the standardized area up to this rate of false positives.");
  OPTION(std::optional<Thresholds>, thresholds, std::nullopt,
         "Count at these thresholds, or at so many from 0 to 1, in memory that does not grow. "
         "Without them the area is exact, and all predictions are kept.");
};

// 0 for a class of which there are only positives or only negatives, with a warning.
// Errors: MisconfigurationError for an unknown average, a max_fpr outside of (0, 1] or for a task
// other than binary, thresholds outside of [0, 1] or fewer than 2, and for predictions that are no
// probabilities or logits.
// Source: torchmetrics, `AUROC`.
class AUROC : public Metric {
 public:
  explicit AUROC(const AUROCOptions& options);

  // Binary [N, ...], multiclass preds [N, C, ...] and target [N, ...], multilabel [N, L, ...]. Does
  // not wait for the device.
  void update(const at::Tensor& preds, const at::Tensor& target) override;

  // Float32 scalar, or [classes] for average "none". Without thresholds it waits for the device.
  at::Tensor compute() const override;

 private:
  struct Scores {
    at::Tensor preds;    // [M] or [M, classes], probabilities
    at::Tensor target;   // [M], or [M, labels]
    at::Tensor counted;  // in the shape of target; undefined when all are
  };
  Scores scores(const at::Tensor& preds, const at::Tensor& target) const;
  void update_bins(const Scores& batch);
  at::Tensor compute_exact() const;
  at::Tensor compute_binned() const;
  at::Tensor averaged(const at::Tensor& areas, const at::Tensor& positives) const;

  classification::Setup setup_;
  std::string average_;
  std::optional<double> max_fpr_;
  at::Tensor thresholds_;  // float32, ascending, where the states are; undefined: exact
};

}  // namespace lightning
