#include "lightning/nn/embedding.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/embedding.h>
#include <ATen/ops/embedding_dense_backward.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/sort.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros.h>
#include <c10/core/DeviceGuard.h>
#include <torch/csrc/autograd/custom_function.h>

#include "lightning/cuda/embed.h"
#include "lightning/cuda/launch.h"
#include "lightning/nn/compute.h"
#include "lightning/nn/copy_parameters.h"
#include "lightning/param/replay.h"
#include "lightning/param/touch.h"

namespace lightning::nn {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// The gradient [vocabulary, width] of the rows that tokens [...] picked, from that of what they
// became, [..., width]. LibTorch's takes four times as long where tokens repeat little.
at::Tensor gradient_of_rows(const at::Tensor& gradient, const at::Tensor& tokens,
                            int64_t vocabulary) {
  const auto width = gradient.size(-1);
  if constexpr (cuda::kBuilt) {
    const c10::DeviceGuard device(gradient.device());
    const auto rows = gradient.contiguous();
    const auto [sorted, places] = at::sort(tokens.flatten(), std::optional<bool>(true), 0, false);
    const auto result = at::zeros({vocabulary, width}, gradient.options());
    cuda::EmbedGradient arguments;
    arguments.dtype = cuda::dtype_of(rows);
    arguments.tokens = sorted.const_data_ptr<int64_t>();
    arguments.places = places.const_data_ptr<int64_t>();
    arguments.gradient = rows.const_data_ptr();
    arguments.out = result.mutable_data_ptr();
    arguments.rows = tokens.numel();
    arguments.width = width;
    const auto workspace = at::empty({cuda::embed_gradient_workspace(arguments)},
                                     gradient.options().dtype(at::kFloat));
    arguments.workspace = workspace.mutable_data_ptr<float>();
    cuda::embed_gradient(arguments, cuda::stream_of(rows));
    return result;
  }
  return at::embedding_dense_backward(gradient, tokens, vocabulary, -1, false);
}

class EmbedFunction : public torch::autograd::Function<EmbedFunction> {
 public:
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& given,
                            const at::Tensor& token_weight, const at::Tensor& position_weight) {
    const c10::DeviceGuard device(token_weight.device());
    const auto tokens = given.contiguous();
    const auto token_rows = whole(token_weight).detach().contiguous();
    const auto position_rows = whole(position_weight).detach().contiguous();
    const auto output = at::empty({tokens.size(0), tokens.size(1), token_rows.size(1)},
                                  token_rows.options().requires_grad(false));
    if constexpr (cuda::kBuilt) {
      cuda::Embed arguments;
      arguments.dtype = cuda::dtype_of(output);
      arguments.tokens = tokens.const_data_ptr<int64_t>();
      arguments.token_rows = token_rows.const_data_ptr();
      arguments.position_rows = position_rows.const_data_ptr();
      arguments.out = output.mutable_data_ptr();
      arguments.rows = tokens.numel();
      arguments.time = tokens.size(1);
      arguments.width = token_rows.size(1);
      arguments.vocabulary = token_rows.size(0);
      cuda::embed(arguments, cuda::stream_of(output));
    }
    ctx->save_for_backward({tokens});
    ctx->saved_data["vocabulary"] = token_rows.size(0);
    ctx->saved_data["positions"] = position_rows.size(0);
    return output;
  }

  static variable_list backward(AutogradContext* ctx, variable_list gradients) {
    refuse_second_derivative("lightning::nn::embed on a GPU", "torch::nn::Embedding");
    const NoAutocast no_autocast;
    const auto& gradient = gradients[0];
    at::Tensor tokens, positions;
    if (ctx->needs_input_grad(1)) {
      tokens = gradient_of_rows(gradient, ctx->get_saved_variables()[0],
                                ctx->saved_data.at("vocabulary").toInt());
    }
    if (ctx->needs_input_grad(2)) {
      const auto count = ctx->saved_data.at("positions").toInt();
      const auto time = gradient.size(1);
      if (count == time) {
        positions = at::sum(gradient, {0});
      } else {
        positions = at::zeros({count, gradient.size(2)}, gradient.options());
        auto used = positions.narrow(0, 0, time);
        at::sum_out(used, gradient, {0});
      }
    }
    return {at::Tensor(), tokens, positions};
  }
};

