// The linear layer, with the bias added by the product itself.
#pragma once

#include <torch/nn/modules/linear.h>

namespace lightning::nn {

// input [..., in_features] times weight^T plus bias: [..., out_features]. The weight is
// [out_features, in_features]; an undefined bias adds nothing.
//
// Under autocast it computes in autocast's dtype and reads the weights by working_copy(), so that
// no step casts a weight twice; gradients have their parameters' dtype, and from 16-bit factors
// they are summed and written in float32. Without autocast it is at::linear, but in 16 bits on a
// GPU, where cuda::gemm() is the faster product.
//
// Also for a weight that two layers share (an embedding's as the head of a language model).
// Errors: c10::Error for shapes that do not fit, and for a second derivative under autocast or in
// 16 bits on a GPU.
at::Tensor linear(const at::Tensor& input, const at::Tensor& weight, const at::Tensor& bias = {});

// torch::nn::Linear, with its options, names of parameters and initialisation; see linear() for
// what differs.
class LinearImpl : public torch::nn::LinearImpl {
 public:
  LinearImpl(int64_t in_features, int64_t out_features)
      : LinearImpl(torch::nn::LinearOptions(in_features, out_features)) {}
  explicit LinearImpl(const torch::nn::LinearOptions& options) : torch::nn::LinearImpl(options) {}

  at::Tensor forward(const at::Tensor& input);
  std::shared_ptr<torch::nn::Module> clone(
      const std::optional<torch::Device>& device = std::nullopt) const override;
};
TORCH_MODULE(Linear);

}  // namespace lightning::nn
