// What the schedules have in common: the optimizer, the counts, and the state under Python's keys.
// A schedule of one's own gives the learning rates for `last_epoch()`:
//
//   struct HalveLR : lightning::Schedule {
//     explicit HalveLR(lightning::OptimizerRef optimizer) : Schedule(optimizer) { initial_step(); }
//     std::vector<double> get_lr() override {
//       auto lrs = current_lrs();
//       for (double& lr : lrs) lr *= is_initial() ? 1 : 0.5;
//       return lrs;
//     }
//   };
//
// Source: torch 2.11, `torch.optim.lr_scheduler.LRScheduler`.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "lightning/optim/group_values.h"
#include "lightning/optim/lr_scheduler.h"

namespace lightning {

// The optimizer of a schedule: shared with it, or one that outlives it.
class OptimizerRef {
 public:
  template <class O, std::enable_if_t<std::is_base_of<torch::optim::Optimizer, O>::value, int> = 0>
  OptimizerRef(std::shared_ptr<O> optimizer) : optimizer_(optimizer.get()) {
    owner_ = std::move(optimizer);
  }
  OptimizerRef(torch::optim::Optimizer& optimizer) : optimizer_(&optimizer) {}

  // Errors: MisconfigurationError for a null pointer.
  torch::optim::Optimizer& operator*() const;

 private:
  std::shared_ptr<void> owner_;
  torch::optim::Optimizer* optimizer_;
};

// Writes the fields of an object to a State, or reads them from one: they are named once. Where a
// state lacks a field, the object keeps what it has, as in Python.
class StateFields {
 public:
  explicit StateFields(State& out) : out_(&out) {}
  explicit StateFields(const State& in) : in_(&in) {}

  void operator()(const char* key, bool& value);
  void operator()(const char* key, int64_t& value);
  void operator()(const char* key, double& value);
  void operator()(const char* key, std::string& value);
  void operator()(const char* key, std::vector<int64_t>& values);
  void operator()(const char* key, std::vector<double>& values);
  // A key that Python has and this object has no use for.
  void constant(const char* key, State value);

  State* out() const { return out_; }      // null when reading
  const State* in(const char* key) const;  // null when writing or missing

 private:
  State* out_ = nullptr;
  const State* in_ = nullptr;
};

class Schedule : public LRScheduler {
 public:
  using LRScheduler::step;
  void step() override;

  torch::optim::Optimizer& optimizer() const override { return *optimizer_; }
  std::vector<double> get_last_lr() const override { return last_lr_; }
  int64_t last_epoch() const { return last_epoch_; }

  State state_dict() const override;
  // Errors: CheckpointError for values of another type or for another number of groups; the
  // schedule is then as before.
  void load_state_dict(const State& state) override;

 protected:
  // Notes `initial_lr` of each group, or starts from what an earlier schedule over the same
  // optimizer noted. The constructor of each schedule ends with initial_step().
  //
  //   last_epoch   -1, or the epoch that this schedule resumes after; then an earlier schedule has
  //                noted `initial_lr`. Errors: MisconfigurationError otherwise.
  explicit Schedule(OptimizerRef optimizer, int64_t last_epoch = -1);

  // The learning rates of `last_epoch()`, for each group.
  virtual std::vector<double> get_lr() = 0;
  // The same when it was jumped to (SequentialLR begins its next schedule so).
  virtual std::vector<double> closed_form_lr() { return get_lr(); }
  // The state, in Python's order: a schedule's own fields, then those of its base.
  virtual void fields(StateFields& fields);
  void epoch_field(StateFields& fields) { fields("last_epoch", last_epoch_); }
  void last_lr_field(StateFields& fields) { fields("_last_lr", last_lr_); }

  virtual void initial_step();
  // Takes back the step that the constructor made.
  virtual void undo();
  // Whether SequentialLR can begin this schedule at a milestone.
  virtual bool can_jump() const { return true; }
  // One epoch on, or to `epoch`.
  void update_lr(std::optional<int64_t> epoch = std::nullopt);

  bool is_initial() const { return is_initial_; }
  int64_t step_count() const { return step_count_; }
  void set_last_epoch(int64_t epoch) { last_epoch_ = epoch; }
  const std::vector<double>& base_lrs() const { return base_lrs_; }
  void set_base_lrs(std::vector<double> lrs) { base_lrs_ = std::move(lrs); }
  std::vector<double> current_lrs() const;
  void set_lrs(const std::vector<double>& lrs);  // and notes them as the last ones
  std::vector<double> scaled(const std::vector<double>& lrs, double factor) const;
  // What Python keeps in the groups; GroupValues says which.
  std::vector<NamedValues>& group_values() { return values_->groups; }

 private:
  friend class CombinedSchedule;
  friend class SequentialLR;

  OptimizerRef optimizer_;
  std::shared_ptr<GroupValues> values_;
  std::vector<double> base_lrs_;
  std::vector<double> last_lr_;
  int64_t last_epoch_;
  int64_t step_count_ = 0;
  bool is_initial_ = false;
};

// One value for each group from one for all or one for each.
// Errors: MisconfigurationError for another number of values.
std::vector<double> one_per_group(const char* schedule, const char* option,
                                  const std::vector<double>& values,
                                  const torch::optim::Optimizer& optimizer);

// Errors: MisconfigurationError "`schedule` got `option` `value`, expected `expected`." unless
// `good`.
void require_option(bool good, const char* schedule, const char* option, double value,
                    const char* expected);

}  // namespace lightning
