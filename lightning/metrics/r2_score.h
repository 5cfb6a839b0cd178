// The coefficient of determination: 1 for exact predictions, 0 for the mean of the targets.
#pragma once

#include <optional>
#include <string>

#include "lightning/metrics/metric.h"
#include "lightning/options.h"

namespace lightning {

struct R2ScoreOptions : Options<R2ScoreOptions> {
  OPTION(int64_t, adjusted, 0, "Number of regressors to adjust the score for; 0 does not adjust.");
  OPTION(std::string, multioutput, "uniform_average",
         "raw_values (one score for each column), uniform_average or variance_weighted.");
  OPTION(std::optional<int64_t>, num_outputs, std::nullopt,
         "Columns of the predictions; learned from the first batch. Over several processes, needed "
         "where one of them may see no batch.");
};

// Errors: MisconfigurationError for a negative adjusted, an unknown multioutput, num_outputs
// below 1. Source: torchmetrics, `R2Score`, which throws where there are fewer than two samples;
// here the score is nan then, so that a last batch of one sample does not end a run.
class R2Score : public Metric {
 public:
  explicit R2Score(R2ScoreOptions options = {});

  // Both [N] or [N, outputs]. Errors: MisconfigurationError for other shapes.
  void update(const at::Tensor& preds, const at::Tensor& target) override;

  // Scalar, or [outputs] for raw_values of several outputs.
  at::Tensor compute() const override;

 private:
  void add(size_t index, const at::Tensor& value);
  R2ScoreOptions options_;
};

}  // namespace lightning
