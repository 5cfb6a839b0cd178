#include "callbacks/learning_rate_monitor.h"

#include <torch/optim/adagrad.h>
#include <torch/optim/adam.h>
#include <torch/optim/adamw.h>
#include <torch/optim/rmsprop.h>
#include <torch/optim/sgd.h>

#include <algorithm>

#include "lightning/errors.h"
#include "lightning/log.h"
#include "lightning/log_due.h"
#include "lightning/logger.h"
#include "lightning/optim/optimizers.h"
#include "lightning/registry.h"
#include "lightning/trainer.h"

namespace lightning {
namespace {

const Registration<Callback> kLearningRateMonitor{
    "LearningRateMonitor", "Logs the learning rate of every parameter group.",
    [](const LearningRateMonitorOptions& options) {
      return std::make_unique<LearningRateMonitor>(options);
    }};

using GroupOptions = torch::optim::OptimizerOptions;

// Momentum, or the first beta; nullopt for an optimizer that has neither.
std::optional<double> momentum(const GroupOptions& options) {
  using namespace torch::optim;
  if (const auto* sgd = dynamic_cast<const SGDOptions*>(&options)) return sgd->momentum();
  if (const auto* adam = dynamic_cast<const AdamOptions*>(&options)) {
    return std::get<0>(adam->betas());
  }
  if (const auto* adamw = dynamic_cast<const AdamWOptions*>(&options)) {
    return std::get<0>(adamw->betas());
  }
  if (const auto* rms = dynamic_cast<const RMSpropOptions*>(&options)) return rms->momentum();
  return std::nullopt;
}

std::optional<double> weight_decay(const GroupOptions& options) {
  using namespace torch::optim;
  if (const auto* sgd = dynamic_cast<const SGDOptions*>(&options)) return sgd->weight_decay();
  if (const auto* adam = dynamic_cast<const AdamOptions*>(&options)) return adam->weight_decay();
  if (const auto* adamw = dynamic_cast<const AdamWOptions*>(&options)) {
    return adamw->weight_decay();
  }
  if (const auto* rms = dynamic_cast<const RMSpropOptions*>(&options)) return rms->weight_decay();
  if (const auto* adagrad = dynamic_cast<const AdagradOptions*>(&options)) {
    return adagrad->weight_decay();
  }
  return std::nullopt;
}

}  // namespace

LearningRateMonitor::LearningRateMonitor(LearningRateMonitorOptions options)
    : options_(std::move(options)) {
  const auto& interval = options_.logging_interval();
  if (interval && *interval != "step" && *interval != "epoch") {
    throw MisconfigurationError(str("LearningRateMonitor got logging_interval \"", *interval,
                                    "\", expected \"step\", \"epoch\" or none.",
                                    did_you_mean(*interval, {"step", "epoch"})));
  }
}

void LearningRateMonitor::on_train_start(Trainer& trainer, LightningModule&) {
  if (trainer.loggers().empty()) {
    throw MisconfigurationError(
        "LearningRateMonitor got a Trainer without a logger to log to. Give it one, or remove the "
        "callback.");
  }
  lrs_.clear();
  momenta_.clear();
  decays_.clear();
  if (!options_.log_momentum()) return;
  for (const Watched& one : watched(trainer)) {
    if (!momentum(one.optimizer->defaults())) {
      warn(
          str("LearningRateMonitor: ", one.name,
              " has no momentum, which is logged as 0. Remove log_momentum if that is not meant."));
    }
  }
}

void LearningRateMonitor::on_train_batch_start(Trainer& trainer, LightningModule&, const Batch&,
                                               int64_t) {
  if (options_.logging_interval() == "epoch" || !training_log_due(trainer)) return;
  log(trainer, options_.logging_interval() ? nullptr : "step");
}

void LearningRateMonitor::on_train_epoch_start(Trainer& trainer, LightningModule&) {
  if (options_.logging_interval() == "step") return;
  log(trainer, options_.logging_interval() ? nullptr : "epoch");
}

// Those with a schedule first, in the order of the schedules.
std::vector<LearningRateMonitor::Watched> LearningRateMonitor::watched(Trainer& trainer) {
  std::vector<Watched> all;
  std::map<std::string, int64_t> of_class;
  const auto add = [&](torch::optim::Optimizer& optimizer, const std::string& given,
                       std::optional<std::string> interval) {
    const std::string type = class_name(typeid(optimizer));
    std::string name = given.empty() ? "lr-" + type : given;
    // A given name does not count, but is numbered after those of its class that do.
    if (given.empty()) ++of_class[type];
    const auto count = of_class.find(type);
    if (count != of_class.end() && count->second > 1) name += str("-", count->second - 1);
    all.push_back({&optimizer, std::move(name), std::move(interval)});
  };
  for (const auto& config : trainer.lr_scheduler_configs()) {
    add(config.scheduler->optimizer(), config.name, config.interval);
  }
  for (const auto& optimizer : trainer.optimizers()) {
    const bool seen = std::any_of(all.begin(), all.end(), [&](const Watched& one) {
      return one.optimizer == optimizer.get();
    });
    if (!seen) add(*optimizer, "", std::nullopt);
  }
  return all;
}

// `interval` null: all of them. An optimizer without a schedule is logged at either.
void LearningRateMonitor::log(Trainer& trainer, const char* interval) {
  Row row;
  for (const Watched& one : watched(trainer)) {
    if (interval == nullptr || !one.interval || *one.interval == interval) add(one, row);
  }
  for (const auto& [name, value] : row) trainer.add_callback_metric(name, value);
  if (row.empty() || !trainer.is_global_zero()) return;
  for (const auto& logger : trainer.loggers()) {
    logger->log_metrics(row, trainer.batches_that_stepped());
  }
}

void LearningRateMonitor::add(const Watched& one, Row& row) {
  const auto& groups = one.optimizer->param_groups();
  for (size_t i = 0; i < groups.size(); ++i) {
    const std::string name = groups.size() > 1 ? str(one.name, "/pg", i + 1) : one.name;
    // A group that was added since goes on under its new name.
    if (groups.size() > 1 && i == 0 && lrs_.count(one.name) > 0) {
      lrs_[name] = std::move(lrs_.extract(one.name).mapped());
    }
    const GroupOptions& options = groups[i].options();
    row.emplace_back(name, options.get_lr());
    lrs_[name].push_back(row.back().second);
    if (options_.log_momentum()) {
      row.emplace_back(name + "-momentum", momentum(options).value_or(0));
      momenta_[row.back().first] = row.back().second;
    }
    if (options_.log_weight_decay()) {
      row.emplace_back(name + "-weight_decay", weight_decay(options).value_or(0));
      decays_[row.back().first] = row.back().second;
    }
  }
}

}  // namespace lightning
