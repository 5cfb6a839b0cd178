// Self-attention with its projections.
#pragma once

#include <optional>

#include "lightning/nn/linear.h"
#include "lightning/nn/rotary.h"
#include "lightning/options.h"

namespace lightning::nn {

struct AttentionOptions : Options<AttentionOptions> {
  AttentionOptions() = default;
  AttentionOptions(int64_t features, int64_t heads) { this->features(features).heads(heads); }

  OPTION(int64_t, features, 0, "Width of input and output. Must be given.");
  OPTION(int64_t, heads, 0, "Heads of the queries. Must be given.");
  OPTION(int64_t, kv_heads, 0, "Heads of keys and values, a divisor of heads; 0 for heads.");
  OPTION(int64_t, head_size, 0, "Width of a head; 0 for features / heads.");
  OPTION(bool, bias, true, "Whether the projections add a bias.");
  OPTION(bool, causal, true, "Whether a position sees only itself and those before it.");
  OPTION(bool, rotary, false, "Whether queries and keys are rotated by their position.");
  OPTION(double, rotary_base, 10000.0, "Base of the rotation's wave lengths.");
  OPTION(double, dropout, 0.0, "Share of the attention weights that training sets to zero.");
};

// softmax(q k^T / sqrt(head_size)) v between two projections: `qkv`, whose rows are the heads of q,
// then of k, then of v, and `proj`. With fewer kv_heads each serves heads / kv_heads queries.
//
// On a GPU in 16 bits the projection and the attention are one autograd function: q, k and v are
// views of the product, a kernel rotates in place, and cuDNN or flash attention reads them there
// (whichever LibTorch would choose: cuDNN on Hopper). cuDNN writes the three gradients straight
// into the product's gradient, where a kernel turns them back and sums the bias's gradient, as
// needed; after flash attention, and with dropout, the same kernel packs the three in that pass.
// Under deterministic algorithms LibTorch chooses flash attention, whose backward then is
// deterministic. Elsewhere and for head sizes that neither takes it is the layers around
// at::scaled_dot_product_attention.
//
// Errors: MisconfigurationError for heads that do not divide features, kv_heads that do not divide
// heads, an odd head size with rotary, or a dropout outside [0, 1); c10::Error for a second
// derivative where the function ran.
class AttentionImpl : public torch::nn::Cloneable<AttentionImpl> {
 public:
  AttentionImpl(int64_t features, int64_t heads)
      : AttentionImpl(AttentionOptions(features, heads)) {}
  explicit AttentionImpl(const AttentionOptions& options);

  void reset() override;
  void pretty_print(std::ostream& stream) const override;

  // [batch, time, features] to the same, in the dtype that linear() gives.
  at::Tensor forward(const at::Tensor& input);

  AttentionOptions options;  // with kv_heads and head_size filled in
  Linear qkv{nullptr}, proj{nullptr};

 private:
  at::Tensor composed(const at::Tensor& input, const at::Tensor& table);

  Rotary rotary_;
};
TORCH_MODULE(Attention);

}  // namespace lightning::nn
