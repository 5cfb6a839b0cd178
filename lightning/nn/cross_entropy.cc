#include "lightning/nn/cross_entropy.h"

#include <ATen/ops/cross_entropy_loss.h>
#include <ATen/ops/empty.h>
#include <torch/csrc/autograd/custom_function.h>

#include <variant>

#include "lightning/nn/compute.h"
#include "lightning/nn/last_use.h"

namespace lightning::nn {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

class CrossEntropyFunction : public torch::autograd::Function<CrossEntropyFunction> {
 public:
  //   rows  [N, V]; the loss is a scalar or [N]
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& rows, const RowTargets& targets,
                            Reduction reduction) {
    const NoAutocast no_autocast;
    auto forward = cross_entropy_rows(rows, targets);
    ReducedLoss result{forward.losses, {}};
    if (reduction != Reduction::kNone) result = reduced(forward.losses, targets, reduction);
    ctx->save_for_backward({rows, forward.statistics, targets.classes, result.factor});
    ctx->saved_data["ignore_index"] = targets.ignore_index;
    ctx->saved_data["label_smoothing"] = targets.label_smoothing;
    ctx->saved_data["hooked"] = has_saved_tensor_hooks();
    return result.loss;
  }

  static variable_list backward(AutogradContext* ctx, variable_list gradients) {
    refuse_second_derivative("fused_cross_entropy", "torch::nn::functional::cross_entropy");
    const NoAutocast no_autocast;
    const auto saved = ctx->get_saved_variables();
    const auto& rows = saved[0];
    const RowTargets targets{saved[2], ctx->saved_data.at("ignore_index").toInt(),
                             ctx->saved_data.at("label_smoothing").toDouble()};
    const bool over_logits =
        rows.is_contiguous() && is_last_use(rows, ctx->saved_data.at("hooked").toBool());
    const auto into = over_logits ? rows.detach() : at::empty(rows.sizes(), rows.options());
    cross_entropy_gradient(rows, {{}, saved[1]}, targets, {gradients[0], saved[3]}, into);
    return {into, at::Tensor(), at::Tensor()};
  }
};

int64_t class_dim(const at::Tensor& logits) { return logits.dim() == 1 ? 0 : 1; }

void check_sizes(const at::Tensor& logits, const at::Tensor& target) {
  TORCH_CHECK(at::isFloatingType(logits.scalar_type()), "fused_cross_entropy got logits of ",
              logits.scalar_type(), ", expected a floating dtype.");
  TORCH_CHECK(logits.dim() > 0, "fused_cross_entropy got a scalar, expected logits [N, V].");
  auto expected = logits.sizes().vec();
  expected.erase(expected.begin() + class_dim(logits));
  TORCH_CHECK(target.sizes() == at::IntArrayRef(expected), "fused_cross_entropy got logits of ",
              logits.sizes(), " and a target of ", target.sizes(), ", expected a target of ",
              at::IntArrayRef(expected), ": a class for each, with the classes in dimension ",
              class_dim(logits), " of the logits.");
}

at::Tensor plain(const at::Tensor& logits, const at::Tensor& target,
                 const torch::nn::CrossEntropyLossOptions& options) {
  const NoAutocast no_autocast;
  const auto dtype = loss_dtype(logits.scalar_type());
  const auto cast = [&](const at::Tensor& tensor) {
    return tensor.is_floating_point() ? tensor.to(dtype) : tensor;
  };
  const auto& weight = options.weight();
  return at::cross_entropy_loss(cast(logits), cast(target),
                                weight.defined() ? std::make_optional(cast(weight)) : std::nullopt,
                                static_cast<int64_t>(reduction_of(options)), options.ignore_index(),
                                options.label_smoothing());
}

}  // namespace

static_assert(static_cast<int>(Reduction::kNone) == at::Reduction::None &&
              static_cast<int>(Reduction::kMean) == at::Reduction::Mean &&
              static_cast<int>(Reduction::kSum) == at::Reduction::Sum);

Reduction reduction_of(const torch::nn::CrossEntropyLossOptions& options) {
  if (std::holds_alternative<torch::enumtype::kNone>(options.reduction())) return Reduction::kNone;
  if (std::holds_alternative<torch::enumtype::kSum>(options.reduction())) return Reduction::kSum;
  return Reduction::kMean;
}

RowTargets row_targets(const at::Tensor& target, c10::Device device,
                       const torch::nn::CrossEntropyLossOptions& options) {
  TORCH_CHECK(at::isIntegralType(target.scalar_type(), /*includeBool=*/false),
              "The cross-entropy got a target of ", target.scalar_type(),
              ", expected integers, or probabilities of the logits' sizes.");
  TORCH_CHECK(target.device() == device, "The cross-entropy got logits on ", device,
              " and a target on ", target.device(), ", expected both on one device.");
  TORCH_CHECK(options.label_smoothing() >= 0 && options.label_smoothing() <= 1,
              "The cross-entropy got label_smoothing ", options.label_smoothing(),
              ", expected 0 to 1.");
  return {target.detach().reshape({-1}).to(at::kLong).contiguous(), options.ignore_index(),
          options.label_smoothing()};
}

bool needs_plain(const at::Tensor& target, const torch::nn::CrossEntropyLossOptions& options) {
  return options.weight().defined() || target.is_floating_point();
}

at::Tensor fused_cross_entropy(const at::Tensor& logits, const at::Tensor& target,
                               const torch::nn::CrossEntropyLossOptions& options) {
  if (needs_plain(target, options)) return plain(logits, target, options);
  check_sizes(logits, target);
  const auto targets = row_targets(target, logits.device(), options);
  const auto dim = class_dim(logits);
  const auto classes = logits.size(dim);
  TORCH_CHECK(classes > 0, "fused_cross_entropy got logits of ", logits.sizes(),
              ", expected at least one class.");
  const auto rows =
      logits.dim() == 2 ? logits : logits.movedim(dim, -1).reshape({target.numel(), classes});
  const auto reduction = reduction_of(options);
  const auto loss = CrossEntropyFunction::apply(rows, targets, reduction);
  return reduction == Reduction::kNone ? loss.view(target.sizes()) : loss;
}

}  // namespace lightning::nn
