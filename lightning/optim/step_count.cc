#include "lightning/optim/step_count.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/stack.h>

#include <cmath>
#include <unordered_map>
#include <vector>

namespace lightning {

void StepCount::place(at::Tensor steps) {
  on_device_ = std::move(steps);
  known_ = host();
  behind_ = false;
}

void StepCount::advance(bool certain) {
  set_host(host() + 1);
  ++known_;
  behind_ = behind_ || !certain;
}

void StepCount::settle(int64_t steps) {
  set_host(steps);
  known_ = steps;
  behind_ = false;
}

void settle_steps(const torch::optim::Optimizer& optimizer) {
  std::unordered_map<c10::Device, std::vector<StepCount*>> behind;
  for (const auto& entry : optimizer.state()) {
    auto* count = dynamic_cast<StepCount*>(entry.second.get());
    if (count != nullptr && count->is_behind()) {
      behind[count->on_device().device()].push_back(count);
    }
  }
  const at::NoGradGuard no_grad;
  for (const auto& [device, counts] : behind) {
    std::vector<at::Tensor> steps;
    for (const auto* count : counts) steps.push_back(count->on_device());
    const auto read = at::stack(steps).cpu();
    for (size_t i = 0; i < counts.size(); ++i) {
      counts[i]->settle(std::lround(read.const_data_ptr<float>()[i]));
    }
  }
}

}  // namespace lightning
