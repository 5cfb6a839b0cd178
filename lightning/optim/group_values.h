// What schedules note beside each parameter group of an optimizer: `initial_lr`, and `max_lr`,
// `min_lr`, `base_momentum`, `max_momentum` where a schedule has them. Python keeps these in the
// group itself, where LibTorch has no room. All schedules over one optimizer share them, so that
// the second one starts from the learning rates that the first one found; they are saved and loaded
// with the optimizer's state, and forgotten with the last schedule.
#pragma once

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "lightning/fwd.h"

namespace lightning {

// A few numbers by name, in the order in which they were noted, as Python's dict keeps it.
class NamedValues {
 public:
  double& operator[](const std::string& name);
  // Errors: std::out_of_range for a name that is not there.
  double at(const std::string& name) const;
  bool contains(const std::string& name) const;
  void move_to_end(const std::string& name);
  size_t size() const { return values_.size(); }
  auto begin() const { return values_.begin(); }
  auto end() const { return values_.end(); }

 private:
  std::vector<std::pair<std::string, double>> values_;
};

struct GroupValues {
  std::vector<NamedValues> groups;  // in the order of the parameter groups

  // Those of this optimizer, made where there are none. A schedule keeps them alive.
  static std::shared_ptr<GroupValues> of(const torch::optim::Optimizer& optimizer);
  // Null where no schedule is over this optimizer.
  static std::shared_ptr<GroupValues> find(const torch::optim::Optimizer& optimizer);
  static bool is_name(const std::string& key);
};

}  // namespace lightning
