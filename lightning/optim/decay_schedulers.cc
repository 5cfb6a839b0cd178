#include "lightning/optim/decay_schedulers.h"

#include <torch/optim/optimizer.h>

#include <algorithm>
#include <cmath>

#include "lightning/errors.h"
#include "lightning/optim/factories.h"

// The formulas keep torch's order of operations, so that the values are equal to the last bit.

namespace lightning {
namespace {

constexpr double kPi = 3.14159265358979323846;

void require_given(bool given, const char* schedule, const char* option, const char* example) {
  if (given) return;
  throw MisconfigurationError(
      str(schedule, " got no ", option, ". Write ", schedule, "Options(", example, ")."));
}

const Registration<LRSchedulerFactory> kSchedules[] = {
    {"StepLR", "Multiplies by gamma every step_size epochs.",
     schedule_factory<StepLR, StepLROptions>()},
    {"MultiStepLR", "Multiplies by gamma at each milestone.",
     schedule_factory<MultiStepLR, MultiStepLROptions>()},
    {"ConstantLR", "A part of the rate until total_iters, then all of it.",
     schedule_factory<ConstantLR, ConstantLROptions>()},
    {"LinearLR", "A straight line from start_factor to end_factor.",
     schedule_factory<LinearLR, LinearLROptions>()},
    {"ExponentialLR", "Multiplies by gamma every epoch.",
     schedule_factory<ExponentialLR, ExponentialLROptions>()},
    {"PolynomialLR", "Down to 0 at total_iters as a power of what is left.",
     schedule_factory<PolynomialLR, PolynomialLROptions>()},
    {"CosineAnnealingLR", "Half a cosine down to eta_min in T_max epochs.",
     schedule_factory<CosineAnnealingLR, CosineAnnealingLROptions>()},
    {"CosineAnnealingWarmRestarts", "Half cosines down to eta_min, one after another.",
     schedule_factory<CosineAnnealingWarmRestarts, CosineAnnealingWarmRestartsOptions>()},
};

}  // namespace

// ---- StepLR -------------------------------------------------------------------------------------

void check(const StepLROptions& options) {
  require_given(options.step_size() != 0, "StepLR", "step_size", "30");
  require_option(options.step_size() > 0, "StepLR", "step_size",
                 static_cast<double>(options.step_size()), "1 or more");
}

StepLR::StepLR(OptimizerRef optimizer, const StepLROptions& options)
    : Schedule(std::move(optimizer), options.last_epoch()),
      step_size_(options.step_size()),
      gamma_(options.gamma()) {
  check(options);
  initial_step();
}

std::vector<double> StepLR::get_lr() {
  if (last_epoch() == 0 || last_epoch() % step_size_ != 0) return current_lrs();
  return scaled(current_lrs(), gamma_);
}

std::vector<double> StepLR::closed_form_lr() {
  return scaled(base_lrs(), std::pow(gamma_, last_epoch() / step_size_));
}

void StepLR::fields(StateFields& fields) {
  fields("step_size", step_size_);
  fields("gamma", gamma_);
  Schedule::fields(fields);
}

// ---- MultiStepLR --------------------------------------------------------------------------------

void check(const MultiStepLROptions& options) {
  require_given(!options.milestones().empty(), "MultiStepLR", "milestones", "{30, 80}");
}

MultiStepLR::MultiStepLR(OptimizerRef optimizer, const MultiStepLROptions& options)
    : Schedule(std::move(optimizer), options.last_epoch()), gamma_(options.gamma()) {
  check(options);
  for (const int64_t milestone : options.milestones()) ++milestones_[milestone];
  initial_step();
}

std::vector<double> MultiStepLR::get_lr() {
  const auto milestone = milestones_.find(last_epoch());
  if (milestone == milestones_.end()) return current_lrs();
  return scaled(current_lrs(), std::pow(gamma_, milestone->second));
}

std::vector<double> MultiStepLR::closed_form_lr() {
  int64_t passed = 0;
  for (const auto& [milestone, count] : milestones_) {
    if (milestone <= last_epoch()) passed += count;
  }
  return scaled(base_lrs(), std::pow(gamma_, passed));
}

void MultiStepLR::fields(StateFields& fields) {
  if (fields.out() != nullptr) {
    State::Object counter;
    counter.how = State::Object::How::kCall;
    counter.module = "collections";
    counter.name = "Counter";
    State counts = State::dict();
    counts.as_dict().set_python_class(std::make_shared<const State::Object>(std::move(counter)));
    for (const auto& [milestone, count] : milestones_) counts[milestone] = count;
    fields.constant("milestones", std::move(counts));
  } else if (const State* counts = fields.in("milestones")) {
    milestones_.clear();
    for (const auto& [milestone, count] : counts->as_dict()) {
      const auto* epoch = std::get_if<int64_t>(&milestone);
      if (epoch == nullptr) {
        throw CheckpointError("The state of MultiStepLR has a milestone that is no number.");
      }
      milestones_[*epoch] = count.as_int();
    }
  }
  fields("gamma", gamma_);
  Schedule::fields(fields);
}

// ---- ConstantLR ---------------------------------------------------------------------------------

void check(const ConstantLROptions& options) {
  require_option(options.factor() >= 0 && options.factor() <= 1, "ConstantLR", "factor",
                 options.factor(), "a number from 0 to 1");
}

ConstantLR::ConstantLR(OptimizerRef optimizer, const ConstantLROptions& options)
    : Schedule(std::move(optimizer), options.last_epoch()),
      factor_(options.factor()),
      total_iters_(options.total_iters()) {
  check(options);
  initial_step();
}

std::vector<double> ConstantLR::get_lr() {
  if (last_epoch() == 0) return scaled(current_lrs(), factor_);
  if (last_epoch() != total_iters_) return current_lrs();
  return scaled(current_lrs(), 1.0 / factor_);
}

std::vector<double> ConstantLR::closed_form_lr() {
  const double done = last_epoch() >= total_iters_ ? 1 : 0;
  return scaled(base_lrs(), factor_ + done * (1 - factor_));
}

void ConstantLR::fields(StateFields& fields) {
  fields("factor", factor_);
  fields("total_iters", total_iters_);
  Schedule::fields(fields);
}

// ---- LinearLR -----------------------------------------------------------------------------------

void check(const LinearLROptions& options) {
  require_option(options.start_factor() > 0 && options.start_factor() <= 1, "LinearLR",
                 "start_factor", options.start_factor(), "a number above 0 and at most 1");
  require_option(options.end_factor() >= 0 && options.end_factor() <= 1, "LinearLR", "end_factor",
                 options.end_factor(), "a number from 0 to 1");
  require_option(options.total_iters() >= 1, "LinearLR", "total_iters",
                 static_cast<double>(options.total_iters()), "1 or more");
}

LinearLR::LinearLR(OptimizerRef optimizer, const LinearLROptions& options)
    : Schedule(std::move(optimizer), options.last_epoch()),
      start_factor_(options.start_factor()),
      end_factor_(options.end_factor()),
      total_iters_(options.total_iters()) {
  check(options);
  initial_step();
}

std::vector<double> LinearLR::get_lr() {
  if (last_epoch() == 0) return scaled(current_lrs(), start_factor_);
  if (is_initial() || last_epoch() > total_iters_) return current_lrs();
  const auto total = static_cast<double>(total_iters_);
  const auto before = static_cast<double>(last_epoch() - 1);
  return scaled(current_lrs(),
                1.0 + (end_factor_ - start_factor_) /
                          (total * start_factor_ + before * (end_factor_ - start_factor_)));
}

std::vector<double> LinearLR::closed_form_lr() {
  const auto done = static_cast<double>(std::min(total_iters_, last_epoch()));
  return scaled(base_lrs(), start_factor_ + (end_factor_ - start_factor_) * done /
                                                static_cast<double>(total_iters_));
}

void LinearLR::fields(StateFields& fields) {
  fields("start_factor", start_factor_);
  fields("end_factor", end_factor_);
  fields("total_iters", total_iters_);
  Schedule::fields(fields);
}

// ---- ExponentialLR ------------------------------------------------------------------------------

void check(const ExponentialLROptions& options) {
  require_given(options.gamma().has_value(), "ExponentialLR", "gamma", "0.95");
}

ExponentialLR::ExponentialLR(OptimizerRef optimizer, const ExponentialLROptions& options)
    : Schedule(std::move(optimizer), options.last_epoch()), gamma_(options.gamma().value_or(0)) {
  check(options);
  initial_step();
}

std::vector<double> ExponentialLR::get_lr() {
  return is_initial() ? current_lrs() : scaled(current_lrs(), gamma_);
}

std::vector<double> ExponentialLR::closed_form_lr() {
  return scaled(base_lrs(), std::pow(gamma_, last_epoch()));
}

void ExponentialLR::fields(StateFields& fields) {
  fields("gamma", gamma_);
  Schedule::fields(fields);
}

// ---- PolynomialLR -------------------------------------------------------------------------------

void check(const PolynomialLROptions& options) {
  require_option(options.total_iters() >= 1, "PolynomialLR", "total_iters",
                 static_cast<double>(options.total_iters()), "1 or more");
}

PolynomialLR::PolynomialLR(OptimizerRef optimizer, const PolynomialLROptions& options)
    : Schedule(std::move(optimizer), options.last_epoch()),
      total_iters_(options.total_iters()),
      power_(options.power()) {
  check(options);
  initial_step();
}

std::vector<double> PolynomialLR::get_lr() {
  if (is_initial() || last_epoch() > total_iters_) return current_lrs();
  const auto total = static_cast<double>(total_iters_);
  const auto now = static_cast<double>(last_epoch());
  return scaled(current_lrs(), std::pow((1.0 - now / total) / (1.0 - (now - 1) / total), power_));
}

std::vector<double> PolynomialLR::closed_form_lr() {
  const auto done = static_cast<double>(std::min(total_iters_, last_epoch()));
  return scaled(base_lrs(), std::pow(1.0 - done / static_cast<double>(total_iters_), power_));
}

void PolynomialLR::fields(StateFields& fields) {
  fields("total_iters", total_iters_);
  fields("power", power_);
  Schedule::fields(fields);
}

// ---- CosineAnnealingLR --------------------------------------------------------------------------

void check(const CosineAnnealingLROptions& options) {
  require_given(options.T_max() != 0, "CosineAnnealingLR", "T_max", "100");
  require_option(options.T_max() > 0, "CosineAnnealingLR", "T_max",
                 static_cast<double>(options.T_max()), "1 or more");
}

CosineAnnealingLR::CosineAnnealingLR(OptimizerRef optimizer,
                                     const CosineAnnealingLROptions& options)
    : Schedule(std::move(optimizer), options.last_epoch()),
      T_max_(options.T_max()),
      eta_min_(options.eta_min()) {
  check(options);
  initial_step();
}

std::vector<double> CosineAnnealingLR::get_lr() {
  if (is_initial()) return current_lrs();
  auto lrs = current_lrs();
  const auto T_max = static_cast<double>(T_max_);
  const auto now = static_cast<double>(last_epoch());
  const bool resumed = step_count() == 1 && last_epoch() > 0;
  const bool turns = (last_epoch() - 1 - T_max_) % (2 * T_max_) == 0;
  for (size_t i = 0; i < lrs.size(); ++i) {
    const double range = base_lrs()[i] - eta_min_;
    if (resumed) {
      lrs[i] = eta_min_ + range * (1 + std::cos(now * kPi / T_max)) / 2;
    } else if (turns) {
      lrs[i] = lrs[i] + range * (1 - std::cos(kPi / T_max)) / 2;
    } else {
      lrs[i] = (1 + std::cos(kPi * now / T_max)) / (1 + std::cos(kPi * (now - 1) / T_max)) *
                   (lrs[i] - eta_min_) +
               eta_min_;
    }
  }
  return lrs;
}

std::vector<double> CosineAnnealingLR::closed_form_lr() {
  auto lrs = base_lrs();
  const double angle = kPi * static_cast<double>(last_epoch()) / static_cast<double>(T_max_);
  for (double& lr : lrs) lr = eta_min_ + (lr - eta_min_) * (1 + std::cos(angle)) / 2;
  return lrs;
}

void CosineAnnealingLR::fields(StateFields& fields) {
  fields("T_max", T_max_);
  fields("eta_min", eta_min_);
  Schedule::fields(fields);
}

// ---- CosineAnnealingWarmRestarts ----------------------------------------------------------------

void check(const CosineAnnealingWarmRestartsOptions& options) {
  const char* const name = "CosineAnnealingWarmRestarts";
  require_given(options.T_0() != 0, name, "T_0", "10");
  require_option(options.T_0() > 0, name, "T_0", static_cast<double>(options.T_0()), "1 or more");
  require_option(options.T_mult() >= 1, name, "T_mult", static_cast<double>(options.T_mult()),
                 "1 or more");
}

CosineAnnealingWarmRestarts::CosineAnnealingWarmRestarts(
    OptimizerRef optimizer, const CosineAnnealingWarmRestartsOptions& options)
    : Schedule(std::move(optimizer), options.last_epoch()),
      T_0_(options.T_0()),
      T_i_(options.T_0()),
      T_mult_(options.T_mult()),
      eta_min_(options.eta_min()),
      T_cur_(options.last_epoch()) {
  check(options);
  initial_step();
}

std::vector<double> CosineAnnealingWarmRestarts::get_lr() {
  auto lrs = base_lrs();
  const double angle = kPi * static_cast<double>(T_cur_) / static_cast<double>(T_i_);
  for (double& lr : lrs) lr = eta_min_ + (lr - eta_min_) * (1 + std::cos(angle)) / 2;
  return lrs;
}

// It counts by itself; `_step_count` stays 0, as in torch.
void CosineAnnealingWarmRestarts::step() {
  if (last_epoch() < 0) {
    T_i_ = T_0_;
    T_cur_ = 0;
    set_last_epoch(0);
  } else {
    if (++T_cur_ >= T_i_) {
      T_cur_ %= T_i_;
      T_i_ *= T_mult_;
    }
    set_last_epoch(last_epoch() + 1);
  }
  set_lrs(get_lr());
}

void CosineAnnealingWarmRestarts::fields(StateFields& fields) {
  fields("T_0", T_0_);
  fields("T_i", T_i_);
  fields("T_mult", T_mult_);
  fields("eta_min", eta_min_);
  fields("T_cur", T_cur_);
  Schedule::fields(fields);
}

// ---- Schedules by functions ---------------------------------------------------------------------

LambdaSchedule::LambdaSchedule(OptimizerRef optimizer, std::vector<Lambda> lambdas,
                               int64_t last_epoch)
    : Schedule(std::move(optimizer), last_epoch), lambdas_(std::move(lambdas)) {
  const size_t groups = base_lrs().size();
  if (lambdas_.size() == 1) lambdas_.resize(groups, lambdas_[0]);
  if (lambdas_.size() != groups) {
    throw MisconfigurationError(str("A schedule by functions got ", lambdas_.size(),
                                    " of them for an optimizer with ", groups,
                                    " parameter groups. Give one for all, or one for each."));
  }
  for (const Lambda& lambda : lambdas_) {
    if (!lambda) throw MisconfigurationError("A schedule by functions got an empty function.");
  }
}

void LambdaSchedule::fields(StateFields& fields) {
  Schedule::fields(fields);
  fields.constant("lr_lambdas", State::List(lambdas_.size()));
}

LambdaLR::LambdaLR(OptimizerRef optimizer, std::vector<Lambda> lr_lambdas, int64_t last_epoch)
    : LambdaSchedule(std::move(optimizer), std::move(lr_lambdas), last_epoch) {
  initial_step();
}

std::vector<double> LambdaLR::get_lr() {
  auto lrs = base_lrs();
  for (size_t i = 0; i < lrs.size(); ++i) lrs[i] *= factor(i);
  return lrs;
}

MultiplicativeLR::MultiplicativeLR(OptimizerRef optimizer, std::vector<Lambda> lr_lambdas,
                                   int64_t last_epoch)
    : LambdaSchedule(std::move(optimizer), std::move(lr_lambdas), last_epoch) {
  initial_step();
}

std::vector<double> MultiplicativeLR::get_lr() {
  auto lrs = current_lrs();
  if (is_initial()) return lrs;
  for (size_t i = 0; i < lrs.size(); ++i) lrs[i] *= factor(i);
  return lrs;
}

}  // namespace lightning
