#include "lightning/optim/fused_kernels.h"

#include <ATen/ops/_fused_adagrad.h>
#include <ATen/ops/_fused_adam.h>
#include <ATen/ops/_fused_adamw.h>
#include <ATen/ops/_fused_sgd.h>
#include <c10/core/DeviceGuard.h>
#include <torch/optim/adagrad.h>
#include <torch/optim/adam.h>
#include <torch/optim/adamw.h>
#include <torch/optim/sgd.h>

#include <tuple>

#include "lightning/cuda/adam.h"
#include "lightning/cuda/launch.h"

namespace lightning::fused {
namespace {

using namespace torch::optim;

// Calls f with the learning rate: a tensor or a number, for which the operators have overloads.
template <class F>
void with_lr(const Scalars& scalars, const F& f) {
  scalars.lr_on_device.defined() ? f(scalars.lr_on_device) : f(scalars.lr);
}

void step_sgd(const Bucket& b, const Scalars& s) {
  const auto& o = static_cast<const SGDOptions&>(*b.options);
  with_lr(s, [&](const auto& lr) {
    at::_fused_sgd_(b.params, b.grads, b.moments[0], o.weight_decay(), o.momentum(), lr,
                    o.dampening(), o.nesterov(), /*maximize=*/false, b.first, s.grad_scale,
                    s.found_inf);
  });
}

void step_adagrad(const Bucket& b, const Scalars& s) {
  const auto& o = static_cast<const AdagradOptions&>(*b.options);
  with_lr(s, [&](const auto& lr) {
    at::_fused_adagrad_(b.params, b.grads, b.moments[0], b.steps, lr, o.lr_decay(),
                        o.weight_decay(), o.eps(), /*maximize=*/false, s.grad_scale, s.found_inf);
  });
}

template <class AnyAdamOptions>
void step_adam(const Bucket& b, const Scalars& s, bool decoupled) {
  const auto& o = static_cast<const AnyAdamOptions&>(*b.options);
  const double beta1 = std::get<0>(o.betas()), beta2 = std::get<1>(o.betas());
  with_lr(s, [&](const auto& lr) {
    const auto step = [&](const auto& update) {
      update(b.params, b.grads, b.moments[0], b.moments[1], b.moments[2], b.steps, lr, beta1, beta2,
             o.weight_decay(), o.eps(), o.amsgrad(), /*maximize=*/false, s.grad_scale, s.found_inf);
    };
    if (decoupled) {
      step([](const auto&... all) { at::_fused_adamw_(all...); });
    } else {
      step([](const auto&... all) { at::_fused_adam_(all...); });
    }
  });
}

void step_by_operator(Kind kind, const Bucket& bucket, const Scalars& scalars) {
  switch (kind) {
    case Kind::kSGD:
      return step_sgd(bucket, scalars);
    case Kind::kAdam:
      return step_adam<AdamOptions>(bucket, scalars, /*decoupled=*/false);
    case Kind::kAdamW:
      return step_adam<AdamWOptions>(bucket, scalars, /*decoupled=*/true);
    case Kind::kAdagrad:
      return step_adagrad(bucket, scalars);
    default:
      return;
  }
}

// ---- By our kernel ------------------------------------------------------------------------------

// In float32 for the copies, in 16 bits because it is faster.
bool has_kernel(Kind kind, const Bucket& bucket, const WorkingCopies* copies) {
  if ((kind != Kind::kAdam && kind != Kind::kAdamW) || !cuda::can_run(bucket.params[0])) {
    return false;
  }
  if (at::isReducedFloatingType(bucket.dtype)) return true;
  return bucket.dtype == at::kFloat && copies != nullptr &&
         at::isReducedFloatingType(copies->dtype());
}

const float* data_of(const std::optional<at::Tensor>& scalar) {
  return scalar ? scalar->const_data_ptr<float>() : nullptr;
}

template <class AnyAdamOptions>
cuda::AdamSettings settings_of(const OptimizerOptions& options, const Scalars& s) {
  const auto& o = static_cast<const AnyAdamOptions&>(options);
  cuda::AdamSettings settings;
  settings.lr = static_cast<float>(s.lr);
  if (s.lr_on_device.defined()) settings.lr_on_device = s.lr_on_device.const_data_ptr<float>();
  std::tie(settings.beta1, settings.beta2) = o.betas();
  settings.eps = o.eps();
  settings.weight_decay = o.weight_decay();
  settings.amsgrad = o.amsgrad();
  settings.grad_scale = data_of(s.grad_scale);
  settings.found_inf = data_of(s.found_inf);
  return settings;
}

void step_by_kernel(Kind kind, const Bucket& b, const Scalars& s, WorkingCopies* copies) {
  auto settings = kind == Kind::kAdamW ? settings_of<AdamWOptions>(*b.options, s)
                                       : settings_of<AdamOptions>(*b.options, s);
  settings.decoupled = kind == Kind::kAdamW;
  settings.dtype = cuda::dtype_of(b.dtype);
  if (b.dtype != at::kFloat) copies = nullptr;
  if (copies != nullptr) settings.copy_dtype = cuda::dtype_of(copies->dtype());

  const auto data = [](const at::Tensor& tensor) { return tensor.mutable_data_ptr(); };
  std::vector<cuda::AdamTensor> tensors(b.params.size());
  for (size_t i = 0; i < tensors.size(); ++i) {
    const auto copy = copies != nullptr ? copies->place_for(b.params[i]) : at::Tensor();
    auto& t = tensors[i];
    t.parameter = data(b.params[i]);
    t.gradient = data(b.grads[i]);
    t.mean = data(b.moments[0][i]);
    t.squares = data(b.moments[1][i]);
    if (settings.amsgrad) t.largest = data(b.moments[2][i]);
    if (copy.defined()) t.copy = copy.mutable_data_ptr();
    t.step = b.steps[i].const_data_ptr<float>();
    t.size = b.params[i].numel();
  }
  const c10::DeviceGuard guard(b.device);
  if constexpr (cuda::kBuilt) cuda::adam(tensors, settings, cuda::stream_of(b.params[0]));
  for (size_t i = 0; i < tensors.size(); ++i) {
    b.params[i].unsafeGetTensorImpl()->bump_version();
    if (s.grad_scale) b.grads[i].unsafeGetTensorImpl()->bump_version();
    if (tensors[i].copy != nullptr) copies->set_current(b.params[i]);
  }
}

}  // namespace

void step(Kind kind, const Bucket& bucket, const Scalars& scalars, WorkingCopies* copies) {
  if (has_kernel(kind, bucket, copies)) return step_by_kernel(kind, bucket, scalars, copies);
  step_by_operator(kind, bucket, scalars);
  // LibTorch 2.11 leaves their versions as they were, by which a backward or a copy would take them
  // for unchanged.
  for (const auto& param : bucket.params) param.unsafeGetTensorImpl()->bump_version();
}

}  // namespace lightning::fused
