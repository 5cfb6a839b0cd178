// Counts of optimizer steps that live on the device.
//
// Kernels read a parameter's count of steps from a float32 tensor, LibTorch's state has it as an
// int64. A CountedState is that state with the tensor beside it: it takes the place of the state in
// the optimizer, so it lives exactly as long, and is to everybody else the state it was. Both
// counts advance together; where only the device knows whether a step was skipped, the integer is
// behind until settle_steps().
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/optim/optimizer.h>

#include <cstdint>
#include <memory>
#include <typeinfo>
#include <utility>

#include "lightning/fwd.h"

namespace lightning {

class StepCount {
 public:
  virtual ~StepCount() = default;

  // 0-dim float32 on the parameter's device, where there is one yet.
  const at::Tensor& on_device() const { return on_device_; }

  // Whether the tensor holds the count: false before place(), and once somebody else has set the
  // integer, which then is the one that counts.
  bool is_placed() const { return on_device_.defined() && host() == known_; }
  // Takes a tensor that holds host() now.
  void place(at::Tensor steps);

  // The device counts, or has counted, one step more.
  //   certain   false where it may have been skipped
  void advance(bool certain);
  bool is_behind() const { return behind_ && is_placed(); }
  // The device's count, read.
  void settle(int64_t steps);

  virtual int64_t host() const = 0;

 protected:
  virtual void set_host(int64_t steps) = 0;

 private:
  at::Tensor on_device_;
  int64_t known_ = 0;  // host() as it was left here
  bool behind_ = false;
};

template <class ParamState>
class CountedState final : public ParamState, public StepCount {
 public:
  explicit CountedState(ParamState state) : ParamState(std::move(state)) {}

  // What `state` is, where it is counted already; null otherwise.
  static CountedState* of(torch::optim::OptimizerParamState* state) {
    return state != nullptr && typeid(*state) == typeid(CountedState)
               ? static_cast<CountedState*>(static_cast<ParamState*>(state))
               : nullptr;
  }
  // Puts a counted state in the place of a plain one, or of none.
  static CountedState& make(std::unique_ptr<torch::optim::OptimizerParamState>& state) {
    auto* counted = of(state.get());
    if (counted != nullptr) return *counted;
    auto made = std::make_unique<CountedState>(
        state == nullptr ? ParamState() : std::move(static_cast<ParamState&>(*state)));
    auto& result = *made;
    state = std::move(made);
    return result;
  }

  int64_t host() const override { return ParamState::step(); }

 protected:
  void set_host(int64_t steps) override { ParamState::step(steps); }
};

// Brings the integer counts in the optimizer's state up to date, with one read from each device
// where they are behind.
void settle_steps(const torch::optim::Optimizer& optimizer);

}  // namespace lightning
