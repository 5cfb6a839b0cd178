// Tensors: N samples, C channels, S the places of a channel in a sample, W processes.
#include "lightning/nn/sync_batch_norm.h"

#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/batch_norm_native.h>
#include <ATen/ops/instance_norm_native.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <utility>

#include "lightning/param/touch.h"

namespace lightning {
namespace {

using Optional = std::optional<at::Tensor>;

thread_local Collectives* processes = nullptr;

Scope use(Collectives* now) {
  const auto before = std::exchange(processes, now);
  return scope_exit([before] { processes = before; });
}

// Undefined tensors are no arguments of an autograd function.
Optional given(const Optional& tensor) {
  return tensor.has_value() && tensor->defined() ? tensor : std::nullopt;
}

// What a batch of all processes has, in the dtype that norms compute in.
struct Statistics {
  at::Tensor mean_C, var_C;
  at::Tensor counts_W;  // values of a channel, float64
};

at::ScalarType compute_dtype(const at::Tensor& input) {
  return input.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

// All but the channels.
std::vector<int64_t> reduced_dims(const at::Tensor& input) {
  std::vector<int64_t> dims{0};
  for (int64_t dim = 2; dim < input.dim(); ++dim) dims.push_back(dim);
  return dims;
}

at::Tensor by_channel(const at::Tensor& values_C, const at::Tensor& input_NCS) {
  std::vector<int64_t> sizes(static_cast<size_t>(input_NCS.dim()), 1);
  sizes[1] = values_C.size(0);
  return values_C.view(sizes);
}

// Of this process's batch, with the biased variance.
std::pair<at::Tensor, at::Tensor> own_mean_var(const at::Tensor& input, double eps) {
  const auto options = input.options().dtype(at::kDouble);
  if (input.numel() == 0) {
    return {at::zeros({input.size(1)}, options), at::zeros({input.size(1)}, options)};
  }
  if (input.is_cuda()) {
    const auto [mean, invstd] = at::batch_norm_stats(input, eps);
    return {mean.to(at::kDouble), invstd.to(at::kDouble).pow(-2).sub(eps)};
  }
  const auto [var, mean] =
      at::var_mean(input.to(compute_dtype(input)), reduced_dims(input), /*correction=*/0);
  return {mean.to(at::kDouble), var.to(at::kDouble)};
}

Statistics statistics(const at::Tensor& input, double eps) {
  const auto channels = input.size(1);
  const auto [mean, var] = own_mean_var(input, eps);
  const auto count = at::full({1}, channels == 0 ? 0 : input.numel() / channels, mean.options());
  const auto all = processes->all_gather(at::cat({mean, var, count})).view({-1, 2 * channels + 1});
  const auto means_WC = all.narrow(1, 0, channels), vars_WC = all.narrow(1, channels, channels);
  const auto counts_W1 = all.narrow(1, 2 * channels, 1);
  const auto share_W1 = counts_W1 / counts_W1.sum();
  const auto mean_C = (means_WC * share_W1).sum(0);
  const auto var_C = ((vars_WC + (means_WC - mean_C).square()) * share_W1).sum(0);
  const auto dtype = compute_dtype(input);
  return {mean_C.to(dtype), var_C.to(dtype), counts_W1.flatten().contiguous()};
}

void update_running(const Statistics& of, const Optional& running_mean, const Optional& running_var,
                    double momentum) {
  const auto update = [momentum](const Optional& running, const at::Tensor& value) {
    if (!given(running)) return;
    running->mul_(1 - momentum).add_(value.to(running->scalar_type()), momentum);
  };
  update(running_mean, of.mean_C);
  const auto count = of.counts_W.sum();
  update(running_var, of.var_C * (count / (count - 1).clamp_min(1)).to(of.var_C.scalar_type()));
}

at::Tensor in_dtype(const at::Tensor& values_C, const at::Tensor& like_C, double otherwise) {
  return values_C.defined() ? values_C.to(like_C.scalar_type()) : at::full_like(like_C, otherwise);
}

at::Tensor dense(const at::Tensor& tensor) {
  return tensor.contiguous(tensor.suggest_memory_format());
}

class Normalize : public torch::autograd::Function<Normalize> {
 public:
  static at::Tensor forward(torch::autograd::AutogradContext* context, const at::Tensor& input,
                            const Optional& weight, const Optional& bias, const at::Tensor& mean,
                            const at::Tensor& var, const at::Tensor& counts, double eps,
                            int64_t with) {
    context->save_for_backward({input, weight.value_or(at::Tensor()), mean, var, counts});
    context->saved_data["eps"] = eps;
    context->saved_data["processes"] = with;
    if (input.numel() == 0) return at::empty_like(input);
    const auto scale = in_dtype(weight.value_or(at::Tensor()), mean, 1);
    const auto shift = in_dtype(bias.value_or(at::Tensor()), mean, 0);
    if (input.is_cuda()) {
      return at::batch_norm_elemt(input, scale, shift, mean, (var + eps).rsqrt(), eps);
    }
    return std::get<0>(at::native_batch_norm(input, scale, shift, mean, var, /*training=*/false,
                                             /*momentum=*/0, eps));
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 torch::autograd::variable_list gradients) {
    const auto saved = context->get_saved_variables();
    const auto &input = saved[0], &weight = saved[1], &mean = saved[2];
    const auto scale = in_dtype(weight, mean, 1);
    const auto eps = context->saved_data["eps"].toDouble();
    const auto invstd = (saved[3] + eps).rsqrt();
    auto* const with =
        reinterpret_cast<Collectives*>(context->saved_data["processes"].toInt());  // NOLINT
    const auto own = of_own_batch(dense(gradients[0]), input, scale, mean, saved[3], eps);
    const auto sums = with->reduce(at::cat({own.bias, own.weight}).to(at::kDouble), ReduceOp::kSum);
    const auto channels = mean.size(0);
    const auto to_input =
        through_statistics(own, dense(gradients[0]), input, scale, mean, invstd, saved[4],
                           sums.narrow(0, 0, channels), sums.narrow(0, channels, channels));
    const auto as_weight = [&](const at::Tensor& values) {
      return weight.defined() ? values.to(weight.scalar_type()) : at::Tensor();
    };
    return {to_input, as_weight(own.weight), as_weight(own.bias), {}, {}, {}, {}, {}};
  }

 private:
  // Gradients as if mean and variance were constants. `input` is undefined where the elements of a
  // GPU's are not needed.
  struct Gradients {
    at::Tensor input, weight, bias;
  };

  static Gradients of_own_batch(const at::Tensor& gradient, const at::Tensor& input,
                                const at::Tensor& scale, const at::Tensor& mean,
                                const at::Tensor& var, double eps) {
    if (input.numel() == 0)
      return {at::zeros_like(input), at::zeros_like(mean), at::zeros_like(mean)};
    if (input.is_cuda()) {
      const auto [sum_dy, sum_dy_xmu, to_weight, to_bias] = at::batch_norm_backward_reduce(
          gradient, input, mean, (var + eps).rsqrt(), scale, true, true, true);
      return {{}, to_weight, to_bias};
    }
    auto [to_input, to_weight, to_bias] = at::native_batch_norm_backward(
        gradient, input, scale, mean, var, {}, {}, /*train=*/false, eps, {true, true, true});
    return {to_input, to_weight, to_bias};
  }

  // sum_dy and sum_dy_xhat are those of all processes, float64.
  static at::Tensor through_statistics(const Gradients& own, const at::Tensor& gradient,
                                       const at::Tensor& input, const at::Tensor& scale,
                                       const at::Tensor& mean, const at::Tensor& invstd,
                                       const at::Tensor& counts, const at::Tensor& sum_dy,
                                       const at::Tensor& sum_dy_xhat) {
    if (input.numel() == 0) return own.input;
    const auto dtype = mean.scalar_type();
    if (input.is_cuda()) {
      const auto sum_dy_xmu = (sum_dy_xhat / invstd).to(dtype);
      return at::batch_norm_backward_elemt(gradient, input, mean, invstd, scale, sum_dy.to(dtype),
                                           sum_dy_xmu, counts.to(at::kInt));
    }
    const auto count = counts.sum();
    const auto constant = (sum_dy / count * scale * invstd).to(dtype);
    const auto slope = (sum_dy_xhat / count * scale * invstd.square()).to(dtype);
    const auto centered = input.to(dtype) - by_channel(mean, input);
    return (own.input.to(dtype) - by_channel(constant, input) -
            centered.mul_(by_channel(slope, input)))
        .to(input.scalar_type());
  }
};

at::Tensor synchronized(const at::Tensor& input, const Optional& weight, const Optional& bias,
                        const Optional& running_mean, const Optional& running_var, double momentum,
                        double eps) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const auto batch = dense(input);
  Statistics of;
  {
    // A region that is replayed has the statistics, and sends nothing again.
    auto* const watch = watch_operators(nullptr);
    const Scope back = scope_exit([watch] { watch_operators(watch); });
    const at::NoGradGuard no_grad;
    of = statistics(batch.detach(), eps);
    update_running(of, running_mean, running_var, momentum);
  }
  return Normalize::apply(batch, given(weight), given(bias), of.mean_C, of.var_C, of.counts_W, eps,
                          reinterpret_cast<int64_t>(processes));
}

at::Tensor batch_norm(const at::Tensor& input, const Optional& weight, const Optional& bias,
                      const Optional& running_mean, const Optional& running_var, bool training,
                      double momentum, double eps, bool cudnn_enabled) {
  if (processes != nullptr && training) {
    return synchronized(input, weight, bias, running_mean, running_var, momentum, eps);
  }
  return at::native::batch_norm(input, weight, bias, running_mean, running_var, training, momentum,
                                eps, cudnn_enabled);
}

// Calls torch::batch_norm, with a channel for each sample.
at::Tensor instance_norm(const at::Tensor& input, const Optional& weight, const Optional& bias,
                         const Optional& running_mean, const Optional& running_var,
                         bool use_input_stats, double momentum, double eps, bool cudnn_enabled) {
  const Scope alone = processes == nullptr ? nullptr : use(nullptr);
  return at::native::instance_norm(input, weight, bias, running_mean, running_var, use_input_stats,
                                   momentum, eps, cudnn_enabled);
}

TORCH_LIBRARY_IMPL(aten, AutogradCPU, m) {
  m.impl("batch_norm", TORCH_FN(batch_norm));
  m.impl("instance_norm", TORCH_FN(instance_norm));
}
TORCH_LIBRARY_IMPL(aten, AutogradCUDA, m) {
  m.impl("batch_norm", TORCH_FN(batch_norm));
  m.impl("instance_norm", TORCH_FN(instance_norm));
}

}  // namespace

Scope sync_batch_norm(Collectives& with) { return use(&with); }

}  // namespace lightning
