// The sum of a residual stream and its layer normalisation, in one kernel.
#pragma once

#include <torch/nn/modules/normalization.h>

#include <tuple>

namespace lightning::nn {

// `auto [residual, normalized] = add_layer_norm(residual, delta)`: residual + delta, in the
// residual's dtype (a float32 stream stays float32 under autocast), and its LayerNorm. Parameters,
// options and dtype of `normalized` are LayerNorm's. One kernel forward and one backward, which
// takes both gradients, instead of four passes over the stream each way.
class AddLayerNormImpl : public torch::nn::LayerNormImpl {
 public:
  explicit AddLayerNormImpl(std::vector<int64_t> normalized_shape)
      : AddLayerNormImpl(torch::nn::LayerNormOptions(std::move(normalized_shape))) {}
  explicit AddLayerNormImpl(torch::nn::LayerNormOptions options)
      : torch::nn::LayerNormImpl(std::move(options)) {}

  // {residual + delta, its norm}. Both of the same sizes, or as LibTorch broadcasts them.
  std::tuple<at::Tensor, at::Tensor> forward(const at::Tensor& residual, const at::Tensor& delta);
  std::shared_ptr<torch::nn::Module> clone(
      const std::optional<torch::Device>& device = std::nullopt) const override;
};
TORCH_MODULE(AddLayerNorm);

}  // namespace lightning::nn
