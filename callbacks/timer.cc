#include "callbacks/timer.h"

#include <cmath>

#include "lightning/checkpoint/state.h"
#include "lightning/errors.h"
#include "lightning/log.h"
#include "lightning/registry.h"
#include "lightning/strategy.h"
#include "lightning/trainer.h"

namespace lightning {
namespace {

const Registration<Callback> kTimer{
    "Timer", "Measures the time of each stage; ends fit when a limit is reached.",
    [](const TimerOptions& options) { return std::make_unique<Timer>(options); }};

// Python's names of the stages, in its order.
const std::pair<const char*, RunningStage> kStages[] = {
    {"train", RunningStage::kTraining},      {"sanity_check", RunningStage::kSanityChecking},
    {"validate", RunningStage::kValidating}, {"test", RunningStage::kTesting},
    {"predict", RunningStage::kPredicting},
};

}  // namespace

Timer::Timer(TimerOptions options)
    : options_(std::move(options)),
      by_step_(options_.interval() == "step"),
      clock_(monotonic_seconds) {
  if (!by_step_ && options_.interval() != "epoch") {
    throw MisconfigurationError(str("Timer got interval \"", options_.interval(),
                                    "\", expected \"step\" or \"epoch\".",
                                    did_you_mean(options_.interval(), {"step", "epoch"})));
  }
  if (options_.duration()) duration_ = parse_duration(*options_.duration(), "Timer.duration");
}

std::optional<double> Timer::start_time(RunningStage stage) const { return span(stage).start; }
std::optional<double> Timer::end_time(RunningStage stage) const { return span(stage).end; }

double Timer::time_elapsed(RunningStage stage) const {
  const double before = stage == RunningStage::kTraining ? offset_ : 0;
  const Span& of = span(stage);
  if (!of.start) return before;
  return (of.end ? *of.end : clock_()) - *of.start + before;
}

std::optional<double> Timer::time_remaining(RunningStage stage) const {
  if (!duration_) return std::nullopt;
  return duration_->count() - time_elapsed(stage);
}

// A checkpoint may have brought along a timer that is run down.
void Timer::on_fit_start(Trainer& trainer, LightningModule&) { check(trainer); }

void Timer::on_train_batch_end(Trainer& trainer, LightningModule&, const StepOutput&, const Batch&,
                               int64_t) {
  // One rank that asks is enough.
  if (by_step_ && is_up() && trainer.is_global_zero()) stop(trainer);
}

void Timer::on_train_epoch_end(Trainer& trainer, LightningModule&) {
  if (!by_step_) check(trainer);
}

void Timer::on_train_start(Trainer&, LightningModule&) {
  span(RunningStage::kTraining) = {clock_(), std::nullopt};
}
void Timer::on_train_end(Trainer&, LightningModule&) {
  span(RunningStage::kTraining).end = clock_();
}
void Timer::on_validation_start(Trainer&, LightningModule&) {
  span(RunningStage::kValidating) = {clock_(), std::nullopt};
}
void Timer::on_validation_end(Trainer&, LightningModule&) {
  span(RunningStage::kValidating).end = clock_();
}
void Timer::on_test_start(Trainer&, LightningModule&) {
  span(RunningStage::kTesting) = {clock_(), std::nullopt};
}
void Timer::on_test_end(Trainer&, LightningModule&) { span(RunningStage::kTesting).end = clock_(); }

bool Timer::is_up() const { return duration_ && time_elapsed() >= duration_->count(); }

// At a place where all ranks stop at once: by rank 0's clock.
void Timer::check(Trainer& trainer) {
  if (!duration_) return;
  bool up = is_up();
  if (trainer.world_size() > 1) up = trainer.strategy().broadcast(up).as_bool();
  if (up) stop(trainer);
}

void Timer::stop(Trainer& trainer) const {
  trainer.set_should_stop(true);
  if (options_.verbose()) {
    info(str("Time limit reached. Elapsed time is ",
             format_duration(Seconds(std::floor(time_elapsed()))), ". Signaling Trainer to stop."));
  }
}

State Timer::state_dict() const {
  State elapsed = State::dict();
  for (const auto& [name, stage] : kStages) elapsed[name] = time_elapsed(stage);
  return State::dict({{"time_elapsed", elapsed}});
}

void Timer::load_state_dict(const State& state) {
  const State* elapsed = state.find("time_elapsed");
  const State* training = elapsed == nullptr ? nullptr : elapsed->find("train");
  offset_ = training == nullptr ? 0 : training->as_double();
}

}  // namespace lightning
