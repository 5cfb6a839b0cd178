#include "callbacks/throughput_monitor.h"

#include <ATen/Context.h>

#include "lightning/accelerator.h"
#include "lightning/duration.h"
#include "lightning/errors.h"
#include "lightning/log.h"
#include "lightning/log_due.h"
#include "lightning/module.h"
#include "lightning/registry.h"
#include "lightning/strategy.h"
#include "lightning/trainer.h"

namespace lightning {
namespace {

const Registration<Callback> kThroughputMonitor{
    "ThroughputMonitor", "Logs batches, samples and operations a second, and peak memory.",
    [](const ThroughputMonitorOptions& options) {
      return std::make_unique<ThroughputMonitor>(options);
    }};

double peak_flops(const Trainer& trainer) {
  const c10::Device device = trainer.strategy().root_device();
  if (device.is_cpu()) return 0;
  const std::string name = trainer.accelerator().device_name(device);
  const auto dtype = trainer.precision().compute_dtype();
  const bool tf32 =
      at::globalContext().float32MatmulPrecision() != at::Float32MatmulPrecision::HIGHEST;
  const auto flops = available_flops(name, dtype, tf32);
  if (!flops) {
    warn_once(str("ThroughputMonitor knows no peak of \"", name, "\" in ", c10::toString(dtype),
                  ", so it logs no mfu."));
  }
  return flops.value_or(0);
}

RunningStage running(Stage stage) {
  switch (stage) {
    case Stage::kFit:
      return RunningStage::kTraining;
    case Stage::kValidate:
      return RunningStage::kValidating;
    case Stage::kTest:
      return RunningStage::kTesting;
    default:
      return RunningStage::kPredicting;
  }
}

const char* name_of(RunningStage stage) {
  return stage == RunningStage::kValidating ? "validate"
         : stage == RunningStage::kTesting  ? "test"
                                            : "predict";
}

}  // namespace

ThroughputMonitor::ThroughputMonitor(ThroughputMonitorOptions options, CountFn batch_size_fn,
                                     CountFn length_fn)
    : options_(std::move(options)),
      batch_size_fn_(std::move(batch_size_fn)),
      length_fn_(std::move(length_fn)),
      clock_(monotonic_seconds) {
  if (options_.window_size() < 2) {
    throw MisconfigurationError(str("ThroughputMonitor got window_size ", options_.window_size(),
                                    ", expected at least 2: a rate lies between two batches."));
  }
  if (!batch_size_fn_) {
    batch_size_fn_ = [](const Batch& batch) { return batch.batch_size().value_or(1); };
  }
}

void ThroughputMonitor::setup(Trainer& trainer, LightningModule& module, Stage stage) {
  if (!trainer.is_global_zero()) return;
  const double flops = peak_flops(trainer);
  const auto prepare = [&](RunningStage running) {
    Meter& of = meter(running);
    of = Meter();
    of.throughput.emplace(
        ThroughputOptions().window_size(options_.window_size()).separator(options_.separator()),
        flops, trainer.world_size());
  };
  prepare(running(stage));
  if (stage == Stage::kFit) prepare(RunningStage::kValidating);
  if (module.flops_per_batch == 0) {
    warn_once(str("ThroughputMonitor logs no flops: set flops_per_batch of ",
                  class_name(typeid(module)), " to the operations of one batch."),
              "ThroughputMonitor.flops_per_batch");
  }
}

void ThroughputMonitor::start(Meter& meter) {
  meter.throughput->reset();
  meter.batches = meter.samples = meter.lengths = 0;
  meter.exact = true;
  meter.start = clock_();
}

void ThroughputMonitor::update(Trainer& trainer, LightningModule& module, Meter& meter,
                               const Batch& batch, bool exact) {
  // Without this the clock is read when work was given to the device, not when it is done.
  if (exact) trainer.accelerator().synchronize(trainer.strategy().root_device());
  meter.exact = exact;
  Throughput::Update update{};
  update.time = clock_() - meter.start;
  update.batches = ++meter.batches;
  update.samples = meter.samples += batch_size_fn_(batch);
  if (length_fn_) update.lengths = meter.lengths += length_fn_(batch);
  if (module.flops_per_batch > 0) update.flops = module.flops_per_batch;
  meter.throughput->update(update);
}

void ThroughputMonitor::log(Trainer& trainer, Meter& meter, const std::string& stage, int64_t step,
                            bool epoch) {
  const std::string& separator = options_.separator();
  std::vector<std::pair<std::string, double>> row;
  for (auto& [name, value] : meter.throughput->compute()) {
    row.emplace_back(stage + separator + name, value);
  }
  const int64_t peak = trainer.accelerator().peak_memory_bytes(trainer.strategy().root_device());
  if (peak > 0) {
    row.emplace_back(stage + separator + "device" + separator + "peak_memory_bytes",
                     static_cast<double>(peak));
  }
  if (epoch) row.emplace_back("epoch", static_cast<double>(trainer.current_epoch()));
  trainer.log_metrics(row, step);
}

// ---- Training -----------------------------------------------------------------------------------

void ThroughputMonitor::on_train_start(Trainer& trainer, LightningModule&) {
  if (trainer.is_global_zero()) start(meter(RunningStage::kTraining));
}

void ThroughputMonitor::on_train_batch_end(Trainer& trainer, LightningModule& module,
                                           const StepOutput&, const Batch& batch, int64_t) {
  if (!trainer.is_global_zero()) return;
  Meter& meter = this->meter(RunningStage::kTraining);
  const bool due = training_log_due(trainer);
  const int64_t accumulate = trainer.accumulate_grad_batches();
  const int64_t every = trainer.log_every_n_steps();
  const bool opens_window =
      every > 0 && (trainer.batches_that_stepped() + options_.window_size()) % every == 0;
  update(trainer, module, meter, batch, due || opens_window || (every > 0 && accumulate > 1));
  // While gradients accumulate the time of the optimizer's step is still to come.
  const bool stepped = (trainer.batch_idx() + 1) % accumulate == 0 || trainer.is_last_batch();
  if (due && stepped) log(trainer, meter, "train", trainer.batches_that_stepped(), true);
}

// ---- Evaluation ---------------------------------------------------------------------------------

void ThroughputMonitor::evaluate(Trainer& trainer, LightningModule& module, RunningStage stage,
                                 const Batch& batch) {
  if (!trainer.is_global_zero() || trainer.sanity_checking()) return;
  Meter& meter = this->meter(stage);
  const int64_t every = trainer.log_every_n_steps();
  const int64_t count = meter.batches + 1;
  const bool due = evaluation_log_due(trainer, count);
  const bool opens_window = every > 0 && (count + options_.window_size() - 1) % every == 0;
  update(trainer, module, meter, batch, due || opens_window);
  ++meter.total_batches;
  if (due) log(trainer, meter, name_of(stage), meter.total_batches, false);
}

void ThroughputMonitor::on_validation_start(Trainer& trainer, LightningModule&) {
  if (!trainer.is_global_zero() || trainer.sanity_checking()) return;
  // What training left on the device is training's.
  Meter& training = meter(RunningStage::kTraining);
  if (trainer.state_fn() == Stage::kFit && !training.exact) {
    trainer.accelerator().synchronize(trainer.strategy().root_device());
  }
  start(meter(RunningStage::kValidating));
}

void ThroughputMonitor::on_validation_batch_end(Trainer& trainer, LightningModule& module,
                                                const StepOutput&, const Batch& batch, int64_t,
                                                int64_t) {
  evaluate(trainer, module, RunningStage::kValidating, batch);
}

// Stops training's clock for the time of validation.
void ThroughputMonitor::on_validation_end(Trainer& trainer, LightningModule&) {
  if (!trainer.is_global_zero() || trainer.sanity_checking() || trainer.state_fn() != Stage::kFit) {
    return;
  }
  Meter& training = meter(RunningStage::kTraining);
  const Meter& validation = meter(RunningStage::kValidating);
  const double finished = training.exact
                              ? training.start + training.throughput->last_time().value_or(0)
                              : validation.start;
  training.start += validation.start - finished + validation.throughput->last_time().value_or(0);
}

void ThroughputMonitor::on_test_start(Trainer& trainer, LightningModule&) {
  if (trainer.is_global_zero()) start(meter(RunningStage::kTesting));
}

void ThroughputMonitor::on_test_batch_end(Trainer& trainer, LightningModule& module,
                                          const StepOutput&, const Batch& batch, int64_t, int64_t) {
  evaluate(trainer, module, RunningStage::kTesting, batch);
}

void ThroughputMonitor::on_predict_start(Trainer& trainer, LightningModule&) {
  if (trainer.is_global_zero()) start(meter(RunningStage::kPredicting));
}

void ThroughputMonitor::on_predict_batch_end(Trainer& trainer, LightningModule& module,
                                             const Batch&, const Batch& batch, int64_t, int64_t) {
  evaluate(trainer, module, RunningStage::kPredicting, batch);
}

}  // namespace lightning
