// Logs memory and use of the device, before and after batches of training, validation and test.
//
// Keys are "DeviceStatsMonitor.on_train_batch_start/cpu_percent" and so on: the accelerator's
// statistics, for CPUs cpu_percent, cpu_vm_percent and cpu_swap_percent.
//
// Registered as "DeviceStatsMonitor". Logs on rank 0, of its device, every log_every_n_steps.
// Source: Lightning 2.6, `DeviceStatsMonitor`.
#pragma once

#include <memory>
#include <optional>
#include <string>

#include "lightning/callback.h"
#include "lightning/options.h"

namespace lightning {

struct DeviceStatsMonitorOptions : Options<DeviceStatsMonitorOptions> {
  OPTION(std::optional<bool>, cpu_stats, std::nullopt,
         "Whether the CPU's statistics are logged. Where not given: when the accelerator is the "
         "CPU.");
};

class DeviceStatsMonitor : public Callback {
 public:
  explicit DeviceStatsMonitor(DeviceStatsMonitorOptions options = {}) : options_(options) {}

  // Errors: MisconfigurationError for fit without a logger.
  void setup(Trainer& trainer, LightningModule& module, Stage stage) override;
  void on_train_batch_start(Trainer& trainer, LightningModule& module, const Batch& batch,
                            int64_t batch_idx) override;
  void on_train_batch_end(Trainer& trainer, LightningModule& module, const StepOutput& output,
                          const Batch& batch, int64_t batch_idx) override;
  void on_validation_start(Trainer& trainer, LightningModule& module) override;
  void on_validation_batch_start(Trainer& trainer, LightningModule& module, const Batch& batch,
                                 int64_t batch_idx, int64_t dataloader_idx) override;
  void on_validation_batch_end(Trainer& trainer, LightningModule& module, const StepOutput& output,
                               const Batch& batch, int64_t batch_idx,
                               int64_t dataloader_idx) override;
  void on_test_start(Trainer& trainer, LightningModule& module) override;
  void on_test_batch_start(Trainer& trainer, LightningModule& module, const Batch& batch,
                           int64_t batch_idx, int64_t dataloader_idx) override;
  void on_test_batch_end(Trainer& trainer, LightningModule& module, const StepOutput& output,
                         const Batch& batch, int64_t batch_idx, int64_t dataloader_idx) override;

 private:
  void log(Trainer& trainer, const char* hook);

  DeviceStatsMonitorOptions options_;
  std::shared_ptr<Accelerator> cpu_;  // where the accelerator is another
  int64_t batch_ = 0;                 // of the evaluation that runs, from 1
};

}  // namespace lightning
