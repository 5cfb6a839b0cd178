// What schedules note beside each parameter group of an optimizer: `initial_lr`, and `max_lr`,
// `min_lr`, `base_momentum`, `max_momentum` where a schedule has them. Python keeps these in the
// group itself, where LibTorch has no room. All schedules over one optimizer share them, so that
// the second one starts from the learning rates that the first one found; they are saved and loaded
// with the optimizer's state, and forgotten with the last schedule.
#pragma once

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "lightning/fwd.h"

namespace lightning {

struct GroupValues {
  std::vector<std::map<std::string, double>> groups;  // in the order of the parameter groups

  // Those of this optimizer, made where there are none. A schedule keeps them alive.
  static std::shared_ptr<GroupValues> of(const torch::optim::Optimizer& optimizer);
  // Null where no schedule is over this optimizer.
  static std::shared_ptr<GroupValues> find(const torch::optim::Optimizer& optimizer);
  static bool is_name(const std::string& key);
};

}  // namespace lightning
