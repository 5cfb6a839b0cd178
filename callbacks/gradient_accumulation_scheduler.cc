#include "callbacks/gradient_accumulation_scheduler.h"

#include <charconv>
#include <iterator>

#include "lightning/log.h"
#include "lightning/module.h"
#include "lightning/overrides.h"
#include "lightning/registry.h"
#include "lightning/trainer.h"

namespace lightning {
namespace {

const Registration<Callback> kGradientAccumulationScheduler{
    "GradientAccumulationScheduler", "Changes accumulate_grad_batches from epoch to epoch.",
    [](const GradientAccumulationSchedulerOptions& options) {
      return std::make_unique<GradientAccumulationScheduler>(options);
    }};

}  // namespace

void Codec<AccumulationSchedule>::write(Json& out, const AccumulationSchedule& value) {
  json::set_map(out);
  for (const auto& [epoch, factor] : value) {
    Codec<int64_t>::write(json::member(out, std::to_string(epoch)), factor);
  }
}

void Codec<AccumulationSchedule>::read(const Json& in, AccumulationSchedule& value,
                                       const std::string& where) {
  value.clear();
  if (!json::is_map(in)) {
    throw MisconfigurationError(
        str(where, " got ", json::dump(in), ", expected a map such as {0: 1, 4: 2}."));
  }
  for (const auto& key : json::keys(in)) {
    int64_t epoch = 0;
    const auto end = std::from_chars(key.data(), key.data() + key.size(), epoch);
    if (end.ec != std::errc() || end.ptr != key.data() + key.size()) {
      throw MisconfigurationError(
          str(where, " got the epoch \"", key, "\", expected an integer from 0 on."));
    }
    Codec<int64_t>::read(json::at(in, key), value[epoch], str(where, "[", key, "]"));
  }
}

GradientAccumulationScheduler::GradientAccumulationScheduler(AccumulationSchedule scheduling)
    : scheduling_(std::move(scheduling)) {
  if (scheduling_.empty()) {
    throw MisconfigurationError(
        "GradientAccumulationScheduler got an empty schedule, expected factors by epoch. Write "
        "{{4, 2}} for every 2 batches from the fifth epoch on.");
  }
  for (const auto& [epoch, factor] : scheduling_) {
    if (epoch < 0) {
      throw MisconfigurationError(str("GradientAccumulationScheduler got the epoch ", epoch,
                                      ", expected 0 or more. The first epoch is 0."));
    }
    if (factor < 1) {
      throw MisconfigurationError(str("GradientAccumulationScheduler got the factor ", factor,
                                      " for epoch ", epoch,
                                      ", expected at least 1 (no accumulation)."));
    }
  }
  scheduling_.emplace(0, 1);
}

bool GradientAccumulationScheduler::going_to_accumulate_grad_batches() const {
  for (const auto& entry : scheduling_) {
    if (entry.second > 1) return true;
  }
  return false;
}

int64_t GradientAccumulationScheduler::get_accumulate_grad_batches(int64_t epoch) const {
  return std::prev(scheduling_.upper_bound(epoch))->second;
}

void GradientAccumulationScheduler::on_train_start(Trainer& trainer, LightningModule& module) {
  if (!module.automatic_optimization()) {
    throw MisconfigurationError(
        "GradientAccumulationScheduler got a module with manual optimization, which steps its "
        "optimizers itself. Remove the callback or switch to automatic optimization.");
  }
  const Strategy& strategy = trainer.strategy();
  if (strategy.owns_gradient_accumulation()) {
    throw MisconfigurationError(str("GradientAccumulationScheduler got the strategy ",
                                    class_name(typeid(strategy)),
                                    ", which accumulates gradients itself and cannot change that "
                                    "between epochs. Remove the callback."));
  }
  if (trainer.accumulate_grad_batches() != 1) {
    throw MisconfigurationError(
        str("Trainer got accumulate_grad_batches ", trainer.accumulate_grad_batches(),
            " beside a GradientAccumulationScheduler. Remove one of them."));
  }
  const bool overrides =
      is_overridden<LightningModule>(module, &LightningModule::optimizer_step) ||
      is_overridden<LightningModule>(module, &LightningModule::optimizer_zero_grad);
  if (overrides && going_to_accumulate_grad_batches()) {
    warn(
        "GradientAccumulationScheduler: optimizer_step and optimizer_zero_grad of the module are "
        "called at each optimizer step, which is not each batch.");
  }
}

void GradientAccumulationScheduler::on_train_epoch_start(Trainer& trainer, LightningModule&) {
  trainer.set_accumulate_grad_batches(get_accumulate_grad_batches(trainer.current_epoch()));
}

// So that a second fit() does not take the last factor for the Trainer's own flag.
void GradientAccumulationScheduler::on_train_end(Trainer& trainer, LightningModule&) {
  trainer.set_accumulate_grad_batches(1);
}

}  // namespace lightning
