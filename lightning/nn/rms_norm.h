// Root-mean-square normalisation, alone and after the sum of a residual stream.
#pragma once

#include <torch/arg.h>
#include <torch/nn/cloneable.h>
#include <torch/nn/pimpl.h>

#include <optional>
#include <tuple>

namespace lightning::nn {

// As the arguments of Python's torch.nn.RMSNorm; C++ has no such module.
struct RMSNormOptions {
  RMSNormOptions(std::vector<int64_t> normalized_shape)
      : normalized_shape_(std::move(normalized_shape)) {}

  TORCH_ARG(std::vector<int64_t>, normalized_shape);
  // None: the epsilon of the dtype it computes in, which is float32 for 16-bit inputs.
  TORCH_ARG(std::optional<double>, eps) = std::nullopt;
  TORCH_ARG(bool, elementwise_affine) = true;
};

// What RMSNorm and AddRMSNorm share: input / sqrt(mean(input^2) + eps) * weight, over the last
// dims.
template <class Layer>
class RMSNormBase : public torch::nn::Cloneable<Layer> {
 public:
  explicit RMSNormBase(RMSNormOptions options_) : options(std::move(options_)) {
    RMSNormBase::reset();
  }

  void reset() override;
  void reset_parameters();  // ones
  void pretty_print(std::ostream& stream) const override;

  RMSNormOptions options;
  at::Tensor weight;  // of normalized_shape, undefined without elementwise_affine
};

// Values, parameters and their names are those of Python's torch.nn.RMSNorm. Under autocast it
// gives autocast's dtype; lightning/nn/norm.h says what else differs.
class RMSNormImpl : public RMSNormBase<RMSNormImpl> {
 public:
  explicit RMSNormImpl(std::vector<int64_t> normalized_shape)
      : RMSNormImpl(RMSNormOptions(std::move(normalized_shape))) {}
  explicit RMSNormImpl(RMSNormOptions options) : RMSNormBase(std::move(options)) {}

  at::Tensor forward(const at::Tensor& input);
};
TORCH_MODULE(RMSNorm);

// `auto [residual, normalized] = add_rms_norm(residual, delta)`: residual + delta, in the
// residual's dtype, and its RMSNorm; as AddLayerNorm.
class AddRMSNormImpl : public RMSNormBase<AddRMSNormImpl> {
 public:
  explicit AddRMSNormImpl(std::vector<int64_t> normalized_shape)
      : AddRMSNormImpl(RMSNormOptions(std::move(normalized_shape))) {}
  explicit AddRMSNormImpl(RMSNormOptions options) : RMSNormBase(std::move(options)) {}

  std::tuple<at::Tensor, at::Tensor> forward(const at::Tensor& residual, const at::Tensor& delta);
};
TORCH_MODULE(AddRMSNorm);

}  // namespace lightning::nn
