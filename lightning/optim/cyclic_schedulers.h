// Schedules that go up and down in steps of the optimizer, and the momentum against them: return
// them with LRSchedulerConfig(...).set_interval("step").
//
// Errors of both: MisconfigurationError for an option that is missing or out of its range, and for
// cycle_momentum with an optimizer that has neither momentum (SGD, RMSprop) nor betas (Adam,
// AdamW). Source: torch 2.11, `torch.optim.lr_scheduler`; values are equal to it bit for bit.
#pragma once

#include <functional>

#include "lightning/optim/schedule.h"
#include "lightning/options.h"

namespace lightning {

struct OneCycleLROptions : Options<OneCycleLROptions> {
  OneCycleLROptions() = default;
  explicit OneCycleLROptions(double max_lr) { this->max_lr({max_lr}); }
  OPTION(std::vector<double>, max_lr, std::vector<double>(),
         "The largest rate, for all groups or for each. Must be given.");
  OPTION(std::optional<int64_t>, total_steps, std::nullopt,
         "Steps of the cycle. Must be given, or epochs and steps_per_epoch.");
  OPTION(std::optional<int64_t>, epochs, std::nullopt, "Epochs of the cycle.");
  OPTION(std::optional<int64_t>, steps_per_epoch, std::nullopt, "Optimizer steps in an epoch.");
  OPTION(double, pct_start, 0.3, "The part of the cycle, from 0 to 1, in which the rate rises.");
  OPTION(std::string, anneal_strategy, "cos", "cos or linear.");
  OPTION(bool, cycle_momentum, true, "Move momentum (or the first beta) against the rate.");
  OPTION(std::vector<double>, base_momentum, std::vector<double>{0.85},
         "Momentum at the largest rate, for all groups or for each.");
  OPTION(std::vector<double>, max_momentum, std::vector<double>{0.95},
         "Momentum at the start and the end, for all groups or for each.");
  OPTION(double, div_factor, 25.0, "The first rate is max_lr / div_factor.");
  OPTION(double, final_div_factor, 1e4, "The last rate is the first / final_div_factor.");
  OPTION(bool, three_phase, false, "Down to the first rate as it went up, then to the last rate.");
  OPTION(int64_t, last_epoch, -1,
         "The step to resume after, where an earlier schedule is over the same optimizer.");
};

struct CyclicLROptions : Options<CyclicLROptions> {
  CyclicLROptions() = default;
  CyclicLROptions(double base_lr, double max_lr) { this->base_lr({base_lr}).max_lr({max_lr}); }
  OPTION(std::vector<double>, base_lr, std::vector<double>(),
         "The smallest rate, for all groups or for each. Must be given.");
  OPTION(std::vector<double>, max_lr, std::vector<double>(),
         "The largest rate, for all groups or for each. Must be given.");
  OPTION(int64_t, step_size_up, 2000, "Steps up.");
  OPTION(std::optional<int64_t>, step_size_down, std::nullopt, "Steps down; as many as up.");
  OPTION(std::string, mode, "triangular",
         "triangular, triangular2 (half as high each cycle) or exp_range (gamma ^ steps).");
  OPTION(double, gamma, 1.0, "For exp_range.");
  OPTION(std::string, scale_mode, "cycle",
         "What a scale function of one's own is given: the cycle or the iterations.");
  OPTION(bool, cycle_momentum, true, "Move momentum (or the first beta) against the rate.");
  OPTION(std::vector<double>, base_momentum, std::vector<double>{0.8},
         "Momentum at the largest rate, for all groups or for each.");
  OPTION(std::vector<double>, max_momentum, std::vector<double>{0.9},
         "Momentum at the smallest rate, for all groups or for each.");
  OPTION(int64_t, last_epoch, -1,
         "The step to resume after, where an earlier schedule is over the same optimizer.");
};

void check(const OneCycleLROptions& options);
void check(const CyclicLROptions& options);

// Up to max_lr, down to nearly nothing, once.
// Errors: MisconfigurationError for a step beyond the last.
class OneCycleLR : public Schedule {
 public:
  OneCycleLR(OptimizerRef optimizer, const OneCycleLROptions& options);
  bool counts_steps() const override { return true; }

 protected:
  std::vector<double> get_lr() override;
  void fields(StateFields& fields) override;

 private:
  struct Phase {
    double end_step;
    std::string start_lr, end_lr, start_momentum, end_momentum;  // names of group values
  };
  double anneal(double start, double end, double part) const;
  void phase_fields(StateFields& fields);

  int64_t total_steps_;
  std::vector<Phase> phases_;
  std::string anneal_;
  bool cycle_momentum_;
  bool use_beta1_ = false;
};

// Up and down between base_lr and max_lr.
class CyclicLR : public Schedule {
 public:
  using ScaleFunction = std::function<double(double)>;

  //   scale   in place of `mode`: the height, from 0 to 1, of a cycle or an iteration. Not saved.
  CyclicLR(OptimizerRef optimizer, const CyclicLROptions& options, ScaleFunction scale = nullptr);

 protected:
  std::vector<double> get_lr() override;
  void fields(StateFields& fields) override;

 private:
  double scale(double cycle) const;

  std::vector<double> max_lrs_;
  double total_size_;
  double step_ratio_;
  std::string mode_;
  double gamma_;
  ScaleFunction custom_scale_;
  std::string scale_mode_;
  bool cycle_momentum_;
  bool use_beta1_ = false;
  std::vector<double> base_momentums_;
  std::vector<double> max_momentums_;
};

}  // namespace lightning
