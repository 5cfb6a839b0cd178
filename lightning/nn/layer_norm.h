// Layer normalisation in one kernel, in autocast's dtype.
#pragma once

#include <torch/nn/modules/normalization.h>

namespace lightning::nn {

// torch::nn::LayerNorm, with its options, names of parameters and initialisation. Under autocast it
// gives autocast's dtype, where LibTorch's gives float32 for the next product to cast;
// lightning/nn/ norm.h says what else differs.
class LayerNormImpl : public torch::nn::LayerNormImpl {
 public:
  explicit LayerNormImpl(std::vector<int64_t> normalized_shape)
      : LayerNormImpl(torch::nn::LayerNormOptions(std::move(normalized_shape))) {}
  explicit LayerNormImpl(torch::nn::LayerNormOptions options)
      : torch::nn::LayerNormImpl(std::move(options)) {}

  at::Tensor forward(const at::Tensor& input);
  std::shared_ptr<torch::nn::Module> clone(
      const std::optional<torch::Device>& device = std::nullopt) const override;
};
TORCH_MODULE(LayerNorm);

}  // namespace lightning::nn
