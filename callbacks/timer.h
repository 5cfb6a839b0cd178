// Measures the time of training, validation and test, and ends fit when a limit is reached.
//
// Registered as "Timer". Training time includes the validations inside it, and what a checkpoint
// brought along. Rank 0's clock decides for all. Also behind the flag max_time.
// Source: Lightning 2.6, `Timer`.
#pragma once

#include <array>
#include <functional>
#include <optional>
#include <string>

#include "lightning/callback.h"
#include "lightning/duration.h"
#include "lightning/options.h"
#include "lightning/trainer_state.h"

namespace lightning {

struct TimerOptions : Options<TimerOptions> {
  TimerOptions() = default;
  explicit TimerOptions(Duration duration) { this->duration(std::move(duration)); }

  OPTION(std::optional<Duration>, duration, std::nullopt,
         "Training time after which the run ends: DD:HH:MM:SS, or a map of days, hours, minutes, "
         "seconds. Where not given the Timer only measures.");
  OPTION(std::string, interval, "step", "Looks at the clock after every step or every epoch.");
  OPTION(bool, verbose, true, "Says so when the time is up.");
};

class Timer : public Callback {
 public:
  // Errors: MisconfigurationError for a duration in another format, or another interval.
  explicit Timer(TimerOptions options = {});

  // Seconds of a clock that never goes back; nullopt for what has not happened.
  std::optional<double> start_time(RunningStage stage = RunningStage::kTraining) const;
  std::optional<double> end_time(RunningStage stage = RunningStage::kTraining) const;
  double time_elapsed(RunningStage stage = RunningStage::kTraining) const;
  // nullopt without a limit.
  std::optional<double> time_remaining(RunningStage stage = RunningStage::kTraining) const;
  // Where it reads the time.
  void set_clock(std::function<double()> clock) { clock_ = std::move(clock); }

  void on_fit_start(Trainer& trainer, LightningModule& module) override;
  void on_train_start(Trainer& trainer, LightningModule& module) override;
  void on_train_end(Trainer& trainer, LightningModule& module) override;
  void on_train_batch_end(Trainer& trainer, LightningModule& module, const StepOutput& output,
                          const Batch& batch, int64_t batch_idx) override;
  void on_train_epoch_end(Trainer& trainer, LightningModule& module) override;
  void on_validation_start(Trainer& trainer, LightningModule& module) override;
  void on_validation_end(Trainer& trainer, LightningModule& module) override;
  void on_test_start(Trainer& trainer, LightningModule& module) override;
  void on_test_end(Trainer& trainer, LightningModule& module) override;
  CallbackRole role() const override { return CallbackRole::kTimer; }
  State state_dict() const override;
  void load_state_dict(const State& state) override;

 private:
  struct Span {
    std::optional<double> start, end;
  };

  Span& span(RunningStage stage) { return spans_.at(static_cast<size_t>(stage)); }
  const Span& span(RunningStage stage) const { return spans_.at(static_cast<size_t>(stage)); }
  bool is_up() const;
  void check(Trainer& trainer);
  void stop(Trainer& trainer) const;

  TimerOptions options_;
  std::optional<Seconds> duration_;
  bool by_step_;
  std::function<double()> clock_;
  double offset_ = 0;  // seconds of training before the checkpoint
  std::array<Span, 6> spans_;
};

}  // namespace lightning
