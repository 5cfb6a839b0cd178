// Schedules made of schedules: one after another, all at once, and a warm-up before another one.
//
//   auto warmup = std::make_shared<LinearLR>(adam, LinearLROptions().total_iters(500));
//   auto decay = std::make_shared<CosineAnnealingLR>(adam, CosineAnnealingLROptions(10'000));
//   std::make_shared<SequentialLR>(adam, std::vector<std::shared_ptr<LRScheduler>>{warmup, decay},
//                                  std::vector<int64_t>{500});
//
//   std::make_shared<WarmupLR>(adam, WarmupLROptions(500).after(CosineAnnealingLROptions(10'000)));
//
// Source: torch 2.11, `torch.optim.lr_scheduler`; values are equal to it bit for bit.
#pragma once

#include <memory>
#include <vector>

#include "lightning/optim/factories.h"
#include "lightning/optim/schedule.h"

namespace lightning {

struct SequentialLROptions : Options<SequentialLROptions> {
  OPTION(std::vector<Part<LRSchedulerFactory>>, schedulers, std::vector<Part<LRSchedulerFactory>>(),
         "The schedules, in order.");
  OPTION(std::vector<int64_t>, milestones, std::vector<int64_t>(),
         "The epochs at which the second and further schedules begin.");
};

struct ChainedSchedulerOptions : Options<ChainedSchedulerOptions> {
  OPTION(std::vector<Part<LRSchedulerFactory>>, schedulers, std::vector<Part<LRSchedulerFactory>>(),
         "The schedules; each changes the rate that the one before it left.");
};

struct WarmupLROptions : Options<WarmupLROptions> {
  WarmupLROptions() = default;
  explicit WarmupLROptions(int64_t warmup_steps) { this->warmup_steps(warmup_steps); }
  OPTION(int64_t, warmup_steps, 0, "Steps until the full rate. Must be given.");
  OPTION(std::optional<double>, start_factor, std::nullopt,
         "The part of the rate that the first step has; 1 / warmup_steps.");
  OPTION(Part<LRSchedulerFactory>, after, Part<LRSchedulerFactory>(),
         "The schedule that follows, counted from the end of the warm-up. The full rate is held "
         "where there is none.");
};

void check(const SequentialLROptions& options);
void check(const ChainedSchedulerOptions& options);
void check(const WarmupLROptions& options);

// What the classes below share: the schedules and their states.
// Errors of loading: CheckpointError, also for another number of schedules; all are then as before.
class CombinedSchedule : public Schedule {
 protected:
  // Errors: MisconfigurationError for none, for ReduceLROnPlateau, for schedules over another
  // optimizer, and for classes that do not derive from Schedule.
  CombinedSchedule(const char* name, OptimizerRef optimizer,
                   const std::vector<std::shared_ptr<LRScheduler>>& schedulers);
  void undo() override;
  bool can_jump() const override { return false; }
  std::vector<double> get_lr() override { return current_lrs(); }
  void note_lrs() { set_lrs(current_lrs()); }
  void scheduler_fields(StateFields& fields);

  std::vector<std::shared_ptr<Schedule>> schedulers_;
};

// Each schedule in turn; at its milestone one begins at its own epoch 0.
// Errors: MisconfigurationError, beyond those above, for a number of milestones other than that of
// the schedules less one, and for a combined schedule that is not the first.
class SequentialLR : public CombinedSchedule {
 public:
  SequentialLR(OptimizerRef optimizer, const std::vector<std::shared_ptr<LRScheduler>>& schedulers,
               std::vector<int64_t> milestones);
  SequentialLR(OptimizerRef optimizer, const SequentialLROptions& options);

  using Schedule::step;
  void step() override;

 protected:
  void fields(StateFields& fields) override;

 private:
  std::vector<int64_t> milestones_;
};

// All schedules step together.
class ChainedScheduler : public CombinedSchedule {
 public:
  ChainedScheduler(OptimizerRef optimizer,
                   const std::vector<std::shared_ptr<LRScheduler>>& schedulers);
  ChainedScheduler(OptimizerRef optimizer, const ChainedSchedulerOptions& options);

  using Schedule::step;
  void step() override;

 protected:
  void fields(StateFields& fields) override;
};

// LinearLR from start_factor to 1, then another schedule; not in torch. Its state is
// SequentialLR's.
class WarmupLR : public SequentialLR {
 public:
  WarmupLR(OptimizerRef optimizer, const WarmupLROptions& options);
  // With a schedule that is already made, in place of `options.after()`.
  WarmupLR(OptimizerRef optimizer, const WarmupLROptions& options,
           std::shared_ptr<LRScheduler> after);
};

}  // namespace lightning
