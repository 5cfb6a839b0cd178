#include "lightning/nn/norm.h"

#include <ATen/ops/add.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/layer_norm.h>
#include <ATen/ops/rms_norm.h>
#include <c10/core/DeviceGuard.h>
#include <torch/csrc/autograd/custom_function.h>

#include <limits>

#include "lightning/cuda/column_sum_of.h"
#include "lightning/cuda/launch.h"
#include "lightning/cuda/norm.h"
#include "lightning/nn/compute.h"
#include "lightning/param/replay.h"
#include "lightning/param/working_copy.h"

namespace lightning::nn {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

at::Tensor plain(const at::Tensor& input, const at::Tensor& weight, const at::Tensor& bias,
                 const Norm& norm) {
  if (norm.centred) {
    return at::layer_norm(input, norm.shape, weight, bias, norm.eps.value_or(1e-5));
  }
  // An undefined tensor would be multiplied with.
  const auto some = weight.defined() ? std::make_optional(weight) : std::nullopt;
  return at::rms_norm(input, norm.shape, some, norm.eps);
}

// Under autocast in float32, rounded once.
at::Tensor by_operators(const at::Tensor& input, at::ScalarType output, const Norm& norm) {
  if (!is_autocast(input)) return plain(input, norm.weight, norm.bias, norm);
  const NoAutocast no_autocast;
  const auto in_float = [](const at::Tensor& tensor) {
    return tensor.defined() ? tensor.to(at::kFloat) : tensor;
  };
  return plain(in_float(input), in_float(norm.weight), in_float(norm.bias), norm).to(output);
}

// The dtype in which the kernels read the parameters: their own where there is a kernel, else
// float32.
at::ScalarType weight_dtype(const at::Tensor& weight, at::ScalarType input, at::ScalarType output) {
  const bool own = weight.defined() && weight.scalar_type() == input && input == output;
  return own ? input : at::kFloat;
}

cuda::NormTypes kernel_types(const at::Tensor& input, at::ScalarType output, const Norm& norm) {
  const auto& parameter = norm.weight.defined() ? norm.weight : norm.bias;
  return {cuda::dtype_of(input.scalar_type()), cuda::dtype_of(output),
          cuda::dtype_of(weight_dtype(parameter, input.scalar_type(), output))};
}

int64_t width_of(const Norm& norm) {
  int64_t width = 1;
  for (const auto size : norm.shape) width *= size;
  return width;
}

// Without autocast LibTorch refuses some mixtures of dtypes: those are left to it, as are shapes
// that do not fit.
bool kernels_take(const at::Tensor& input, at::ScalarType output, const Norm& norm) {
  if constexpr (cuda::kBuilt) {
    const auto dims = static_cast<int64_t>(norm.shape.size());
    const bool known =
        cuda::can_run(input) && cuda::has_dtype(input.scalar_type()) && cuda::has_dtype(output);
    if (!known || input.numel() == 0 || input.dim() < dims) return false;
    if (input.sizes().slice(input.dim() - dims) != at::IntArrayRef(norm.shape)) return false;
    for (const auto& parameter : {norm.weight, norm.bias}) {
      if (!parameter.defined()) continue;
      const bool same = parameter.scalar_type() == input.scalar_type();
      const bool fits = parameter.sizes() == at::IntArrayRef(norm.shape) &&
                        parameter.device() == input.device() &&
                        cuda::has_dtype(parameter.scalar_type()) && (same || is_autocast(input));
      if (!fits) return false;
    }
    const c10::DeviceGuard guard(input.device());
    return cuda::norm_takes(kernel_types(input, output, norm), width_of(norm));
  }
  return false;
}

const void* pointer(const at::Tensor& tensor) {
  return tensor.defined() ? tensor.const_data_ptr() : nullptr;
}

void* place(const at::Tensor& tensor) {
  return tensor.defined() ? tensor.mutable_data_ptr() : nullptr;
}

float* floats(const at::Tensor& tensor) { return static_cast<float*>(place(tensor)); }

at::Tensor read(const at::Tensor& parameter, at::ScalarType dtype) {
  return parameter.defined() ? working_copy(parameter, dtype).contiguous() : at::Tensor();
}

struct Forward {
  at::Tensor sum;  // undefined without a delta
  at::Tensor output;
  at::Tensor mean;  // undefined where not centred
  at::Tensor rstd;
};

// input and delta are contiguous.
Forward forward_kernel(const at::Tensor& input, const at::Tensor& delta, at::ScalarType output,
                       const Norm& norm) {
  const c10::DeviceGuard guard(input.device());
  Forward result;
  cuda::NormForward arguments;
  arguments.types = kernel_types(input, output, norm);
  arguments.width = width_of(norm);
  arguments.rows = input.numel() / arguments.width;
  arguments.centred = norm.centred;
  arguments.eps = static_cast<float>(norm.eps.value_or(std::numeric_limits<float>::epsilon()));
  // Read first: the first touch of a module's parameters begins its region, which knows what is
  // made in it.
  const auto own = norm.weight.defined() ? norm.weight : norm.bias;
  const auto dtype = weight_dtype(own, input.scalar_type(), output);
  const auto weight = read(norm.weight, dtype), bias = read(norm.bias, dtype);
  const auto statistics = input.options().dtype(at::kFloat);
  result.output = at::empty(input.sizes(), input.options().dtype(output));
  if (delta.defined()) result.sum = at::empty(input.sizes(), input.options());
  if (norm.centred) result.mean = at::empty({arguments.rows}, statistics);
  result.rstd = at::empty({arguments.rows}, statistics);
  replayable({input, delta, weight, bias}, {result.sum, result.output, result.mean, result.rstd},
             [arguments](const std::vector<at::Tensor>& in, const std::vector<at::Tensor>& out) {
               const c10::DeviceGuard device(in[0].device());
               auto filled = arguments;
               filled.input = pointer(in[0]);
               filled.delta = pointer(in[1]);
               filled.weight = pointer(in[2]);
               filled.bias = pointer(in[3]);
               filled.sum = place(out[0]);
               filled.output = place(out[1]);
               filled.mean = floats(out[2]);
               filled.rstd = floats(out[3]);
               cuda::norm_forward(filled, cuda::stream_of(in[0]));
             });
  return result;
}

struct Wanted {
  bool input = false;
  bool delta = false;
  bool weight = false;
  bool bias = false;
};

struct Gradients {
  at::Tensor input;
  at::Tensor delta;
  at::Tensor weight;
  at::Tensor bias;
};

struct Saved {
  at::Tensor x;
  at::Tensor weight;  // the parameter
  at::Tensor mean;
  at::Tensor rstd;
  at::ScalarType parameters = at::kFloat;  // their dtype
  at::IntArrayRef shape;
};

Gradients backward_kernel(const Saved& saved, const at::Tensor& grad_output,
                          const at::Tensor& grad_sum, const Wanted& wanted) {
  const auto& x = saved.x;
  const c10::DeviceGuard guard(x.device());
  const auto output = grad_output.scalar_type();
  const bool own = saved.parameters == x.scalar_type() && output == x.scalar_type();
  const auto dtype = own ? x.scalar_type() : at::kFloat;
  const auto weight = read(saved.weight, dtype);
  const auto options = x.options();
  cuda::NormBackward arguments;
  arguments.types = {cuda::dtype_of(x.scalar_type()), cuda::dtype_of(output),
                     cuda::dtype_of(dtype)};
  arguments.rows = saved.rstd.numel();
  arguments.width = x.numel() / arguments.rows;
  Gradients result;
  // One tensor serves both where they have one dtype.
  const bool one = output == x.scalar_type();
  if (wanted.input || wanted.delta) result.input = at::empty(x.sizes(), options);
  if (wanted.delta) result.delta = one ? result.input : at::empty(x.sizes(), options.dtype(output));
  if (wanted.weight) result.weight = at::empty(saved.shape, options.dtype(dtype));
  if (wanted.bias) result.bias = at::empty(saved.shape, options.dtype(dtype));
  arguments.x = pointer(x);
  arguments.weight = pointer(weight);
  arguments.mean = floats(saved.mean);
  arguments.rstd = floats(saved.rstd);
  arguments.grad_output = pointer(grad_output);
  arguments.grad_sum = pointer(grad_sum);
  arguments.grad_input = place(result.input);
  arguments.grad_delta = one ? nullptr : place(result.delta);
  arguments.grad_weight = place(result.weight);
  arguments.grad_bias = place(result.bias);
  // What comes before a layer norm mostly ends in a bias, whose gradient these are.
  at::Tensor delta_sums;
  if (wanted.delta && saved.mean.defined() && saved.shape.size() == 1 && arguments.width <= 4096) {
    delta_sums = at::empty({arguments.width}, options.dtype(at::kFloat));
  }
  arguments.delta_sums = floats(delta_sums);
  arguments.blocks = cuda::norm_backward_blocks(arguments);
  at::Tensor workspace;
  if (wanted.weight || wanted.bias || delta_sums.defined()) {
    workspace = at::empty({arguments.blocks, 3, arguments.width}, options.dtype(at::kFloat));
  }
  arguments.workspace = floats(workspace);
  cuda::norm_backward(arguments, cuda::stream_of(x));
  if (delta_sums.defined()) cuda::leave_column_sum(result.delta, delta_sums);
  if (wanted.weight) result.weight = result.weight.to(saved.parameters);
  if (wanted.bias) result.bias = result.bias.to(saved.parameters);
  return result;
}

const char* layer_name(bool adds, bool centred) {
  if (centred) return adds ? "lightning::nn::AddLayerNorm" : "lightning::nn::LayerNorm";
  return adds ? "lightning::nn::AddRMSNorm" : "lightning::nn::RMSNorm";
}

// Inputs: input (or residual), then delta, weight and bias where there are such. Outputs: the norm,
// and before it, with a delta, the sum.
struct NormFunction : torch::autograd::Function<NormFunction> {
  static variable_list forward(AutogradContext* context, const at::Tensor& input,
                               const std::optional<at::Tensor>& delta,
                               const std::optional<at::Tensor>& weight,
                               const std::optional<at::Tensor>& bias, at::ScalarType output,
                               const Norm* norm) {
    const auto from = input.contiguous();
    const auto result =
        forward_kernel(from, delta ? delta->contiguous() : at::Tensor(), output, *norm);
    const auto& parameter = weight ? weight : bias;
    const auto dtype = parameter ? parameter->scalar_type() : at::kFloat;
    context->set_materialize_grads(false);
    context->saved_data["has_bias"] = bias.has_value();
    context->saved_data["shape"] = norm->shape;
    context->saved_data["dtype"] = static_cast<int64_t>(dtype);
    context->save_for_backward({result.sum.defined() ? result.sum : from,
                                weight.value_or(at::Tensor()), result.mean, result.rstd});
    if (result.sum.defined()) return {result.sum, result.output};
    return {result.output};
  }

