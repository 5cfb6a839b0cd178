#include "lightning/optim/optimizers.h"

#include <torch/optim/optimizer.h>

#include <algorithm>

#include "lightning/errors.h"

namespace lightning {

LRSchedulerConfig& LRSchedulerConfig::set_name(std::string value) {
  name = std::move(value);
  return *this;
}
LRSchedulerConfig& LRSchedulerConfig::set_interval(std::string value) {
  interval = std::move(value);
  return *this;
}
LRSchedulerConfig& LRSchedulerConfig::set_frequency(int64_t value) {
  frequency = value;
  return *this;
}
LRSchedulerConfig& LRSchedulerConfig::set_monitor(std::string value) {
  monitor = std::move(value);
  return *this;
}
LRSchedulerConfig& LRSchedulerConfig::set_strict(bool value) {
  strict = value;
  return *this;
}

std::vector<LRSchedulerConfig> Optimizers::lr_schedulers() const {
  std::vector<LRSchedulerConfig> all;
  for (const auto& config : configs_) {
    if (config.optimizer == nullptr) {
      throw MisconfigurationError(
          "configure_optimizers returned an optimizer that is null. Return the optimizer itself, "
          "or `{}` for none.");
    }
    if (config.lr_scheduler) all.push_back(*config.lr_scheduler);
  }
  all.insert(all.end(), schedulers_.begin(), schedulers_.end());
  for (auto& config : all) {
    if (config.scheduler == nullptr) {
      throw MisconfigurationError("configure_optimizers returned a schedule that is null.");
    }
    config.reduce_on_plateau = config.scheduler->needs_metric();
    if (!config.monitor && !config.scheduler->monitor().empty()) {
      config.monitor = config.scheduler->monitor();
    }
    if (config.interval != "epoch" && config.interval != "step") {
      throw MisconfigurationError(str("A learning-rate schedule got interval \"", config.interval,
                                      "\", expected \"epoch\" or \"step\"."));
    }
    if (config.frequency < 1) {
      throw MisconfigurationError(str("A learning-rate schedule got frequency ", config.frequency,
                                      ", expected 1 or more: steps between its updates."));
    }
    if (config.reduce_on_plateau && !config.monitor) {
      throw MisconfigurationError(
          "ReduceLROnPlateau was returned without a metric to watch. Write "
          "LRSchedulerConfig(schedule).set_monitor(\"val_loss\") with a metric that is logged.");
    }
    const auto* optimizer = &config.scheduler->optimizer();
    if (std::none_of(configs_.begin(), configs_.end(),
                     [&](const auto& one) { return one.optimizer.get() == optimizer; })) {
      throw MisconfigurationError(
          "configure_optimizers returned a schedule over an optimizer that it does not return. "
          "Return that optimizer too.");
    }
  }
  return all;
}

}  // namespace lightning
