// Token and position embeddings.
#pragma once

#include <torch/nn/modules/embedding.h>

namespace lightning::nn {

// torch::nn::Embedding, with its options, names of parameters, initialisation and gradient. Under
// autocast it stays in the weight's dtype, as the original: the residual stream of a transformer.
class EmbeddingImpl : public torch::nn::EmbeddingImpl {
 public:
  EmbeddingImpl(int64_t num_embeddings, int64_t embedding_dim)
      : EmbeddingImpl(torch::nn::EmbeddingOptions(num_embeddings, embedding_dim)) {}
  explicit EmbeddingImpl(const torch::nn::EmbeddingOptions& options)
      : torch::nn::EmbeddingImpl(options) {}

  at::Tensor forward(const at::Tensor& indices);
  std::shared_ptr<torch::nn::Module> clone(
      const std::optional<torch::Device>& device = std::nullopt) const override;
};
TORCH_MODULE(Embedding);

// token_weight[tokens] + position_weight[0 .. time): [batch, time, width] from int64 tokens
// [batch, time] and weights [tokens, width] and [at least time, width] of one dtype. One pass on a
// GPU instead of three. The tokens' gradient is at::embedding's, the positions' a sum over the
// batch.
//
// Errors: c10::Error for more tokens than positions, for other shapes, and for a second derivative.
at::Tensor embed(const at::Tensor& tokens, const at::Tensor& token_weight,
                 const at::Tensor& position_weight);

}  // namespace lightning::nn
