// The share of predictions that are right.
#pragma once

#include "lightning/metrics/stat_scores.h"

namespace lightning {

// `AccuracyOptions("multiclass").num_classes(10).top_k(5)`.
struct AccuracyOptions : StatScoresOptions<AccuracyOptions> {
  AccuracyOptions() = default;
  explicit AccuracyOptions(std::string task) { this->task(std::move(task)); }
};

// Over all elements (micro), or over those of each class, averaged as asked for.
// Errors: as StatScores.
// Source: torchmetrics, `Accuracy`.
class Accuracy : public StatScores {
 public:
  explicit Accuracy(const AccuracyOptions& options) : StatScores("Accuracy", options) {}

  // Float32; scalar, or [classes] for average "none"; 0 where nothing was counted.
  at::Tensor compute() const override;
};

}  // namespace lightning
