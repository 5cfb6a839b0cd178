// What the tests of layers share: outputs and gradients of two implementations side by side.
#pragma once

#include <ATen/autocast_mode.h>
#include <torch/nn/module.h>
#include <torch/types.h>

#include <functional>
#include <map>
#include <string>

namespace lightning::testing {

using Tensors = std::map<std::string, at::Tensor>;

// Autocast on while it lives.
class Autocast {
 public:
  explicit Autocast(at::DeviceType device, at::ScalarType dtype = at::kBFloat16)
      : device_(device), before_(at::autocast::get_autocast_dtype(device)) {
    at::autocast::set_autocast_enabled(device, true);
    at::autocast::set_autocast_dtype(device, dtype);
    at::autocast::set_autocast_cache_enabled(false);
  }
  ~Autocast() {
    at::autocast::set_autocast_enabled(device_, false);
    at::autocast::set_autocast_dtype(device_, before_);
    at::autocast::set_autocast_cache_enabled(true);
  }

 private:
  at::DeviceType device_;
  at::ScalarType before_;
};

inline Tensors parameters_of(const torch::nn::Module& module) {
  Tensors result;
  for (const auto& item : module.named_parameters()) result[item.key()] = item.value();
  return result;
}

// Leaves of their own with the same values, in a dtype.
inline Tensors copies_of(const Tensors& tensors, at::ScalarType dtype) {
  Tensors result;
  for (const auto& [name, tensor] : tensors) {
    result[name] = tensor.detach().to(dtype, false, true).requires_grad_();
  }
  return result;
}

// "output", "input" and the leaves' names: what the model gives for the input, and the gradients
// for `gradient` at the output. Clears the leaves' gradients. `autocast` holds for forward only.
inline Tensors results_of(const std::function<at::Tensor(const at::Tensor&)>& model,
                          const Tensors& leaves, const at::Tensor& input,
                          const at::Tensor& gradient, bool autocast = false) {
  const auto x = input.detach().requires_grad_(input.is_floating_point());
  at::Tensor output;
  if (autocast) {
    const Autocast on(input.device().type());
    output = model(x);
  } else {
    output = model(x);
  }
  output.backward(gradient.to(output.scalar_type()));
  Tensors result{{"output", output.detach()}};
  if (x.requires_grad()) result["input"] = x.grad();
  for (auto [name, leaf] : leaves) {
    result[name] = leaf.grad();
    leaf.mutable_grad().reset();
  }
  return result;
}

// |a - b| / |b|, in float64.
inline double relative_error(const at::Tensor& a, const at::Tensor& b) {
  const auto exact = b.to(at::kDouble);
  const auto norm = exact.norm().item<double>();
  const auto difference = (a.to(at::kDouble) - exact).norm().item<double>();
  return norm > 0 ? difference / norm : difference;
}

}  // namespace lightning::testing
