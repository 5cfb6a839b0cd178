// A schedule of LibTorch's own (`torch::optim::StepLR`, or a class of the user's that derives from
// `torch::optim::LRScheduler`) where this framework takes one:
//
//   std::make_shared<TorchLRScheduler>(adam, std::make_shared<torch::optim::StepLR>(*adam, 30,
//   0.1))
//
// Its count is saved as `last_epoch` and restored.
#pragma once

#include <memory>
#include <vector>

#include "lightning/optim/schedule.h"

namespace torch::optim {
class LRScheduler;
}

namespace lightning {

class TorchLRScheduler : public LRScheduler {
 public:
  //   optimizer   the one that `scheduler` was made with
  // Errors: MisconfigurationError for a null schedule.
  TorchLRScheduler(OptimizerRef optimizer, std::shared_ptr<torch::optim::LRScheduler> scheduler);

  using LRScheduler::step;
  void step() override;
  torch::optim::Optimizer& optimizer() const override { return *optimizer_; }
  std::vector<double> get_last_lr() const override;
  State state_dict() const override;
  void load_state_dict(const State& state) override;

 private:
  OptimizerRef optimizer_;
  std::shared_ptr<torch::optim::LRScheduler> scheduler_;
};

}  // namespace lightning
