// The weighted mean of values over many batches.
#pragma once

#include <string>
#include <variant>

#include "lightning/metrics/metric.h"
#include "lightning/options.h"

namespace lightning {

struct MeanOptions : Options<MeanOptions> {
  using NanStrategy = std::variant<double, std::string>;

  // Looking for values that are not a number waits for the device, so on an accelerator "warn"
  // drops them like "ignore" does, without the warning; "error" does wait.
  OPTION(NanStrategy, nan_strategy, std::string("warn"),
         "What becomes of nan: dropped with a warning (warn) or without (ignore), refused (error), "
         "kept (disable), or replaced by the number given here.");
};

// Source: torchmetrics, `MeanMetric`.
// Errors: MisconfigurationError for a nan_strategy that is none of these, for weights that do not
// broadcast to the values, and for nan under "error".
class Mean : public Metric {
 public:
  explicit Mean(MeanOptions options = {});

  //   values    any shape; integers count as their float values
  //   weights   broadcast to the shape of `values`; 1 where undefined
  void update(const at::Tensor& values, const at::Tensor& weights = {}) override;

  // Scalar; nan before the first value.
  at::Tensor compute() const override;

 private:
  enum class Nan { kDrop, kReplace, kKeep };
  void check_nan(const at::Tensor& nan) const;

  MeanOptions options_;
  Nan nan_ = Nan::kDrop;
};

}  // namespace lightning
