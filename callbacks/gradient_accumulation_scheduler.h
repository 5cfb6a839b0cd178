// Changes accumulate_grad_batches from epoch to epoch.
//
//   GradientAccumulationScheduler({{4, 2}})    // every 2 batches from the fifth epoch on
//
// Registered as "GradientAccumulationScheduler".
// Source: Lightning 2.6, `GradientAccumulationScheduler`.
#pragma once

#include <map>

#include "lightning/callback.h"
#include "lightning/options.h"

namespace lightning {

// From the epoch, counted from 0: batches whose gradients one optimizer step sums.
using AccumulationSchedule = std::map<int64_t, int64_t>;

template <>
struct Codec<AccumulationSchedule> {
  static void write(Json& out, const AccumulationSchedule& value);
  static void read(const Json& in, AccumulationSchedule& value, const std::string& where);
  static std::string type() { return "map from epoch to int"; }
  static bool fits(const Json& in) { return json::is_map(in); }
};

struct GradientAccumulationSchedulerOptions : Options<GradientAccumulationSchedulerOptions> {
  OPTION(AccumulationSchedule, scheduling, AccumulationSchedule(),
         "Batches to accumulate, by the epoch from which it holds. Must be given.");
};

class GradientAccumulationScheduler : public Callback {
 public:
  // Errors: MisconfigurationError for an empty schedule, an epoch below 0, a factor below 1; at the
  // start of training for manual optimization, a strategy that accumulates itself, or when the
  // Trainer's own accumulate_grad_batches is set.
  explicit GradientAccumulationScheduler(AccumulationSchedule scheduling);
  explicit GradientAccumulationScheduler(const GradientAccumulationSchedulerOptions& options)
      : GradientAccumulationScheduler(options.scheduling()) {}

  bool going_to_accumulate_grad_batches() const;
  int64_t get_accumulate_grad_batches(int64_t epoch) const;

  void on_train_start(Trainer& trainer, LightningModule& module) override;
  void on_train_epoch_start(Trainer& trainer, LightningModule& module) override;
  void on_train_end(Trainer& trainer, LightningModule& module) override;

 private:
  AccumulationSchedule scheduling_;  // with an entry for epoch 0
};

}  // namespace lightning
