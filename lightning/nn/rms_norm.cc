#include "lightning/nn/rms_norm.h"

#include <ATen/ops/ones.h>
#include <torch/nn/init.h>

#include "lightning/nn/norm.h"

namespace lightning::nn {
namespace {

template <class Layer>
Norm norm_of(const Layer& layer) {
  return {layer.options.normalized_shape(), layer.weight, {}, layer.options.eps(), false};
}

}  // namespace

template <class Layer>
void RMSNormBase<Layer>::reset() {
  if (options.elementwise_affine()) {
    weight = this->register_parameter("weight", at::ones(options.normalized_shape()));
  } else {
    weight = this->register_parameter("weight", at::Tensor(), /*requires_grad=*/false);
  }
}

template <class Layer>
void RMSNormBase<Layer>::reset_parameters() {
  if (weight.defined()) torch::nn::init::ones_(weight);
}

template <class Layer>
void RMSNormBase<Layer>::pretty_print(std::ostream& stream) const {
  const bool adds = std::is_same_v<Layer, AddRMSNormImpl>;
  stream << "lightning::nn::" << (adds ? "AddRMSNorm" : "RMSNorm") << "("
         << at::IntArrayRef(options.normalized_shape()) << ", eps=";
  options.eps() ? stream << *options.eps() : stream << "None";
  stream << ", elementwise_affine=" << (options.elementwise_affine() ? "true" : "false") << ")";
}

template class RMSNormBase<RMSNormImpl>;
template class RMSNormBase<AddRMSNormImpl>;

at::Tensor RMSNormImpl::forward(const at::Tensor& input) {
  return normalize(input, norm_of(*this));
}

std::tuple<at::Tensor, at::Tensor> AddRMSNormImpl::forward(const at::Tensor& residual,
                                                           const at::Tensor& delta) {
  return add_and_normalize(residual, delta, norm_of(*this));
}

}  // namespace lightning::nn
