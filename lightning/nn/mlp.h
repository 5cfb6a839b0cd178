// The feed-forward part of a transformer block.
#pragma once

#include <string>

#include "lightning/nn/linear.h"
#include "lightning/options.h"

namespace lightning::nn {

struct MLPOptions : Options<MLPOptions> {
  MLPOptions() = default;
  MLPOptions(int64_t features, int64_t hidden_features) {
    this->features(features).hidden_features(hidden_features);
  }

  OPTION(int64_t, features, 0, "Width of input and output. Must be given.");
  OPTION(int64_t, hidden_features, 0, "Width between the two products; 0 for four times features.");
  OPTION(std::string, activation, "gelu",
         "gelu, gelu_tanh (GPT-2's), relu, or swiglu, which takes three weights (Llama's).");
  OPTION(bool, bias, true, "Whether the products add a bias.");
  OPTION(bool, recompute, false,
         "Whether backward computes the activation again: less memory, a little more time.");
  OPTION(double, dropout, 0.0, "Share of the output's elements that training sets to zero.");
};

// fc2(act(fc1(x))), or, for swiglu, down(silu(gate(x)) * up(x)): the submodules' names, each a
// Linear, so a checkpoint holds fc1.weight, fc1.bias and so on.
//
// On a GPU it is one autograd function whose activation runs in a kernel of ours, forward and
// backward, or, gelu_tanh in 16 bits, within the products (lightning/cuda/gemm.h). It keeps what
// precedes the activation and, without recompute, what follows it. Elsewhere it is the layers one
// after the other.
//
// Errors: MisconfigurationError for an unknown activation, widths below one or a dropout outside
// [0, 1]; c10::Error for a second derivative where the function ran.
class MLPImpl : public torch::nn::Cloneable<MLPImpl> {
 public:
  MLPImpl(int64_t features, int64_t hidden_features)
      : MLPImpl(MLPOptions(features, hidden_features)) {}
  explicit MLPImpl(const MLPOptions& options);

  void reset() override;
  void pretty_print(std::ostream& stream) const override;

  // [..., features] to [..., features], in the dtype that linear() gives.
  at::Tensor forward(const at::Tensor& input);

  MLPOptions options;
  Linear fc1{nullptr}, fc2{nullptr};                 // gelu, gelu_tanh, relu
  Linear gate{nullptr}, up{nullptr}, down{nullptr};  // swiglu

 private:
  at::Tensor composed(const at::Tensor& input);
};
TORCH_MODULE(MLP);

}  // namespace lightning::nn