// at::embedding, but for the gradient.
class RowsFunction : public torch::autograd::Function<RowsFunction> {
 public:
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& tokens,
                            const at::Tensor& weight) {
    const auto rows = whole(weight).detach();
    ctx->save_for_backward({tokens});
    ctx->saved_data["vocabulary"] = rows.size(0);
    return at::embedding(rows, tokens);
  }

  static variable_list backward(AutogradContext* ctx, variable_list gradients) {
    const auto tokens = ctx->get_saved_variables()[0];
    const auto vocabulary = ctx->saved_data.at("vocabulary").toInt();
    // A second derivative is asked for.
    if (at::GradMode::is_enabled()) {
      return {at::Tensor(),
              at::embedding_dense_backward(gradients[0], tokens, vocabulary, -1, false)};
    }
    return {at::Tensor(), gradient_of_rows(gradients[0], tokens, vocabulary)};
  }
};

// Whether gradient_of_rows() is what at::embedding's gradient would be.
bool has_plain_gradient(const torch::nn::EmbeddingOptions& options, const at::Tensor& tokens,
                        const at::Tensor& weight) {
  return !options.padding_idx() && !options.max_norm() && !options.scale_grad_by_freq() &&
         !options.sparse() && tokens.scalar_type() == at::kLong && tokens.numel() > 0 &&
         cuda::has_dtype(weight.scalar_type()) && cuda::can_run(weight) &&
         tokens.device() == weight.device();
}

}  // namespace

at::Tensor EmbeddingImpl::forward(const at::Tensor& indices) {
  // A region replays operators.
  const bool by_kernel = !recording_region() && at::GradMode::is_enabled() &&
                         weight.requires_grad() && has_plain_gradient(options, indices, weight);
  if (by_kernel) return RowsFunction::apply(indices, weight);
  return torch::nn::EmbeddingImpl::forward(indices);
}

std::shared_ptr<torch::nn::Module> EmbeddingImpl::clone(
    const std::optional<torch::Device>& device) const {
  auto copy = std::make_shared<EmbeddingImpl>(options);
  copy_parameters(*this, *copy, device);
  return copy;
}

at::Tensor embed(const at::Tensor& tokens, const at::Tensor& token_weight,
                 const at::Tensor& position_weight) {
  TORCH_CHECK(tokens.dim() == 2 && token_weight.dim() == 2 && position_weight.dim() == 2 &&
                  token_weight.size(1) == position_weight.size(1),
              "embed got tokens ", tokens.sizes(), ", token weights ", token_weight.sizes(),
              " and position weights ", position_weight.sizes(),
              ", expected [batch, time], [vocabulary, width] and [positions, width].");
  TORCH_CHECK(tokens.size(1) <= position_weight.size(0), "embed got ", tokens.size(1),
              " tokens in a row, but there are ", position_weight.size(0),
              " positions. Shorten the rows or give the model more positions.");
  const auto dtype = token_weight.scalar_type();
  const bool has_kernel = cuda::has_dtype(dtype) && position_weight.scalar_type() == dtype &&
                          tokens.scalar_type() == at::kLong && cuda::can_run(token_weight) &&
                          tokens.device() == token_weight.device() &&
                          position_weight.device() == token_weight.device();
  if (has_kernel && tokens.numel() > 0) {
    return EmbedFunction::apply(tokens, token_weight, position_weight);
  }
  return at::embedding(token_weight, tokens) + position_weight.narrow(0, 0, tokens.size(1));
}

}  // namespace lightning::nn
