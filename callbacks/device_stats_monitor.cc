#include "callbacks/device_stats_monitor.h"

#include "lightning/accelerator.h"
#include "lightning/errors.h"
#include "lightning/log_due.h"
#include "lightning/logger.h"
#include "lightning/registry.h"
#include "lightning/strategy.h"
#include "lightning/trainer.h"

namespace lightning {
namespace {

const Registration<Callback> kDeviceStatsMonitor{
    "DeviceStatsMonitor", "Logs memory and use of the device around batches.",
    [](const DeviceStatsMonitorOptions& options) {
      return std::make_unique<DeviceStatsMonitor>(options);
    }};

}  // namespace

void DeviceStatsMonitor::setup(Trainer& trainer, LightningModule&, Stage stage) {
  if (stage == Stage::kFit && trainer.loggers().empty()) {
    throw MisconfigurationError(
        "DeviceStatsMonitor got a Trainer without a logger to log to. Give it one, or remove the "
        "callback.");
  }
  const bool on_cpu = trainer.strategy().root_device().is_cpu();
  if (!on_cpu && options_.cpu_stats() == true) cpu_ = registry<Accelerator>().make("cpu");
}

void DeviceStatsMonitor::on_train_batch_start(Trainer& trainer, LightningModule&, const Batch&,
                                              int64_t) {
  if (training_log_due(trainer)) log(trainer, "on_train_batch_start");
}

void DeviceStatsMonitor::on_train_batch_end(Trainer& trainer, LightningModule&, const StepOutput&,
                                            const Batch&, int64_t) {
  if (training_log_due(trainer)) log(trainer, "on_train_batch_end");
}

void DeviceStatsMonitor::on_validation_start(Trainer&, LightningModule&) { batch_ = 0; }

void DeviceStatsMonitor::on_validation_batch_start(Trainer& trainer, LightningModule&, const Batch&,
                                                   int64_t, int64_t) {
  if (evaluation_log_due(trainer, ++batch_)) log(trainer, "on_validation_batch_start");
}

void DeviceStatsMonitor::on_validation_batch_end(Trainer& trainer, LightningModule&,
                                                 const StepOutput&, const Batch&, int64_t,
                                                 int64_t) {
  if (evaluation_log_due(trainer, batch_)) log(trainer, "on_validation_batch_end");
}

void DeviceStatsMonitor::on_test_start(Trainer&, LightningModule&) { batch_ = 0; }

void DeviceStatsMonitor::on_test_batch_start(Trainer& trainer, LightningModule&, const Batch&,
                                             int64_t, int64_t) {
  if (evaluation_log_due(trainer, ++batch_)) log(trainer, "on_test_batch_start");
}

void DeviceStatsMonitor::on_test_batch_end(Trainer& trainer, LightningModule&, const StepOutput&,
                                           const Batch&, int64_t, int64_t) {
  if (evaluation_log_due(trainer, batch_)) log(trainer, "on_test_batch_end");
}

void DeviceStatsMonitor::log(Trainer& trainer, const char* hook) {
  if (!trainer.is_global_zero()) return;
  const c10::Device device = trainer.strategy().root_device();
  const bool on_cpu = device.is_cpu();
  if (on_cpu && options_.cpu_stats() == false) return;

  auto stats = trainer.accelerator().device_stats(device);
  if (cpu_ != nullptr) {
    for (auto& stat : cpu_->device_stats(c10::kCPU)) stats.push_back(std::move(stat));
  }
  const std::string prefix = class_name(typeid(*this)) + "." + hook;
  for (const auto& logger : trainer.loggers()) {
    MetricRow row;
    for (const auto& [name, value] : stats) {
      row.emplace_back(prefix + logger->group_separator() + name, value);
    }
    logger->log_metrics(row, trainer.batches_that_stepped());
  }
}

}  // namespace lightning
