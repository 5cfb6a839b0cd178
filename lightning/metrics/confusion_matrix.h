// How often each class was taken for each other.
#pragma once

#include <string>

#include "lightning/metrics/classification.h"
#include "lightning/metrics/metric.h"

namespace lightning {

struct ConfusionMatrixOptions : ClassificationOptions<ConfusionMatrixOptions> {
  ConfusionMatrixOptions() = default;
  explicit ConfusionMatrixOptions(std::string task) { this->task(std::move(task)); }

  OPTION(double, threshold, 0.5,
         "Binary and multilabel: probabilities above it are positive predictions.");
  OPTION(std::string, normalize, "none",
         "Divide by the sum of each row (true), of each column (pred), of everything (all), or "
         "keep counts (none). 0 where that sum is 0.");
};

// Rows are targets, columns predictions. Counts are int64, normalized ones float32.
// Errors: MisconfigurationError for an unknown normalize or a threshold outside of [0, 1].
// Source: torchmetrics, `ConfusionMatrix`.
class ConfusionMatrix : public Metric {
 public:
  explicit ConfusionMatrix(const ConfusionMatrixOptions& options);

  void update(const at::Tensor& preds, const at::Tensor& target) override;

  // [2, 2], [classes, classes] or [labels, 2, 2].
  at::Tensor compute() const override;

 private:
  classification::Setup setup_;
  double threshold_;
  std::string normalize_;
};

}  // namespace lightning
