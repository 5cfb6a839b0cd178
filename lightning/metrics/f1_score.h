// The harmonic mean of precision and recall.
#pragma once

#include "lightning/metrics/stat_scores.h"

namespace lightning {

struct F1ScoreOptions : StatScoresOptions<F1ScoreOptions> {
  F1ScoreOptions() = default;
  explicit F1ScoreOptions(std::string task) { this->task(std::move(task)); }

  OPTION(double, zero_division, 0.0,
         "The score, 0 or 1, of a class without targets and without predictions.");
};

// Errors: as StatScores, and for a zero_division other than 0 and 1.
// Source: torchmetrics, `F1Score`.
class F1Score : public StatScores {
 public:
  explicit F1Score(const F1ScoreOptions& options);

  // Float32; scalar, or [classes] for average "none".
  at::Tensor compute() const override;

 private:
  double zero_division_;
};

}  // namespace lightning
