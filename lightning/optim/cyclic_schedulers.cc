#include "lightning/optim/cyclic_schedulers.h"

#include <torch/optim/adam.h>
#include <torch/optim/adamw.h>
#include <torch/optim/rmsprop.h>
#include <torch/optim/sgd.h>

#include <algorithm>
#include <cmath>

#include "lightning/errors.h"
#include "lightning/optim/factories.h"

// The formulas keep torch's order of operations, so that the values are equal to the last bit.

namespace lightning {
namespace {

constexpr double kPi = 3.14159265358979323846;

using torch::optim::OptimizerOptions;

const Registration<LRSchedulerFactory> kSchedules[] = {
    {"OneCycleLR", "Up to max_lr and down to nearly nothing, once.",
     schedule_factory<OneCycleLR, OneCycleLROptions>()},
    {"CyclicLR", "Up and down between base_lr and max_lr.",
     schedule_factory<CyclicLR, CyclicLROptions>()},
};

template <class O>
bool set_first_beta(OptimizerOptions& options, double value) {
  auto* adam = dynamic_cast<O*>(&options);
  if (adam != nullptr) std::get<0>(adam->betas()) = value;
  return adam != nullptr;
}

template <class O>
bool set_plain_momentum(OptimizerOptions& options, double value) {
  auto* sgd = dynamic_cast<O*>(&options);
  if (sgd != nullptr) sgd->momentum(value);
  return sgd != nullptr;
}

bool has_betas(const OptimizerOptions& options) {
  return dynamic_cast<const torch::optim::AdamOptions*>(&options) != nullptr ||
         dynamic_cast<const torch::optim::AdamWOptions*>(&options) != nullptr;
}

void set_momentum(const char* schedule, OptimizerOptions& options, double value) {
  using namespace torch::optim;
  if (set_first_beta<AdamOptions>(options, value) || set_first_beta<AdamWOptions>(options, value) ||
      set_plain_momentum<SGDOptions>(options, value) ||
      set_plain_momentum<RMSpropOptions>(options, value)) {
    return;
  }
  throw MisconfigurationError(str(schedule,
                                  " got an optimizer without momentum or betas to cycle. Write "
                                  ".cycle_momentum(false), or use SGD, RMSprop, Adam or AdamW."));
}

void require_one_of(const char* schedule, const char* option, const std::string& value,
                    const std::vector<std::string>& known) {
  if (std::find(known.begin(), known.end(), value) != known.end()) return;
  throw MisconfigurationError(str(schedule, " got ", option, " \"", value, "\", expected one of ",
                                  join(known), ".", did_you_mean(value, known)));
}

void require_rates(const char* schedule, const char* option, const std::vector<double>& rates) {
  if (!rates.empty()) return;
  throw MisconfigurationError(str(schedule, " got no ", option,
                                  ": one rate for all parameter groups, or one for each. Write .",
                                  option, "({0.1})."));
}

int64_t steps_of(const OneCycleLROptions& options) {
  return options.total_steps() ? *options.total_steps()
                               : *options.epochs() * *options.steps_per_epoch();
}

}  // namespace

// ---- OneCycleLR ---------------------------------------------------------------------------------

void check(const OneCycleLROptions& options) {
  const char* const name = "OneCycleLR";
  require_rates(name, "max_lr", options.max_lr());
  if (!options.total_steps() && !(options.epochs() && options.steps_per_epoch())) {
    throw MisconfigurationError(
        "OneCycleLR got no length of the cycle. Write .total_steps(n), or both .epochs(n) and "
        ".steps_per_epoch(m).");
  }
  const auto positive = [&](const char* option, std::optional<int64_t> value) {
    if (value) require_option(*value > 0, name, option, static_cast<double>(*value), "1 or more");
  };
  positive("total_steps", options.total_steps());
  positive("epochs", options.epochs());
  positive("steps_per_epoch", options.steps_per_epoch());
  require_option(options.pct_start() >= 0 && options.pct_start() <= 1, name, "pct_start",
                 options.pct_start(), "a number from 0 to 1");
  require_one_of(name, "anneal_strategy", options.anneal_strategy(), {"cos", "linear"});
}

OneCycleLR::OneCycleLR(OptimizerRef optimizer, const OneCycleLROptions& options)
    : Schedule((check(options), optimizer), options.last_epoch()),
      total_steps_(steps_of(options)),
      anneal_(options.anneal_strategy()),
      cycle_momentum_(options.cycle_momentum()) {
  const auto total = static_cast<double>(total_steps_);
  const double rise = options.pct_start() * total - 1;
  phases_.push_back({rise, "initial_lr", "max_lr", "max_momentum", "base_momentum"});
  if (options.three_phase()) {
    const double fall = 2 * options.pct_start() * total - 2;
    phases_.push_back({fall, "max_lr", "initial_lr", "base_momentum", "max_momentum"});
    phases_.push_back({total - 1, "initial_lr", "min_lr", "max_momentum", "max_momentum"});
  } else {
    phases_.push_back({total - 1, "max_lr", "min_lr", "base_momentum", "max_momentum"});
  }

  auto& groups = this->optimizer().param_groups();
  const auto max_lrs = one_per_group("OneCycleLR", "max_lr", options.max_lr(), this->optimizer());
  const auto low =
      one_per_group("OneCycleLR", "base_momentum", options.base_momentum(), this->optimizer());
  const auto high =
      one_per_group("OneCycleLR", "max_momentum", options.max_momentum(), this->optimizer());
  use_beta1_ = cycle_momentum_ && has_betas(this->optimizer().defaults());
  for (size_t i = 0; i < groups.size() && options.last_epoch() == -1; ++i) {
    auto& values = group_values()[i];
    values["initial_lr"] = max_lrs[i] / options.div_factor();
    values["max_lr"] = max_lrs[i];
    values["min_lr"] = values["initial_lr"] / options.final_div_factor();
    if (!cycle_momentum_) continue;
    set_momentum("OneCycleLR", groups[i].options(), high[i]);
    values["max_momentum"] = high[i];
    values["base_momentum"] = low[i];
  }
  std::vector<double> base;
  for (const auto& values : group_values()) base.push_back(values.at("initial_lr"));
  set_base_lrs(std::move(base));
  initial_step();
}

double OneCycleLR::anneal(double start, double end, double part) const {
  if (anneal_ == "linear") return (end - start) * part + start;
  const double cos_out = std::cos(kPi * part) + 1;
  return end + (start - end) / 2.0 * cos_out;
}

std::vector<double> OneCycleLR::get_lr() {
  if (last_epoch() > total_steps_) {
    throw MisconfigurationError(str("OneCycleLR was stepped ", last_epoch(),
                                    " times, but its cycle has ", total_steps_,
                                    " steps. Give it as many as the run has optimizer steps, or "
                                    "step it once an epoch."));
  }
  const auto now = static_cast<double>(last_epoch());
  double start = 0.0;
  size_t i = 0;
  while (i + 1 < phases_.size() && now > phases_[i].end_step) start = phases_[i++].end_step;
  const Phase& phase = phases_[i];
  if (phase.end_step == start) {
    throw MisconfigurationError(str("OneCycleLR has a phase without steps among its ", total_steps_,
                                    ". Give it more total_steps or another pct_start."));
  }
  const double part = (now - start) / (phase.end_step - start);
  std::vector<double> lrs;
  auto& groups = optimizer().param_groups();
  for (size_t g = 0; g < groups.size(); ++g) {
    const auto& values = group_values().at(g);
    lrs.push_back(anneal(values.at(phase.start_lr), values.at(phase.end_lr), part));
    if (cycle_momentum_) {
      set_momentum("OneCycleLR", groups[g].options(),
                   anneal(values.at(phase.start_momentum), values.at(phase.end_momentum), part));
    }
  }
  return lrs;
}

void OneCycleLR::phase_fields(StateFields& fields) {
  const State* saved = fields.in("_schedule_phases");
  if (saved != nullptr) phases_.assign(saved->as_list().size(), {});
  State::List written;
  for (size_t i = 0; i < phases_.size(); ++i) {
    State out = State::dict();
    StateFields one = saved != nullptr ? StateFields(saved->as_list()[i]) : StateFields(out);
    Phase& phase = phases_[i];
    one("end_step", phase.end_step);
    // Python's last phase ends at an int, the others at floats.
    if (i + 1 == phases_.size()) one.constant("end_step", static_cast<int64_t>(phase.end_step));
    one("start_lr", phase.start_lr);
    one("end_lr", phase.end_lr);
    one("start_momentum", phase.start_momentum);
    one("end_momentum", phase.end_momentum);
    written.push_back(std::move(out));
  }
  fields.constant("_schedule_phases", std::move(written));
}

void OneCycleLR::fields(StateFields& fields) {
  fields("total_steps", total_steps_);
  phase_fields(fields);
  fields("_anneal_func_type", anneal_);
  fields("cycle_momentum", cycle_momentum_);
  if (cycle_momentum_) fields("use_beta1", use_beta1_);
  Schedule::fields(fields);
}

// ---- CyclicLR -----------------------------------------------------------------------------------

void check(const CyclicLROptions& options) {
  const char* const name = "CyclicLR";
  require_rates(name, "base_lr", options.base_lr());
  require_rates(name, "max_lr", options.max_lr());
  require_option(options.step_size_up() > 0, name, "step_size_up",
                 static_cast<double>(options.step_size_up()), "1 or more");
  if (options.step_size_down()) {
    require_option(*options.step_size_down() > 0, name, "step_size_down",
                   static_cast<double>(*options.step_size_down()), "1 or more");
  }
  require_one_of(name, "mode", options.mode(), {"triangular", "triangular2", "exp_range"});
  require_one_of(name, "scale_mode", options.scale_mode(), {"cycle", "iterations"});
}

CyclicLR::CyclicLR(OptimizerRef optimizer, const CyclicLROptions& options, ScaleFunction scale)
    : Schedule((
                   check(options),
                   [&] {  // the groups start from base_lr, which is then their initial_lr
                     const auto lrs =
                         one_per_group("CyclicLR", "base_lr", options.base_lr(), *optimizer);
                     auto& groups = (*optimizer).param_groups();
                     for (size_t i = 0; i < groups.size() && options.last_epoch() == -1; ++i) {
                       groups[i].options().set_lr(lrs[i]);
                     }
                   }(),
                   optimizer),
               options.last_epoch()),
      max_lrs_(one_per_group("CyclicLR", "max_lr", options.max_lr(), *optimizer)),
      mode_(options.mode()),
      gamma_(options.gamma()),
      custom_scale_(std::move(scale)),
      scale_mode_(custom_scale_          ? options.scale_mode()
                  : mode_ == "exp_range" ? "iterations"
                                         : "cycle"),
      cycle_momentum_(options.cycle_momentum()),
      base_momentums_(
          one_per_group("CyclicLR", "base_momentum", options.base_momentum(), *optimizer)),
      max_momentums_(
          one_per_group("CyclicLR", "max_momentum", options.max_momentum(), *optimizer)) {
  const auto up = static_cast<double>(options.step_size_up());
  total_size_ = up + static_cast<double>(options.step_size_down().value_or(options.step_size_up()));
  step_ratio_ = up / total_size_;
  auto& groups = this->optimizer().param_groups();
  use_beta1_ = cycle_momentum_ && has_betas(this->optimizer().defaults());
  for (size_t i = 0; i < groups.size() && cycle_momentum_ && options.last_epoch() == -1; ++i) {
    set_momentum("CyclicLR", groups[i].options(), max_momentums_[i]);
    NamedValues& values = group_values()[i];
    values["max_momentum"] = max_momentums_[i];
    values["base_momentum"] = base_momentums_[i];
    values.move_to_end("initial_lr");  // which Python's constructor notes last
  }
  set_base_lrs(one_per_group("CyclicLR", "base_lr", options.base_lr(), this->optimizer()));
  initial_step();
}

double CyclicLR::scale(double cycle) const {
  const double x = scale_mode_ == "cycle" ? cycle : static_cast<double>(last_epoch());
  if (custom_scale_) return custom_scale_(x);
  if (mode_ == "triangular") return 1.0;
  return mode_ == "triangular2" ? 1 / std::pow(2.0, x - 1) : std::pow(gamma_, x);
}

std::vector<double> CyclicLR::get_lr() {
  const auto now = static_cast<double>(last_epoch());
  const double cycle = std::floor(1 + now / total_size_);
  const double x = 1.0 + now / total_size_ - cycle;
  const double part = x <= step_ratio_ ? x / step_ratio_ : (x - 1) / (step_ratio_ - 1);
  std::vector<double> lrs;
  auto& groups = optimizer().param_groups();
  for (size_t i = 0; i < groups.size(); ++i) {
    const double base = base_lrs().at(i);
    lrs.push_back(base + (max_lrs_.at(i) - base) * part * scale(cycle));
    if (!cycle_momentum_) continue;
    const double height = (max_momentums_.at(i) - base_momentums_.at(i)) * part;
    set_momentum("CyclicLR", groups[i].options(), max_momentums_[i] - height * scale(cycle));
  }
  return lrs;
}

void CyclicLR::fields(StateFields& fields) {
  fields("max_lrs", max_lrs_);
  fields("total_size", total_size_);
  fields("step_ratio", step_ratio_);
  fields("mode", mode_);
  fields("gamma", gamma_);
  fields("scale_mode", scale_mode_);
  fields("cycle_momentum", cycle_momentum_);
  if (cycle_momentum_) {
    fields("use_beta1", use_beta1_);
    fields("base_momentums", base_momentums_);
    fields("max_momentums", max_momentums_);
  }
  Schedule::fields(fields);
  fields.constant("_scale_fn_custom", {});
}

}  // namespace lightning
