// Reduces the learning rate when a metric has stopped improving.
#pragma once

#include <string>
#include <vector>

#include "lightning/optim/schedule.h"
#include "lightning/options.h"

namespace lightning {

struct ReduceLROnPlateauOptions : Options<ReduceLROnPlateauOptions> {
  OPTION(std::string, monitor, "",
         "The logged metric to watch, unless LRSchedulerConfig::set_monitor names it.");
  OPTION(std::string, mode, "min", "Whether the metric improves downwards (min) or upwards (max).");
  OPTION(double, factor, 0.1, "What the rate is multiplied by. Below 1.");
  OPTION(int64_t, patience, 10, "Steps without improvement that are borne before a reduction.");
  OPTION(double, threshold, 1e-4, "Smallest change that counts as an improvement.");
  OPTION(std::string, threshold_mode, "rel",
         "Whether threshold is a part of the best value (rel) or in its units (abs).");
  OPTION(int64_t, cooldown, 0, "Steps after a reduction that are not counted.");
  OPTION(std::vector<double>, min_lr, std::vector<double>{0.0},
         "The smallest rate, for all groups or for each.");
  OPTION(double, eps, 1e-8, "A reduction by less than this is left out.");
};

// Errors: MisconfigurationError for a factor of 1 or more, an unknown mode or threshold_mode, as
// many values of min_lr as there are no groups.
void check(const ReduceLROnPlateauOptions& options);

// Source: torch 2.11, `torch.optim.lr_scheduler.ReduceLROnPlateau`; values are equal bit for bit.
class ReduceLROnPlateau : public LRScheduler {
 public:
  explicit ReduceLROnPlateau(OptimizerRef optimizer, const ReduceLROnPlateauOptions& options = {});

  // Errors: MisconfigurationError without a metric.
  void step() override;
  void step(double metric) override;
  bool needs_metric() const override { return true; }
  std::string monitor() const override { return monitor_; }

  torch::optim::Optimizer& optimizer() const override { return *optimizer_; }
  std::vector<double> get_last_lr() const override { return last_lr_; }
  State state_dict() const override;
  void load_state_dict(const State& state) override;

 private:
  bool is_better(double metric) const;
  void reduce_lr();
  void note_lrs();
  void fields(StateFields& fields);

  OptimizerRef optimizer_;
  std::string monitor_;
  double factor_;
  std::optional<double> default_min_lr_;  // where one serves all groups
  std::vector<double> min_lrs_;
  int64_t patience_;
  int64_t cooldown_;
  double eps_;
  int64_t last_epoch_ = 0;
  std::vector<double> last_lr_;
  std::string mode_;
  double threshold_;
  std::string threshold_mode_;
  double best_;
  int64_t cooldown_counter_ = 0;
  int64_t num_bad_epochs_ = 0;
};

}  // namespace lightning
