// Schedules that follow a formula of the epoch. Each takes the optimizer, shared or by reference,
// and its options; makes the first step at construction, as torch does; and is registered under its
// name (the two that take functions aside). Epochs are calls of step(), whatever they stand for.
//
//   std::make_shared<StepLR>(optimizer, StepLROptions(30).gamma(0.1))
//
// Errors of all: MisconfigurationError for an option that is missing or out of its range.
// Source: torch 2.11, `torch.optim.lr_scheduler`; values are equal to it bit for bit.
#pragma once

#include <functional>
#include <map>

#include "lightning/optim/schedule.h"
#include "lightning/options.h"

namespace lightning {

// What all options of these schedules share.
template <class Derived>
struct ScheduleOptions : Options<Derived> {
  using Self = Derived;
  OPTION(int64_t, last_epoch, -1,
         "The epoch to resume after, where an earlier schedule is over the same optimizer.");
};

struct StepLROptions : ScheduleOptions<StepLROptions> {
  StepLROptions() = default;
  explicit StepLROptions(int64_t step_size) { this->step_size(step_size); }
  OPTION(int64_t, step_size, 0, "Epochs from one decay to the next. Must be given.");
  OPTION(double, gamma, 0.1, "What a decay multiplies by.");
};
struct MultiStepLROptions : ScheduleOptions<MultiStepLROptions> {
  MultiStepLROptions() = default;
  explicit MultiStepLROptions(std::vector<int64_t> milestones) {
    this->milestones(std::move(milestones));
  }
  OPTION(std::vector<int64_t>, milestones, std::vector<int64_t>(),
         "Epochs of the decays. Must be given.");
  OPTION(double, gamma, 0.1, "What a decay multiplies by.");
};
struct ConstantLROptions : ScheduleOptions<ConstantLROptions> {
  OPTION(double, factor, 1.0 / 3, "What the rate is multiplied by until the end, from 0 to 1.");
  OPTION(int64_t, total_iters, 5, "Epochs until the full rate.");
};
struct LinearLROptions : ScheduleOptions<LinearLROptions> {
  OPTION(double, start_factor, 1.0 / 3, "Factor of the first epoch, above 0 and at most 1.");
  OPTION(double, end_factor, 1.0, "Factor at the end, from 0 to 1.");
  OPTION(int64_t, total_iters, 5, "Epochs from start_factor to end_factor.");
};
struct ExponentialLROptions : ScheduleOptions<ExponentialLROptions> {
  ExponentialLROptions() = default;
  explicit ExponentialLROptions(double gamma) { this->gamma(gamma); }
  OPTION(std::optional<double>, gamma, std::nullopt,
         "What each epoch multiplies by. Must be given.");
};
struct PolynomialLROptions : ScheduleOptions<PolynomialLROptions> {
  OPTION(int64_t, total_iters, 5, "Epochs until the rate is 0.");
  OPTION(double, power, 1.0, "1 is a straight line.");
};
struct CosineAnnealingLROptions : ScheduleOptions<CosineAnnealingLROptions> {
  CosineAnnealingLROptions() = default;
  explicit CosineAnnealingLROptions(int64_t T_max) { this->T_max(T_max); }
  OPTION(int64_t, T_max, 0, "Epochs until eta_min: half a period. Must be given.");
  OPTION(double, eta_min, 0.0, "The smallest rate.");
};
struct CosineAnnealingWarmRestartsOptions : ScheduleOptions<CosineAnnealingWarmRestartsOptions> {
  CosineAnnealingWarmRestartsOptions() = default;
  explicit CosineAnnealingWarmRestartsOptions(int64_t T_0) { this->T_0(T_0); }
  OPTION(int64_t, T_0, 0, "Epochs until the first restart. Must be given.");
  OPTION(int64_t, T_mult, 1, "How much longer each round is than the one before. At least 1.");
  OPTION(double, eta_min, 0.0, "The smallest rate.");
};

void check(const StepLROptions& options);
void check(const MultiStepLROptions& options);
void check(const ConstantLROptions& options);
void check(const LinearLROptions& options);
void check(const ExponentialLROptions& options);
void check(const PolynomialLROptions& options);
void check(const CosineAnnealingLROptions& options);
void check(const CosineAnnealingWarmRestartsOptions& options);

// Multiplies by gamma every step_size epochs.
class StepLR : public Schedule {
 public:
  StepLR(OptimizerRef optimizer, const StepLROptions& options);

 protected:
  std::vector<double> get_lr() override;
  std::vector<double> closed_form_lr() override;
  void fields(StateFields& fields) override;

