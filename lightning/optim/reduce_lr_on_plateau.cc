#include "lightning/optim/reduce_lr_on_plateau.h"

#include <torch/optim/optimizer.h>

#include <algorithm>
#include <limits>

#include "lightning/errors.h"
#include "lightning/optim/factories.h"

namespace lightning {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

const Registration<LRSchedulerFactory> kPlateau{
    "ReduceLROnPlateau", "Reduces the rate when the monitored metric has stopped improving.",
    schedule_factory<ReduceLROnPlateau, ReduceLROnPlateauOptions>()};

void require_either(const char* option, const std::string& value, const char* one,
                    const char* other) {
  if (value == one || value == other) return;
  throw MisconfigurationError(str("ReduceLROnPlateau got ", option, " \"", value, "\", expected \"",
                                  one, "\" or \"", other, "\"."));
}

}  // namespace

void check(const ReduceLROnPlateauOptions& options) {
  require_option(options.factor() < 1.0, "ReduceLROnPlateau", "factor", options.factor(),
                 "a number below 1");
  require_either("mode", options.mode(), "min", "max");
  require_either("threshold_mode", options.threshold_mode(), "rel", "abs");
}

ReduceLROnPlateau::ReduceLROnPlateau(OptimizerRef optimizer,
                                     const ReduceLROnPlateauOptions& options)
    : optimizer_((check(options), std::move(optimizer))),
      monitor_(options.monitor()),
      factor_(options.factor()),
      min_lrs_(one_per_group("ReduceLROnPlateau", "min_lr", options.min_lr(), *optimizer_)),
      patience_(options.patience()),
      cooldown_(options.cooldown()),
      eps_(options.eps()),
      mode_(options.mode()),
      threshold_(options.threshold()),
      threshold_mode_(options.threshold_mode()),
      best_(options.mode() == "min" ? kInfinity : -kInfinity) {
  if (options.min_lr().size() == 1) default_min_lr_ = options.min_lr()[0];
  note_lrs();
}

void ReduceLROnPlateau::step() {
  throw MisconfigurationError(
      "ReduceLROnPlateau was stepped without a metric. Call step(value), or name the metric with "
      "LRSchedulerConfig(schedule).set_monitor(\"val_loss\").");
}

void ReduceLROnPlateau::step(double metric) {
  ++last_epoch_;
  if (is_better(metric)) {
    best_ = metric;
    num_bad_epochs_ = 0;
  } else {
    ++num_bad_epochs_;
  }
  if (cooldown_counter_ > 0) {
    --cooldown_counter_;
    num_bad_epochs_ = 0;
  }
  if (num_bad_epochs_ > patience_) {
    reduce_lr();
    cooldown_counter_ = cooldown_;
    num_bad_epochs_ = 0;
  }
  note_lrs();
}

bool ReduceLROnPlateau::is_better(double metric) const {
  const bool relative = threshold_mode_ == "rel";
  if (mode_ == "min") {
    return metric < (relative ? best_ * (1.0 - threshold_) : best_ - threshold_);
  }
  return metric > (relative ? best_ * (threshold_ + 1.0) : best_ + threshold_);
}

void ReduceLROnPlateau::reduce_lr() {
  auto& groups = (*optimizer_).param_groups();
  if (groups.size() != min_lrs_.size()) {
    if (!default_min_lr_) {
      throw MisconfigurationError(str("ReduceLROnPlateau has min_lr for ", min_lrs_.size(),
                                      " parameter groups, the optimizer now has ", groups.size(),
                                      ". Add all groups before the schedule is made."));
    }
    min_lrs_.assign(groups.size(), *default_min_lr_);
  }
  for (size_t i = 0; i < groups.size(); ++i) {
    const double old_lr = groups[i].options().get_lr();
    const double new_lr = std::max(old_lr * factor_, min_lrs_[i]);
    if (old_lr - new_lr > eps_) groups[i].options().set_lr(new_lr);
  }
}

void ReduceLROnPlateau::note_lrs() {
  last_lr_.clear();
  for (const auto& group : (*optimizer_).param_groups()) {
    last_lr_.push_back(group.options().get_lr());
  }
}

void ReduceLROnPlateau::fields(StateFields& fields) {
  fields("factor", factor_);
  // Python's default is the int 0.
  const bool is_default = default_min_lr_ && *default_min_lr_ == 0;
  fields.constant("default_min_lr", is_default        ? State(0)
                                    : default_min_lr_ ? State(*default_min_lr_)
                                                      : State());
  if (const State* saved = fields.in("default_min_lr")) {
    default_min_lr_ = saved->is_none() ? std::nullopt : std::make_optional(saved->as_double());
  }
  fields("min_lrs", min_lrs_);
  if (is_default) fields.constant("min_lrs", State::List(min_lrs_.size(), State(0)));
  fields("patience", patience_);
  fields("cooldown", cooldown_);
  fields("eps", eps_);
  fields("last_epoch", last_epoch_);
  fields("_last_lr", last_lr_);
  fields.constant("mode_worse", mode_ == "min" ? kInfinity : -kInfinity);
  fields("mode", mode_);
  fields("threshold", threshold_);
  fields("threshold_mode", threshold_mode_);
  fields("best", best_);
  fields("cooldown_counter", cooldown_counter_);
  fields("num_bad_epochs", num_bad_epochs_);
}

State ReduceLROnPlateau::state_dict() const {
  State state = State::dict();
  StateFields writer(state);
  const_cast<ReduceLROnPlateau*>(this)->fields(writer);  // which only reads them
  return state;
}

void ReduceLROnPlateau::load_state_dict(const State& state) {
  const State before = state_dict();
  try {
    StateFields reader(state);
    fields(reader);
  } catch (...) {
    StateFields restore(before);
    fields(restore);
    throw;
  }
}

}  // namespace lightning
