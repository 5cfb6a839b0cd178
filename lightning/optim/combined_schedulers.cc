#include "lightning/optim/combined_schedulers.h"

#include <torch/optim/optimizer.h>

#include <algorithm>

#include "lightning/errors.h"
#include "lightning/optim/decay_schedulers.h"

namespace lightning {
namespace {

using Schedulers = std::vector<std::shared_ptr<LRScheduler>>;

const Registration<LRSchedulerFactory> kSchedules[] = {
    {"SequentialLR", "One schedule after another.",
     schedule_factory<SequentialLR, SequentialLROptions>()},
    {"ChainedScheduler", "Several schedules at once.",
     schedule_factory<ChainedScheduler, ChainedSchedulerOptions>()},
    {"WarmupLR", "A straight line up to the full rate, then another schedule or none.",
     schedule_factory<WarmupLR, WarmupLROptions>()},
};

Schedulers make_all(const char* where, const std::vector<Part<LRSchedulerFactory>>& parts,
                    const OptimizerRef& optimizer) {
  Schedulers made;
  for (const auto& part : parts) made.push_back(part.make(where)->make(optimizer));
  return made;
}

void require_milestones(size_t schedulers, size_t milestones) {
  if (schedulers == milestones + 1) return;
  throw MisconfigurationError(str("SequentialLR got ", schedulers, " schedules and ", milestones,
                                  " milestones, expected a milestone for each schedule but the "
                                  "first."));
}

void require_some(const char* name, size_t schedulers) {
  if (schedulers > 0) return;
  throw MisconfigurationError(str(name, " got no schedules, expected at least one."));
}

Schedulers warmup(const OptimizerRef& optimizer, const WarmupLROptions& options,
                  std::shared_ptr<LRScheduler> after) {
  check(options);
  const auto steps = static_cast<double>(options.warmup_steps());
  Schedulers parts = {std::make_shared<LinearLR>(
      optimizer, LinearLROptions()
                     .start_factor(options.start_factor().value_or(1.0 / steps))
                     .total_iters(options.warmup_steps()))};
  if (after == nullptr && !options.after().empty()) {
    after = options.after().make("WarmupLR.after")->make(optimizer);
  }
  if (after != nullptr) parts.push_back(std::move(after));
  return parts;
}

}  // namespace

void check(const SequentialLROptions& options) {
  require_some("SequentialLR", options.schedulers().size());
  require_milestones(options.schedulers().size(), options.milestones().size());
}

void check(const ChainedSchedulerOptions& options) {
  require_some("ChainedScheduler", options.schedulers().size());
}

void check(const WarmupLROptions& options) {
  if (options.warmup_steps() < 1) {
    throw MisconfigurationError(str("WarmupLR got warmup_steps ", options.warmup_steps(),
                                    ", expected 1 or more: write WarmupLROptions(500)."));
  }
  const double factor = options.start_factor().value_or(1);
  require_option(factor > 0 && factor <= 1, "WarmupLR", "start_factor", factor,
                 "a number above 0 and at most 1");
}

// ---- CombinedSchedule ---------------------------------------------------------------------------

CombinedSchedule::CombinedSchedule(const char* name, OptimizerRef optimizer,
                                   const Schedulers& schedulers)
    : Schedule(std::move(optimizer)) {
  require_some(name, schedulers.size());
  for (size_t i = 0; i < schedulers.size(); ++i) {
    const auto refuse = [&](const std::string& what) {
      throw MisconfigurationError(str(name, " got at place ", i, " ", what, "."));
    };
    if (schedulers[i] == nullptr) refuse("a schedule that is null");
    if (schedulers[i]->needs_metric()) {
      refuse("ReduceLROnPlateau, which steps by a metric. Return it as a schedule of its own");
    }
    auto schedule = std::dynamic_pointer_cast<Schedule>(schedulers[i]);
    if (schedule == nullptr) refuse("a schedule that does not derive from lightning::Schedule");
    if (&schedule->optimizer() != &this->optimizer()) {
      refuse("a schedule over another optimizer. Make all of them over the same one");
    }
    schedulers_.push_back(std::move(schedule));
  }
}

void CombinedSchedule::undo() {
  for (const auto& schedule : schedulers_) schedule->undo();
}

void CombinedSchedule::scheduler_fields(StateFields& fields) {
  State::List states;
  if (fields.out() != nullptr) {
    for (const auto& schedule : schedulers_) states.push_back(schedule->state_dict());
  }
  fields.constant("_schedulers", std::move(states));
  const State* saved = fields.in("_schedulers");
  if (saved == nullptr) return;
  const auto& list = saved->as_list();
  if (list.size() != schedulers_.size()) {
    throw CheckpointError(str("The state of a combined schedule holds ", list.size(),
                              " schedules, this one has ", schedulers_.size(),
                              ". Build it as it was when it was saved."));
  }
  for (size_t i = 0; i < list.size(); ++i) schedulers_[i]->load_state_dict(list[i]);
}

// ---- SequentialLR -------------------------------------------------------------------------------

SequentialLR::SequentialLR(OptimizerRef optimizer, const Schedulers& schedulers,
                           std::vector<int64_t> milestones)
    : CombinedSchedule("SequentialLR", std::move(optimizer), schedulers),
      milestones_(std::move(milestones)) {
  require_milestones(schedulers_.size(), milestones_.size());
  for (size_t i = 1; i < schedulers_.size(); ++i) {
    if (schedulers_[i]->can_jump()) continue;
    throw MisconfigurationError(str("SequentialLR got at place ", i,
                                    " a schedule made of schedules, which it cannot begin anew. "
                                    "Name its schedules here, with their milestones."));
  }
  set_last_epoch(0);
  // As if only the first schedule had been made.
  std::vector<double> initial;
  for (const auto& values : group_values()) initial.push_back(values.at("initial_lr"));
  set_lrs(initial);
  undo();
  schedulers_[0]->initial_step();
  note_lrs();
}

SequentialLR::SequentialLR(OptimizerRef optimizer, const SequentialLROptions& options)
    : SequentialLR(
          optimizer,
          (check(options), make_all("SequentialLR.schedulers", options.schedulers(), optimizer)),
          options.milestones()) {}

void SequentialLR::step() {
  set_last_epoch(last_epoch() + 1);
  const auto next = std::upper_bound(milestones_.begin(), milestones_.end(), last_epoch());
  const auto i = static_cast<size_t>(next - milestones_.begin());
  if (i > 0 && milestones_[i - 1] == last_epoch()) {
    schedulers_[i]->update_lr(0);
  } else {
    schedulers_[i]->step();
  }
  note_lrs();
}

void SequentialLR::fields(StateFields& fields) {
  fields("_milestones", milestones_);
  epoch_field(fields);
  last_lr_field(fields);
  scheduler_fields(fields);
}

// ---- ChainedScheduler ---------------------------------------------------------------------------

ChainedScheduler::ChainedScheduler(OptimizerRef optimizer, const Schedulers& schedulers)
    : CombinedSchedule("ChainedScheduler", std::move(optimizer), schedulers) {
  note_lrs();
}

ChainedScheduler::ChainedScheduler(OptimizerRef optimizer, const ChainedSchedulerOptions& options)
    : ChainedScheduler(optimizer, (check(options), make_all("ChainedScheduler.schedulers",
                                                            options.schedulers(), optimizer))) {}

void ChainedScheduler::step() {
  for (const auto& schedule : schedulers_) schedule->step();
  note_lrs();
}

void ChainedScheduler::fields(StateFields& fields) {
  last_lr_field(fields);
  scheduler_fields(fields);
}

// ---- WarmupLR -----------------------------------------------------------------------------------

WarmupLR::WarmupLR(OptimizerRef optimizer, const WarmupLROptions& options)
    : WarmupLR(std::move(optimizer), options, nullptr) {}

WarmupLR::WarmupLR(OptimizerRef optimizer, const WarmupLROptions& options,
                   std::shared_ptr<LRScheduler> after)
    : SequentialLR(optimizer, warmup(optimizer, options, after),
                   after != nullptr || !options.after().empty()
                       ? std::vector<int64_t>{options.warmup_steps()}
                       : std::vector<int64_t>()) {}

}  // namespace lightning
