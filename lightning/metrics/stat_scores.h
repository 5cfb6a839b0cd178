// True and false positives and negatives, in all or for each class: what Accuracy and F1Score are
// computed from.
// Source: torchmetrics, `StatScores`.
#pragma once

#include <string>

#include "lightning/metrics/classification.h"
#include "lightning/metrics/metric.h"

namespace lightning {

template <class Derived>
struct StatScoresOptions : ClassificationOptions<Derived> {
  using Self = Derived;

  OPTION(double, threshold, 0.5,
         "Binary and multilabel: probabilities above it are positive predictions.");
  OPTION(std::string, average, "micro",
         "Multiclass and multilabel: micro (over all elements), macro (the mean over classes), "
         "weighted (by the targets of each class) or none (one value for each class).");
  OPTION(int64_t, top_k, 1, "Multiclass: a target among the k best scores counts as predicted.");
};

class StatScores : public Metric {
 public:
  // Shapes as check_batch() says. Ignored elements are left out without waiting for the device.
  void update(const at::Tensor& preds, const at::Tensor& target) final;

 protected:
  // Errors: MisconfigurationError for a threshold outside of [0, 1], an unknown average, a top_k
  // outside of 1 .. num_classes, and for top_k, threshold or average where the task has no use
  // for them.
  template <class O>
  StatScores(std::string metric, const O& options)
      : StatScores(classification::check(std::move(metric), options), options.threshold(),
                   options.average(), options.top_k()) {}

  bool binary() const { return setup_.task == classification::Task::kBinary; }
  bool multilabel() const { return setup_.task == classification::Task::kMultilabel; }
  const std::string& average() const { return average_; }
  int64_t top_k() const { return top_k_; }

  // Integers: scalar for the binary task and for multiclass with micro average, else [classes].
  const at::Tensor& tp() const { return state(0); }
  const at::Tensor& fp() const { return state(1); }
  const at::Tensor& tn() const { return state(2); }
  const at::Tensor& fn() const { return state(3); }

  // From a score for each class to the average that is asked for.
  at::Tensor averaged(const at::Tensor& score, int64_t top_k) const;

 private:
  StatScores(classification::Setup setup, double threshold, std::string average, int64_t top_k);
  void update_labels(const at::Tensor& preds, const at::Tensor& target);
  void update_micro(const at::Tensor& predicted, const at::Tensor& target);
  void update_classes(const at::Tensor& predicted, const at::Tensor& target);
  void add(const at::Tensor& tp, const at::Tensor& fp, const at::Tensor& tn, const at::Tensor& fn);

  classification::Setup setup_;
  double threshold_;
  std::string average_;
  int64_t top_k_;
};

}  // namespace lightning
