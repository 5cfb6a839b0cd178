// What `configure_optimizers` returns: one optimizer or several, each with or without a schedule.
//
//   return torch::optim::AdamW(parameters(), 1e-3);
//
//   auto adam = std::make_shared<torch::optim::Adam>(parameters(), 1e-3);
//   return {adam, LRSchedulerConfig(std::make_shared<StepLR>(adam, StepLROptions(30)))};
//
//   return {{generator_optimizer}, {critic_optimizer, schedule}};      // manual optimization
//
// Source: Lightning 2.6, `LightningModule.configure_optimizers`.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "lightning/optim/lr_scheduler.h"

namespace lightning {

// A schedule and when it steps, built as a chain:
// `LRSchedulerConfig(schedule).set_interval("step")`.
class LRSchedulerConfig {
 public:
  LRSchedulerConfig() = default;
  template <class S, std::enable_if_t<std::is_base_of<LRScheduler, S>::value, int> = 0>
  LRSchedulerConfig(std::shared_ptr<S> schedule) : scheduler(std::move(schedule)) {}

  LRSchedulerConfig& set_name(std::string value);
  // "epoch" or "step"; a step is a training batch after which the optimizer stepped.
  LRSchedulerConfig& set_interval(std::string value);
  // Steps at every n-th epoch or batch. At least 1.
  LRSchedulerConfig& set_frequency(int64_t value);
  // The logged metric that ReduceLROnPlateau watches.
  LRSchedulerConfig& set_monitor(std::string value);
  // Whether a missing metric is an error (else a warning, and no step).
  LRSchedulerConfig& set_strict(bool value);

  std::shared_ptr<LRScheduler> scheduler;
  std::string name;
  std::string interval = "epoch";
  int64_t frequency = 1;
  bool reduce_on_plateau = false;  // set from the schedule
  std::optional<std::string> monitor;
  bool strict = true;
};

// One optimizer with its schedule, if any.
struct OptimizerConfig {
  template <class O,
            std::enable_if_t<std::is_base_of<torch::optim::Optimizer, std::decay_t<O>>::value &&
                                 !std::is_lvalue_reference<O>::value,
                             int> = 0>
  OptimizerConfig(O&& optimizer)
      : optimizer(std::make_shared<std::decay_t<O>>(std::forward<O>(optimizer))) {}
  template <class O, std::enable_if_t<std::is_base_of<torch::optim::Optimizer, O>::value, int> = 0>
  OptimizerConfig(std::shared_ptr<O> optimizer) : optimizer(std::move(optimizer)) {}
  template <class O, std::enable_if_t<std::is_base_of<torch::optim::Optimizer, O>::value, int> = 0>
  OptimizerConfig(std::shared_ptr<O> optimizer, LRSchedulerConfig lr_scheduler)
      : optimizer(std::move(optimizer)), lr_scheduler(std::move(lr_scheduler)) {}

  std::shared_ptr<torch::optim::Optimizer> optimizer;
  std::optional<LRSchedulerConfig> lr_scheduler;
};

class Optimizers {
 public:
  Optimizers() = default;  // none: a warning, and training_step still runs
  template <class O, std::enable_if_t<std::is_constructible<OptimizerConfig, O&&>::value, int> = 0>
  Optimizers(O&& optimizer) {
    configs_.emplace_back(std::forward<O>(optimizer));
  }
  template <class O, class S>
  Optimizers(std::shared_ptr<O> optimizer, S lr_scheduler) {
    configs_.emplace_back(std::move(optimizer), LRSchedulerConfig(std::move(lr_scheduler)));
  }
  Optimizers(std::initializer_list<OptimizerConfig> configs) : configs_(configs) {}
  Optimizers(std::vector<OptimizerConfig> configs) : configs_(std::move(configs)) {}
  // Several schedules, each over any of the optimizers.
  Optimizers(std::vector<OptimizerConfig> optimizers, std::vector<LRSchedulerConfig> schedulers)
      : configs_(std::move(optimizers)), schedulers_(std::move(schedulers)) {}

  const std::vector<OptimizerConfig>& configs() const { return configs_; }

  // All schedules in order, checked.
  // Errors: MisconfigurationError for an interval other than "epoch" and "step", a frequency below
  // 1, a plateau schedule without monitor, a schedule over an optimizer that is not among these.
  std::vector<LRSchedulerConfig> lr_schedulers() const;

 private:
  std::vector<OptimizerConfig> configs_;
  std::vector<LRSchedulerConfig> schedulers_;
};

}  // namespace lightning