 private:
  int64_t step_size_;
  double gamma_;
};

// Multiplies by gamma at each milestone, by its square at one that is named twice.
class MultiStepLR : public Schedule {
 public:
  MultiStepLR(OptimizerRef optimizer, const MultiStepLROptions& options);

 protected:
  std::vector<double> get_lr() override;
  std::vector<double> closed_form_lr() override;
  void fields(StateFields& fields) override;

 private:
  std::map<int64_t, int64_t> milestones_;  // and how often each was named
  double gamma_;
};

// Multiplies by a factor until total_iters.
class ConstantLR : public Schedule {
 public:
  explicit ConstantLR(OptimizerRef optimizer, const ConstantLROptions& options = {});

 protected:
  std::vector<double> get_lr() override;
  std::vector<double> closed_form_lr() override;
  void fields(StateFields& fields) override;

 private:
  double factor_;
  int64_t total_iters_;
};

// Goes from start_factor to end_factor in a straight line.
class LinearLR : public Schedule {
 public:
  explicit LinearLR(OptimizerRef optimizer, const LinearLROptions& options = {});

 protected:
  std::vector<double> get_lr() override;
  std::vector<double> closed_form_lr() override;
  void fields(StateFields& fields) override;

 private:
  double start_factor_;
  double end_factor_;
  int64_t total_iters_;
};

// Multiplies by gamma every epoch.
class ExponentialLR : public Schedule {
 public:
  ExponentialLR(OptimizerRef optimizer, const ExponentialLROptions& options);

 protected:
  std::vector<double> get_lr() override;
  std::vector<double> closed_form_lr() override;
  void fields(StateFields& fields) override;

 private:
  double gamma_;
};

// Goes to 0 as (1 - epoch / total_iters) ^ power.
class PolynomialLR : public Schedule {
 public:
  explicit PolynomialLR(OptimizerRef optimizer, const PolynomialLROptions& options = {});

 protected:
  std::vector<double> get_lr() override;
  std::vector<double> closed_form_lr() override;
  void fields(StateFields& fields) override;

 private:
  int64_t total_iters_;
  double power_;
};

// Half a cosine down to eta_min in T_max epochs, then up again.
class CosineAnnealingLR : public Schedule {
 public:
  CosineAnnealingLR(OptimizerRef optimizer, const CosineAnnealingLROptions& options);

 protected:
  std::vector<double> get_lr() override;
  std::vector<double> closed_form_lr() override;
  void fields(StateFields& fields) override;

 private:
  int64_t T_max_;
  double eta_min_;
};

// Half a cosine down to eta_min, then from the start again, each round T_mult times as long.
class CosineAnnealingWarmRestarts : public Schedule {
 public:
  CosineAnnealingWarmRestarts(OptimizerRef optimizer,
                              const CosineAnnealingWarmRestartsOptions& options);
  using Schedule::step;
  void step() override;

 protected:
  std::vector<double> get_lr() override;
  void fields(StateFields& fields) override;

 private:
  int64_t T_0_;
  int64_t T_i_;
  int64_t T_mult_;
  double eta_min_;
  int64_t T_cur_;
};

// Functions of the epoch, one for all groups or one for each. They are not saved.
class LambdaSchedule : public Schedule {
 public:
  using Lambda = std::function<double(int64_t epoch)>;

 protected:
  // Errors: MisconfigurationError for another number of functions than groups.
  LambdaSchedule(OptimizerRef optimizer, std::vector<Lambda> lambdas, int64_t last_epoch);
  double factor(size_t group) const { return lambdas_[group](last_epoch()); }
  void fields(StateFields& fields) override;

 private:
  std::vector<Lambda> lambdas_;
};

// The initial rate times a function of the epoch.
class LambdaLR : public LambdaSchedule {
 public:
  LambdaLR(OptimizerRef optimizer, Lambda lr_lambda, int64_t last_epoch = -1)
      : LambdaLR(std::move(optimizer), std::vector<Lambda>{std::move(lr_lambda)}, last_epoch) {}
  LambdaLR(OptimizerRef optimizer, std::vector<Lambda> lr_lambdas, int64_t last_epoch = -1);

 protected:
  std::vector<double> get_lr() override;
};

// The rate times a function of the epoch, every epoch but the first.
class MultiplicativeLR : public LambdaSchedule {
 public:
  MultiplicativeLR(OptimizerRef optimizer, Lambda lr_lambda, int64_t last_epoch = -1)
      : MultiplicativeLR(std::move(optimizer), std::vector<Lambda>{std::move(lr_lambda)},
                         last_epoch) {}
  MultiplicativeLR(OptimizerRef optimizer, std::vector<Lambda> lr_lambdas, int64_t last_epoch = -1);

 protected:
  std::vector<double> get_lr() override;
};

}  // namespace lightning
