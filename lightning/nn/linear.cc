#include "lightning/nn/linear.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <torch/csrc/autograd/custom_function.h>

#include "lightning/cuda/column_sum_of.h"
#include "lightning/cuda/launch.h"
#include "lightning/nn/compute.h"
#include "lightning/nn/copy_parameters.h"
#include "lightning/param/working_copy.h"

namespace lightning::nn {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// Saves the input only for a weight, the weight only for an input that wants a gradient.
class LinearFunction : public torch::autograd::Function<LinearFunction> {
 public:
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& input, const at::Tensor& weight,
                            const std::optional<at::Tensor>& bias, at::ScalarType dtype) {
    const NoAutocast no_autocast;
    const auto matrix = as_matrix(input.to(dtype));
    const auto copy = working_copy(weight, dtype);
    // Written through a view, so that the output is none and may be changed in place.
    auto output = at::empty(with_last(input.sizes(), weight.size(0)), matrix.options());
    auto rows = output.view({matrix.size(0), weight.size(0)});
    affine_out(rows, matrix, copy, bias_copy(bias, dtype));
    ctx->save_for_backward({weight.requires_grad() ? matrix : at::Tensor(),
                            input.requires_grad() ? copy : at::Tensor()});
    ctx->saved_data["sizes"] = input.sizes();
    ctx->saved_data["input"] = input.scalar_type();
    ctx->saved_data["weight"] = weight.scalar_type();
    if (bias) ctx->saved_data["bias"] = bias->scalar_type();
    return output;
  }

  static variable_list backward(AutogradContext* ctx, variable_list gradients) {
    refuse_second_derivative("lightning::nn::Linear in 16 bits", "torch::nn::Linear");
    const NoAutocast no_autocast;
    const auto saved = ctx->get_saved_variables();
    const auto dtype = [&](const char* of) { return ctx->saved_data.at(of).toScalarType(); };
    const auto gradient = as_matrix(gradients[0]);
    at::Tensor input, weight, bias;
    if (ctx->needs_input_grad(0)) {
      input = product(gradient, saved[1], dtype("input"))
                  .view(ctx->saved_data.at("sizes").toIntVector());
    }
    if (ctx->needs_input_grad(1)) weight = product(gradient.t(), saved[0], dtype("weight"));
    const bool has_bias = ctx->saved_data.count("bias") > 0;
    if (has_bias && ctx->needs_input_grad(2))
      bias = cuda::column_sum(gradients[0]).to(dtype("bias"));
    return {input, weight, bias, at::Tensor()};
  }
};

void check_shapes(const at::Tensor& input, const at::Tensor& weight, const at::Tensor& bias) {
  TORCH_CHECK(weight.dim() == 2 && input.dim() > 0 && input.size(-1) == weight.size(1),
              "Linear got an input of ", input.sizes(), " for a weight of ", weight.sizes(),
              " [out_features, in_features]; the input's last size must be in_features.");
  TORCH_CHECK(!bias.defined() || (bias.dim() == 1 && bias.size(0) == weight.size(0)),
              "Linear got a bias of ", bias.sizes(), " for a weight of ", weight.sizes(),
              ", expected [", weight.size(0), "].");
}

// Autocast would cast the weights each time; in 16 bits on a GPU cuda::gemm() is the faster
// product.
bool has_function(const at::Tensor& input, const at::Tensor& weight, const at::Tensor& bias) {
  if (is_autocast(input)) return weight.scalar_type() != at::kDouble;
  const auto dtype = input.scalar_type();
  return cuda::can_run(input) && at::isReducedFloatingType(dtype) && input.numel() > 0 &&
         weight.scalar_type() == dtype && weight.device() == input.device() &&
         (!bias.defined() || bias.scalar_type() == dtype);
}

}  // namespace

at::Tensor linear(const at::Tensor& input, const at::Tensor& weight, const at::Tensor& bias) {
  if (!has_function(input, weight, bias)) return at::linear(input, weight, if_defined(bias));
  check_shapes(input, weight, bias);
  return LinearFunction::apply(input, weight, if_defined(bias), compute_dtype(input));
}

at::Tensor LinearImpl::forward(const at::Tensor& input) { return linear(input, weight, bias); }

std::shared_ptr<torch::nn::Module> LinearImpl::clone(
    const std::optional<torch::Device>& device) const {
  auto copy = std::make_shared<LinearImpl>(options);
  copy_parameters(*this, *copy, device);
  return copy;
}

}  // namespace lightning::nn
