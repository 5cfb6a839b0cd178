#include "lightning/optim/python_step.h"

#include <ATen/ScalarOps.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/maximum.h>
#include <ATen/ops/view_as_real.h>
#include <ATen/ops/zeros_like.h>
#include <c10/util/Exception.h>
#include <torch/optim/adam.h>
#include <torch/optim/adamw.h>
#include <torch/optim/rmsprop.h>
#include <torch/optim/sgd.h>

#include <cmath>
#include <memory>
#include <typeinfo>
#include <utility>

namespace lightning {
namespace {

using torch::optim::Optimizer;

at::Tensor as_real(const at::Tensor& tensor) {
  return tensor.is_complex() ? at::view_as_real(tensor) : tensor;
}

// As Python's `tensor.mul_(factor)`. In C++ that rounds the factor to the dtype of the tensor: in
// bfloat16 0.9 becomes 0.8984.
at::Tensor multiply_(const at::Tensor& tensor, double factor) {
  return tensor.mul_(at::native::wrapped_scalar_tensor(factor));
}

at::Tensor zeros(const at::Tensor& param) {
  return at::zeros_like(param, {}, at::MemoryFormat::Preserve);
}

// The parameter's state, and whether it was made just now.
template <class ParamState>
std::pair<ParamState*, bool> state_of(Optimizer& optimizer, const at::Tensor& param) {
  auto& state = optimizer.state()[param.unsafeGetTensorImpl()];
  const bool is_new = state == nullptr;
  if (is_new) state = std::make_unique<ParamState>();
  return {static_cast<ParamState*>(state.get()), is_new};
}

template <class AdamState>
AdamState& adam_state(Optimizer& optimizer, const at::Tensor& param, bool amsgrad) {
  const auto [state, is_new] = state_of<AdamState>(optimizer, param);
  if (is_new) {
    state->step(0);
    state->exp_avg(zeros(param));
    state->exp_avg_sq(zeros(param));
    if (amsgrad) state->max_exp_avg_sq(zeros(param));
  }
  return *state;
}

template <class AdamOptions, class AdamState>
void adam(Optimizer& optimizer, const AdamOptions& options, const at::Tensor& whole, bool decoupled,
          const char* name) {
  at::Tensor grad = whole.grad();
  TORCH_CHECK(!grad.is_sparse(), name, " does not support sparse gradients");
  auto& state = adam_state<AdamState>(optimizer, whole, options.amsgrad());
  const auto [beta1, beta2] = options.betas();
  state.step(state.step() + 1);

  if (options.weight_decay() != 0) {
    if (decoupled) {
      multiply_(whole, 1 - options.lr() * options.weight_decay());
    } else {
      grad = grad.add(whole, options.weight_decay());
    }
  }
  grad = as_real(grad);
  const at::Tensor mean = as_real(state.exp_avg()), squares = as_real(state.exp_avg_sq());
  mean.lerp_(grad, 1 - beta1);
  multiply_(squares, beta2).addcmul_(grad, grad, 1 - beta2);

  const auto steps = static_cast<double>(state.step());
  const double step_size = options.lr() / (1 - std::pow(beta1, steps));
  const double correction = std::pow(1 - std::pow(beta2, steps), 0.5);
  at::Tensor largest = squares;
  if (options.amsgrad()) {
    largest = as_real(state.max_exp_avg_sq());
    at::maximum_out(largest, largest, squares);
  }
  as_real(whole).addcdiv_(mean, (largest.sqrt() / correction).add_(options.eps()), -step_size);
}

void rmsprop(Optimizer& optimizer, const torch::optim::RMSpropOptions& options,
             const at::Tensor& param) {
  at::Tensor grad = param.grad();
  TORCH_CHECK(!grad.is_sparse(), "RMSprop does not support sparse gradients");
  const auto [state, is_new] = state_of<torch::optim::RMSpropParamState>(optimizer, param);
  if (is_new) {
    state->step(0);
    state->square_avg(zeros(param));
    if (options.momentum() > 0) state->momentum_buffer(zeros(param));
    if (options.centered()) state->grad_avg(zeros(param));
  }
  state->step(state->step() + 1);

  if (options.weight_decay() != 0) grad = grad.add(param, options.weight_decay());
  grad = as_real(grad);
  const at::Tensor squares = as_real(state->square_avg());
  multiply_(squares, options.alpha()).addcmul_(grad, grad, 1 - options.alpha());
  at::Tensor root;
  if (options.centered()) {
    const at::Tensor mean = as_real(state->grad_avg());
    mean.lerp_(grad, 1 - options.alpha());
    root = squares.addcmul(mean, mean, -1).sqrt_();
  } else {
    root = squares.sqrt();
  }
  root.add_(options.eps());
  if (options.momentum() > 0) {
    const at::Tensor momentum = as_real(state->momentum_buffer());
    multiply_(momentum, options.momentum()).addcdiv_(grad, root);
    as_real(param).add_(momentum, -options.lr());
  } else {
    as_real(param).addcdiv_(grad, root, -options.lr());
  }
}

void sgd(Optimizer& optimizer, const torch::optim::SGDOptions& options, const at::Tensor& param) {
  at::Tensor grad = param.grad();
  if (options.weight_decay() != 0) grad = grad.add(param, options.weight_decay());
  if (options.momentum() != 0) {
    const auto [state, is_new] = state_of<torch::optim::SGDParamState>(optimizer, param);
    if (is_new || !state->momentum_buffer().defined()) {
      state->momentum_buffer(grad.detach().clone());
    } else {
      multiply_(state->momentum_buffer(), options.momentum()).add_(grad, 1 - options.dampening());
    }
    const at::Tensor& momentum = state->momentum_buffer();
    grad = options.nesterov() ? grad.add(momentum, options.momentum()) : momentum;
  }
  param.add_(grad, -options.lr());
}

// Where LibTorch's SGD rounds the momentum's factor.
bool is_in_16_bits(const Optimizer& optimizer) {
  for (const auto& group : optimizer.param_groups()) {
    for (const auto& param : group.params()) {
      if (at::isReducedFloatingType(param.scalar_type())) return true;
    }
  }
  return false;
}

template <class GroupOptions, class Update>
at::Tensor step_all(Optimizer& optimizer, const std::function<at::Tensor()>& closure,
                    const Update& update) {
  const at::NoGradGuard no_grad;
  at::Tensor loss;
  if (closure != nullptr) {
    const at::AutoGradMode with_grad(true);
    loss = closure();
  }
  for (auto& group : optimizer.param_groups()) {
    const auto& options = static_cast<const GroupOptions&>(group.options());
    for (const at::Tensor& param : group.params()) {
      if (param.grad().defined()) update(options, param);
    }
  }
  return loss;
}

}  // namespace

at::Tensor python_step(Optimizer& optimizer, const std::function<at::Tensor()>& closure) {
  using namespace torch::optim;
  const std::type_info& type = typeid(optimizer);
  if (type == typeid(Adam)) {
    return step_all<AdamOptions>(optimizer, closure, [&](const auto& options, const auto& param) {
      adam<AdamOptions, AdamParamState>(optimizer, options, param, false, "Adam");
    });
  }
  if (type == typeid(AdamW)) {
    return step_all<AdamWOptions>(optimizer, closure, [&](const auto& options, const auto& param) {
      adam<AdamWOptions, AdamWParamState>(optimizer, options, param, true, "AdamW");
    });
  }
  if (type == typeid(SGD) && is_in_16_bits(optimizer)) {
    return step_all<SGDOptions>(optimizer, closure, [&](const auto& options, const auto& param) {
      sgd(optimizer, options, param);
    });
  }
  if (type == typeid(RMSprop)) {
    return step_all<RMSpropOptions>(
        optimizer, closure,
        [&](const auto& options, const auto& param) { rmsprop(optimizer, options, param); });
  }
  return optimizer.step(closure);
}

}  // namespace lightning
