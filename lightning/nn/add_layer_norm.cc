#include "lightning/nn/add_layer_norm.h"

#include "lightning/nn/copy_parameters.h"
#include "lightning/nn/norm.h"

namespace lightning::nn {

std::tuple<at::Tensor, at::Tensor> AddLayerNormImpl::forward(const at::Tensor& residual,
                                                             const at::Tensor& delta) {
  return add_and_normalize(residual, delta,
                           {options.normalized_shape(), weight, bias, options.eps()});
}

std::shared_ptr<torch::nn::Module> AddLayerNormImpl::clone(
    const std::optional<torch::Device>& device) const {
  auto copy = std::make_shared<AddLayerNormImpl>(options);
  copy_parameters(*this, *copy, device);
  return copy;
}

}  // namespace lightning::nn
