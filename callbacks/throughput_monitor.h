// Logs rates of each stage: batches, samples and items a second, floating-point operations, and the
// peak of the device's memory.
//
// Keys begin with the stage, "train/device/samples_per_sec"; see `Throughput` for the others, and
// "train/device/peak_memory_bytes" since the start of the program. Rates come once the window is
// full. Time of validation is not counted as training.
//
// Registered as "ThroughputMonitor". Works on rank 0. At batches whose time enters a rate it waits
// for the device: those that are logged, and those a window before them.
// Source: Lightning 2.6, `ThroughputMonitor`.
#pragma once

#include <array>
#include <functional>
#include <optional>

#include "lightning/callback.h"
#include "lightning/options.h"
#include "lightning/throughput.h"
#include "lightning/trainer_state.h"

namespace lightning {

// window_size and separator are those of ThroughputOptions.
struct ThroughputMonitorOptions : Options<ThroughputMonitorOptions> {
  OPTION(int64_t, window_size, 100, "Batches over which rates are taken. At least 2.");
  OPTION(std::string, separator, "/", "Between the parts of a key.");
};

class ThroughputMonitor : public Callback {
 public:
  using CountFn = std::function<int64_t(const Batch&)>;

  //   batch_size_fn   samples in a batch; the first dim of its first tensor where not given
  //   length_fn       items (tokens) in a batch; not counted where not given
  explicit ThroughputMonitor(ThroughputMonitorOptions options = {}, CountFn batch_size_fn = nullptr,
                             CountFn length_fn = nullptr);

  // Where it reads the time; seconds that never go back.
  void set_clock(std::function<double()> clock) { clock_ = std::move(clock); }

  void setup(Trainer& trainer, LightningModule& module, Stage stage) override;
  void on_train_start(Trainer& trainer, LightningModule& module) override;
  void on_train_batch_end(Trainer& trainer, LightningModule& module, const StepOutput& output,
                          const Batch& batch, int64_t batch_idx) override;
  void on_validation_start(Trainer& trainer, LightningModule& module) override;
  void on_validation_batch_end(Trainer& trainer, LightningModule& module, const StepOutput& output,
                               const Batch& batch, int64_t batch_idx,
                               int64_t dataloader_idx) override;
  void on_validation_end(Trainer& trainer, LightningModule& module) override;
  void on_test_start(Trainer& trainer, LightningModule& module) override;
  void on_test_batch_end(Trainer& trainer, LightningModule& module, const StepOutput& output,
                         const Batch& batch, int64_t batch_idx, int64_t dataloader_idx) override;
  void on_predict_start(Trainer& trainer, LightningModule& module) override;
  void on_predict_batch_end(Trainer& trainer, LightningModule& module, const Batch& prediction,
                            const Batch& batch, int64_t batch_idx, int64_t dataloader_idx) override;

 private:
  struct Meter {
    std::optional<Throughput> throughput;
    double start = 0;   // of the clock
    bool exact = true;  // the last update waited for the device
    int64_t batches = 0, samples = 0, lengths = 0;
    int64_t total_batches = 0;  // over all evaluations of a fit
  };

  Meter& meter(RunningStage stage) { return meters_.at(static_cast<size_t>(stage)); }
  void start(Meter& meter);
  void update(Trainer& trainer, LightningModule& module, Meter& meter, const Batch& batch,
              bool exact);
  void evaluate(Trainer& trainer, LightningModule& module, RunningStage stage, const Batch& batch);
  void log(Trainer& trainer, Meter& meter, const std::string& stage, int64_t step, bool epoch);

  ThroughputMonitorOptions options_;
  CountFn batch_size_fn_;
  CountFn length_fn_;
  std::function<double()> clock_;
  std::array<Meter, 6> meters_;
};

}  // namespace lightning
