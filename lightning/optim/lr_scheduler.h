// A learning-rate schedule over an optimizer's parameter groups. The schedules themselves are in
// `schedulers.h`. Counts and values are those of torch.optim.lr_scheduler in Python.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "lightning/checkpoint/state.h"
#include "lightning/fwd.h"

namespace lightning {

class LRScheduler {
 public:
  static constexpr const char* kPartKind = "lr_scheduler";

  virtual ~LRScheduler() = default;

  // One step on. Errors: MisconfigurationError for a schedule that is past its end (OneCycle) or
  // wants a metric (ReduceLROnPlateau).
  virtual void step() = 0;
  // One step on with the value that is monitored; schedules without a use for it ignore it.
  virtual void step(double /*metric*/) { step(); }
  // True for schedules whose step needs a metric.
  virtual bool needs_metric() const { return false; }
  // The logged metric it wants, where its options name one and LRSchedulerConfig does not.
  virtual std::string monitor() const { return {}; }
  // True for schedules whose counts are meant in optimizer steps (OneCycleLR).
  virtual bool counts_steps() const { return false; }

  virtual torch::optim::Optimizer& optimizer() const = 0;
  // The learning rate of each parameter group, as set last.
  virtual std::vector<double> get_last_lr() const = 0;

  // Python's keys for the schedule of the same name.
  virtual State state_dict() const = 0;
  virtual void load_state_dict(const State& state) = 0;
};

}  // namespace lightning
