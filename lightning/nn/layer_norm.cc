#include "lightning/nn/layer_norm.h"

#include "lightning/nn/copy_parameters.h"
#include "lightning/nn/norm.h"

namespace lightning::nn {

at::Tensor LayerNormImpl::forward(const at::Tensor& input) {
  return normalize(input, {options.normalized_shape(), weight, bias, options.eps()});
}

std::shared_ptr<torch::nn::Module> LayerNormImpl::clone(
    const std::optional<torch::Device>& device) const {
  auto copy = std::make_shared<LayerNormImpl>(options);
  copy_parameters(*this, *copy, device);
  return copy;
}

}  // namespace lightning::nn
