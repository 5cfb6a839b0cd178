#include "lightning/optim/fused_state.h"

#include <ATen/ops/full.h>
#include <torch/optim/adagrad.h>
#include <torch/optim/adam.h>
#include <torch/optim/adamw.h>
#include <torch/optim/sgd.h>

#include <typeinfo>

namespace lightning::fused {
namespace {

using namespace torch::optim;

template <class AdamState>
Moments moments_of_adam(OptimizerParamState& state) {
  auto& adam = static_cast<AdamState&>(state);
  return {{&adam.exp_avg(), &adam.exp_avg_sq(), &adam.max_exp_avg_sq()}};
}

template <class AdamOptions>
int moments_of_adam(const OptimizerOptions& options) {
  return static_cast<const AdamOptions&>(options).amsgrad() ? 3 : 2;
}

}  // namespace

Kind kind_of(const Optimizer& optimizer) {
  const std::type_info& type = typeid(optimizer);
  if (type == typeid(SGD)) return Kind::kSGD;
  if (type == typeid(Adam)) return Kind::kAdam;
  if (type == typeid(AdamW)) return Kind::kAdamW;
  return type == typeid(Adagrad) ? Kind::kAdagrad : Kind::kOther;
}

OptimizerParamState* state_of(const Optimizer& optimizer, const at::Tensor& param) {
  const auto found = optimizer.state().find(param.unsafeGetTensorImpl());
  return found == optimizer.state().end() ? nullptr : found->second.get();
}

Moments moments_of(Kind kind, OptimizerParamState& state) {
  switch (kind) {
    case Kind::kSGD:
      return {{&static_cast<SGDParamState&>(state).momentum_buffer()}};
    case Kind::kAdam:
      return moments_of_adam<AdamParamState>(state);
    case Kind::kAdamW:
      return moments_of_adam<AdamWParamState>(state);
    case Kind::kAdagrad:
      return {{&static_cast<AdagradParamState&>(state).sum()}};
    default:
      return {};
  }
}

int moments_wanted(Kind kind, const OptimizerOptions& options) {
  switch (kind) {
    case Kind::kSGD:
      return static_cast<const SGDOptions&>(options).momentum() != 0 ? 1 : 0;
    case Kind::kAdam:
      return moments_of_adam<AdamOptions>(options);
    case Kind::kAdamW:
      return moments_of_adam<AdamWOptions>(options);
    case Kind::kAdagrad:
      return 1;
    default:
      return 0;
  }
}

StepCount* count_of(Kind kind, OptimizerParamState* state) {
  switch (kind) {
    case Kind::kAdam:
      return CountedState<AdamParamState>::of(state);
    case Kind::kAdamW:
      return CountedState<AdamWParamState>::of(state);
    case Kind::kAdagrad:
      return CountedState<AdagradParamState>::of(state);
    default:
      return nullptr;
  }
}

StepCount* make_count(Kind kind, std::unique_ptr<OptimizerParamState>& state) {
  switch (kind) {
    case Kind::kAdam:
      return &CountedState<AdamParamState>::make(state);
    case Kind::kAdamW:
      return &CountedState<AdamWParamState>::make(state);
    case Kind::kAdagrad:
      return &CountedState<AdagradParamState>::make(state);
    default:
      if (state == nullptr) state = std::make_unique<SGDParamState>();
      return nullptr;
  }
}

void place(StepCount& count, const at::Tensor& param) {
  const auto steps = static_cast<double>(count.host());
  const at::Tensor before = count.on_device();
  if (before.defined() && before.device() == param.device()) {
    before.fill_(steps);
    count.place(before);
  } else {
    count.place(at::full({}, steps, at::TensorOptions(param.device()).dtype(at::kFloat)));
  }
}

bool uses_cuda(const Optimizer& optimizer) {
  for (const auto& group : optimizer.param_groups()) {
    for (const at::Tensor& param : group.params()) {
      if (param.is_cuda()) return true;
    }
  }
  return false;
}

}  // namespace lightning::fused
