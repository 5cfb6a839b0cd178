#include "lightning/optim/torch_scheduler.h"

#include <torch/optim/schedulers/lr_scheduler.h>

#include "lightning/errors.h"

namespace lightning {
namespace {

// LibTorch keeps the count to derived classes.
struct Count : torch::optim::LRScheduler {
  static unsigned& of(torch::optim::LRScheduler& scheduler) {
    return scheduler.*(&Count::step_count_);
  }
};

}  // namespace

TorchLRScheduler::TorchLRScheduler(OptimizerRef optimizer,
                                   std::shared_ptr<torch::optim::LRScheduler> scheduler)
    : optimizer_(std::move(optimizer)), scheduler_(std::move(scheduler)) {
  if (scheduler_ == nullptr) {
    throw MisconfigurationError("TorchLRScheduler got a schedule that is null.");
  }
}

void TorchLRScheduler::step() { scheduler_->step(); }

std::vector<double> TorchLRScheduler::get_last_lr() const {
  std::vector<double> lrs;
  for (const auto& group : optimizer().param_groups()) lrs.push_back(group.options().get_lr());
  return lrs;
}

State TorchLRScheduler::state_dict() const {
  const auto lrs = get_last_lr();
  return State::dict({{"last_epoch", static_cast<int64_t>(Count::of(*scheduler_))},
                      {"_last_lr", State::List(lrs.begin(), lrs.end())}});
}

void TorchLRScheduler::load_state_dict(const State& state) {
  Count::of(*scheduler_) = static_cast<unsigned>(state.at("last_epoch").as_int());
}

}  // namespace lightning
