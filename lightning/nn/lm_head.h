// The last layer of a language model, with its loss.
#pragma once

#include <torch/nn/modules/linear.h>
#include <torch/nn/options/loss.h>

namespace lightning::nn {

struct LMHeadOptions {
  LMHeadOptions(int64_t in_features, int64_t out_features)
      : in_features_(in_features), out_features_(out_features) {}

  TORCH_ARG(int64_t, in_features);
  TORCH_ARG(int64_t, out_features);
  // Language models have none.
  TORCH_ARG(bool, bias) = false;
  // How many rows of logits loss() has in memory at once; 0 for all. With a limit the logits never
  // exist whole, at about the same speed where a chunk still fills the device (4096 rows and more).
  TORCH_ARG(int64_t, chunk_rows) = 0;
};

// torch::nn::Linear's parameters and initialisation, and a loss() that keeps the logits in one
// place: they are computed, become the loss's gradient where they lie, and are multiplied with
// weight and input from there. The loss and all sums are float32 for 16-bit logits.
//
// A weight shared with the embedding, as in GPT-2, is registered in both modules, so that a
// checkpoint has both keys, as Python's: `LMHead(wte->weight)`, or tie(). named_parameters() and
// parameters() then give it twice, where Python's give it once: an optimizer must get it once.
// Assigning to the member `weight` alone leaves the tensor registered before in checkpoints and
// optimizers; loss() and forward() refuse that.
class LMHeadImpl : public torch::nn::LinearImpl {
 public:
  LMHeadImpl(int64_t in_features, int64_t out_features)
      : LMHeadImpl(LMHeadOptions(in_features, out_features)) {}
  explicit LMHeadImpl(const LMHeadOptions& options);
  // Shares the weight [out_features, in_features] of another module; without a bias.
  explicit LMHeadImpl(const at::Tensor& weight);

  // Shares another module's weight from now on, of this one's sizes.
  void tie(const at::Tensor& weight);

  // hidden [..., in_features] to logits [..., out_features], as nn::Linear.
  at::Tensor forward(const at::Tensor& hidden);

  // fused_cross_entropy of forward(hidden).
  //
  //   hidden  [..., in_features]
  //   target  classes: integers of hidden's sizes without the last. Or probabilities
  //           [..., out_features], floating, for which the logits are computed as by forward(), as
  //           they are for a `weight` in the options
  //   gives   a scalar, or losses of the target's sizes for torch::kNone; float32, float64 for that
  //
  // Logits are computed in autocast's dtype, else in that of hidden and weight. They are kept for
  // backward as the unscaled gradient; the loss's own gradient is applied to the float32 products,
  // so that neither large counts nor a gradient scaler's factor meet 16 bits. In chunks, the
  // products are made in forward already and kept instead. For torch::kNone the logits themselves
  // are kept and become the gradient in backward; in chunks they are computed a second time there.
  //
  // Errors: c10::Error for sizes and dtypes that do not fit, for a second derivative, and for
  // chunk_rows with a weight or probabilities; for bad classes see fused_cross_entropy.
  at::Tensor loss(const at::Tensor& hidden, const at::Tensor& target,
                  const torch::nn::CrossEntropyLossOptions& options = {});

  int64_t chunk_rows() const { return chunk_rows_; }

  // The copy has a weight of its own.
  std::shared_ptr<torch::nn::Module> clone(
      const std::optional<torch::Device>& device = std::nullopt) const override;
  void pretty_print(std::ostream& stream) const override;

 private:
  void check_registered() const;

  int64_t chunk_rows_ = 0;
};
TORCH_MODULE(LMHead);

}  // namespace lightning::nn
