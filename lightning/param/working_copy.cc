#include "lightning/param/working_copy.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/_foreach_copy.h>
#include <ATen/ops/empty_like.h>
#include <c10/core/InferenceMode.h>

#include "lightning/param/touch.h"

namespace lightning {
namespace {

thread_local WorkingCopies* in_use = nullptr;

}  // namespace

bool WorkingCopies::can_copy(const at::Tensor& parameter) {
  return parameter.scalar_type() == at::kFloat && parameter.requires_grad() &&
         parameter.is_leaf() && !parameter.is_inference();
}

void WorkingCopies::make_place(Copy& entry, const at::Tensor& parameter) const {
  const bool fits = entry.copy.defined() && entry.copy.device() == parameter.device() &&
                    entry.copy.sizes() == parameter.sizes() &&
                    entry.copy.strides() == parameter.strides();
  if (fits) return;
  // A copy made while evaluating serves training too.
  const c10::InferenceMode ordinary(false);
  const at::NoGradGuard no_grad;
  entry.parameter = parameter;
  entry.copy = at::empty_like(parameter, parameter.options().dtype(dtype_).requires_grad(false));
  entry.is_current = false;
}

at::Tensor WorkingCopies::want(const at::Tensor& parameter) {
  auto copy = current(parameter);
  if (copy.defined()) return copy;
  const auto* key = parameter.unsafeGetTensorImpl();
  if (copies_.count(key) == 0 && !can_copy(parameter)) return {};
  make_place(copies_[key], parameter);
  const c10::InferenceMode ordinary(false);
  const at::NoGradGuard no_grad;
  copy = copies_[key].copy;
  copy.copy_(parameter);
  set_current(parameter);
  return copy;
}

at::Tensor WorkingCopies::place_for(const at::Tensor& parameter) {
  const auto found = copies_.find(parameter.unsafeGetTensorImpl());
  if (found == copies_.end() || parameter.scalar_type() != at::kFloat) return {};
  make_place(found->second, parameter);
  return found->second.copy;
}

void WorkingCopies::set_current(const at::Tensor& parameter) {
  auto& entry = copies_.at(parameter.unsafeGetTensorImpl());
  entry.copy.unsafeGetTensorImpl()->bump_version();  // kernels write it behind autograd's back
  entry.data = parameter.const_data_ptr();
  entry.version = parameter._version();
  entry.is_current = true;
}

at::Tensor WorkingCopies::current(const at::Tensor& parameter) const {
  const auto found = copies_.find(parameter.unsafeGetTensorImpl());
  if (found == copies_.end()) return {};
  const Copy& entry = found->second;
  const bool usable = entry.is_current && entry.version == parameter._version() &&
                      entry.data == parameter.const_data_ptr() &&
                      entry.copy.device() == parameter.device();
  return usable ? entry.copy : at::Tensor();
}

void WorkingCopies::refresh(const std::vector<at::Tensor>& parameters) {
  const at::NoGradGuard no_grad;
  std::vector<at::Tensor> from, to;
  for (const auto& parameter : parameters) {
    auto copy = place_for(parameter);
    if (!copy.defined()) continue;
    from.push_back(parameter);
    to.push_back(std::move(copy));
  }
  if (from.empty()) return;
  at::_foreach_copy_(to, from);
  for (const auto& parameter : from) set_current(parameter);
}

Scope WorkingCopies::use(WorkingCopies* copies) {
  auto* const before = in_use;
  in_use = copies;
  return scope_exit([before] { in_use = before; });
}

at::Tensor working_copy(const at::Tensor& parameter, at::ScalarType dtype) {
  whole(parameter);  // kernels read it by its address
  if (parameter.scalar_type() == dtype) return parameter.detach();
  if (in_use != nullptr && in_use->dtype() == dtype) {
    auto copy = in_use->want(parameter);
    if (copy.defined()) return copy;
  }
  return parameter.detach().to(dtype);
}

}  // namespace lightning