  static variable_list backward(AutogradContext* context, variable_list grads) {
    const bool adds = grads.size() == 2;
    const auto saved = context->get_saved_variables();
    const bool centred = saved[2].defined();
    refuse_second_derivative(layer_name(adds, centred),
                             centred ? "torch::nn::LayerNorm" : "at::rms_norm");
    const auto grad_sum = adds ? grads[0] : at::Tensor();
    const auto& grad_output = grads.back();
    // Inputs that are not there are not counted.
    size_t edge = 0;
    const auto wants = [&](bool is_there) { return is_there && context->needs_input_grad(edge++); };
    Wanted wanted;
    wanted.input = wants(true);
    wanted.delta = wants(adds);
    wanted.weight = wants(saved[1].defined());
    wanted.bias = wants(context->saved_data["has_bias"].toBool());
    Gradients result;
    if (grad_output.defined()) {
      const auto shape = context->saved_data["shape"].toIntVector();
      const auto dtype = static_cast<at::ScalarType>(context->saved_data["dtype"].toInt());
      result = backward_kernel({saved[0], saved[1], saved[2], saved[3], dtype, shape},
                               grad_output.contiguous(),
                               grad_sum.defined() ? grad_sum.contiguous() : grad_sum, wanted);
    } else if (grad_sum.defined()) {
      result.input = grad_sum;
      // The engine casts it to delta's dtype.
      result.delta = grad_sum;
    }
    if (!wanted.input) result.input.reset();
    if (!wanted.delta) result.delta.reset();
    return {result.input, result.delta, result.weight, result.bias, {}, {}};
  }
};

}  // namespace

at::Tensor normalize(const at::Tensor& input, const Norm& norm) {
  const auto output = compute_dtype(input);
  if constexpr (cuda::kBuilt) {
    if (kernels_take(input, output, norm)) {
      return NormFunction::apply(input, std::optional<at::Tensor>(), if_defined(norm.weight),
                                 if_defined(norm.bias), output, &norm)[0];
    }
  }
  return by_operators(input, output, norm);
}

std::tuple<at::Tensor, at::Tensor> add_and_normalize(const at::Tensor& residual,
                                                     const at::Tensor& delta, const Norm& norm) {
  const auto output = compute_dtype(residual);
  if constexpr (cuda::kBuilt) {
    const bool one_kernel = delta.scalar_type() == output && delta.sizes() == residual.sizes() &&
                            delta.device() == residual.device();
    if (one_kernel && kernels_take(residual, output, norm)) {
      auto results =
          NormFunction::apply(residual, std::optional<at::Tensor>(delta), if_defined(norm.weight),
                              if_defined(norm.bias), output, &norm);
      return {results[0], results[1]};
    }
  }
  const auto sum = at::add(residual, delta).to(residual.scalar_type());
  return {sum, normalize(sum, norm)};
}

}  // namespace lightning::nn
