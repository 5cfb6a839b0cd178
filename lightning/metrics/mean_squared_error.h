// The mean of squared or of absolute differences.
#pragma once

#include "lightning/metrics/metric.h"
#include "lightning/options.h"

namespace lightning {

struct MeanSquaredErrorOptions : Options<MeanSquaredErrorOptions> {
  OPTION(bool, squared, true, "false: the root of the mean (RMSE).");
  OPTION(int64_t, num_outputs, 1,
         "Columns to take the error of one by one; 1 takes one over all elements.");
};

struct MeanAbsoluteErrorOptions : Options<MeanAbsoluteErrorOptions> {
  OPTION(int64_t, num_outputs, 1,
         "Columns to take the error of one by one; 1 takes one over all elements.");
};

// What both have in common: a sum of errors and a count.
class MeanError : public Metric {
 public:
  // Both of the same shape; [N, num_outputs] where there are several outputs.
  // Errors: MisconfigurationError for other shapes.
  void update(const at::Tensor& preds, const at::Tensor& target) final;

  // Scalar, or [num_outputs]; nan before the first batch.
  at::Tensor compute() const override;

 protected:
  // Errors: MisconfigurationError for num_outputs below 1.
  MeanError(const char* metric, const char* sum_name, int64_t num_outputs);
  virtual at::Tensor error(const at::Tensor& difference) const = 0;

 private:
  const char* metric_;
  int64_t num_outputs_;
};

// Source: torchmetrics, `MeanSquaredError`.
class MeanSquaredError : public MeanError {
 public:
  explicit MeanSquaredError(MeanSquaredErrorOptions options = {});
  at::Tensor compute() const override;

 private:
  at::Tensor error(const at::Tensor& difference) const override;
  MeanSquaredErrorOptions options_;
};

// Source: torchmetrics, `MeanAbsoluteError`.
class MeanAbsoluteError : public MeanError {
 public:
  explicit MeanAbsoluteError(MeanAbsoluteErrorOptions options = {});

 private:
  at::Tensor error(const at::Tensor& difference) const override;
};

}  // namespace lightning
