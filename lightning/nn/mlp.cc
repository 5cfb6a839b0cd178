#include "lightning/nn/mlp.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/dropout.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/gelu.h>
#include <ATen/ops/relu.h>
#include <ATen/ops/silu.h>
#include <c10/core/DeviceGuard.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <utility>

#include "lightning/cuda/activation.h"
#include "lightning/cuda/column_sum_of.h"
#include "lightning/cuda/launch.h"
#include "lightning/cuda/swiglu.h"
#include "lightning/nn/compute.h"
#include "lightning/param/replay.h"
#include "lightning/param/working_copy.h"

namespace lightning::nn {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

constexpr const char* kLayer = "lightning::nn::MLP on a GPU";
constexpr const char* kPlain = "torch::nn::Linear and at::gelu";

cuda::Activation activation_of(const std::string& name) {
  if (name == "gelu_tanh") return cuda::Activation::kGeluTanh;
  return name == "relu" ? cuda::Activation::kRelu : cuda::Activation::kGelu;
}

at::Tensor floats(const at::Tensor& like, int64_t count) {
  return at::empty({count}, like.options().dtype(at::kFloat));
}

float* data_of(const at::Tensor& sums) {
  return sums.defined() ? sums.mutable_data_ptr<float>() : nullptr;
}

// ---- The kernels on tensors ---------------------------------------------------------------------

at::Tensor activated(cuda::Activation activation, const at::Tensor& before) {
  const auto after = at::empty_like(before);
  replayable({before}, {after}, [activation](const auto& in, const auto& out) {
    if constexpr (cuda::kBuilt) {
      const c10::DeviceGuard device(in[0].device());
      cuda::activation(activation, cuda::dtype_of(in[0]), in[0].const_data_ptr(),
                       out[0].mutable_data_ptr(), in[0].numel(), cuda::stream_of(in[0]));
    }
  });
  return after;
}

// What precedes the activation of a product, and what follows it: by the product itself where it
// can. What precedes may then be undefined, unless it `keeps` it.
std::pair<at::Tensor, at::Tensor> activated(cuda::Activation activation, const at::Tensor& matrix,
                                            const at::Tensor& weight, const at::Tensor& bias,
                                            bool keeps) {
  if (activation == cuda::Activation::kGeluTanh &&
      at::isReducedFloatingType(matrix.scalar_type())) {
    const auto after = at::empty({matrix.size(0), weight.size(0)}, matrix.options());
    const auto before = keeps ? at::empty_like(after) : at::Tensor();
    if (affine_gelu_out(before, after, matrix, weight, bias)) return {before, after};
  }
  const auto before = affine(matrix, weight, bias);
  return {before, activated(activation, before)};
}

// Makes the gradient after the activation the one before it, in place. Fills `after`, the
// activation again, and `sums`, over columns of the gradient, where they are defined.
void turn_back(cuda::Activation activation, const at::Tensor& before, const at::Tensor& gradient,
               const at::Tensor& after, const at::Tensor& sums) {
  if constexpr (cuda::kBuilt) {
    cuda::ActivationBackward arguments;
    arguments.activation = activation;
    arguments.dtype = cuda::dtype_of(before);
    arguments.rows = before.size(0);
    arguments.columns = before.size(1);
    arguments.before = before.const_data_ptr();
    arguments.gradient = arguments.result = gradient.mutable_data_ptr();
    arguments.after = after.defined() ? after.mutable_data_ptr() : nullptr;
    arguments.sums = data_of(sums);
    const auto workspace = floats(before, cuda::activation_workspace(arguments));
    arguments.workspace = data_of(workspace);
    cuda::activation_backward(arguments, cuda::stream_of(before));
  }
}

at::Tensor gated(const at::Tensor& gate, const at::Tensor& up) {
  const auto after = at::empty_like(gate);
  replayable({gate, up}, {after}, [](const auto& in, const auto& out) {
    if constexpr (cuda::kBuilt) {
      const c10::DeviceGuard device(in[0].device());
      cuda::swiglu(cuda::dtype_of(in[0]), in[0].const_data_ptr(), in[1].const_data_ptr(),
                   out[0].mutable_data_ptr(), in[0].numel(), cuda::stream_of(in[0]));
    }
  });
  return after;
}

// Makes `gradient` the gate's, in place, and gives that of `up`. `sums` are both or none.
at::Tensor turn_back(const at::Tensor& gate, const at::Tensor& up, const at::Tensor& gradient,
                     const at::Tensor& after, const at::Tensor& gate_sums,
                     const at::Tensor& up_sums) {
  const auto up_gradient = at::empty_like(up);
  if constexpr (cuda::kBuilt) {
    cuda::SwigluBackward arguments;
    arguments.dtype = cuda::dtype_of(gate);
    arguments.rows = gate.size(0);
    arguments.columns = gate.size(1);
    arguments.gate = gate.const_data_ptr();
    arguments.up = up.const_data_ptr();
    arguments.gradient = arguments.gate_gradient = gradient.mutable_data_ptr();
    arguments.up_gradient = up_gradient.mutable_data_ptr();
    arguments.after = after.defined() ? after.mutable_data_ptr() : nullptr;
    arguments.gate_sums = data_of(gate_sums);
    arguments.up_sums = data_of(up_sums);
    const auto workspace = floats(gate, cuda::swiglu_workspace(arguments));
    arguments.workspace = data_of(workspace);
    cuda::swiglu_backward(arguments, cuda::stream_of(gate));
  }
  return up_gradient;
}

// ---- The autograd functions ---------------------------------------------------------------------

// What both functions keep beside tensors.
void keep(AutogradContext* ctx, const at::Tensor& input, const at::Tensor& weight, bool biases) {
  ctx->saved_data["sizes"] = input.sizes();
  ctx->saved_data["input"] = input.scalar_type();
  ctx->saved_data["parameters"] = weight.scalar_type();
  ctx->saved_data["biases"] = biases;
}

at::ScalarType kept_type(const AutogradContext& ctx, const char* of) {
  return ctx.saved_data.at(of).toScalarType();
}

// Of the forward's inputs; biases come last, for without them there are fewer inputs.
bool needs_bias(AutogradContext& ctx, size_t input) {
  return ctx.saved_data.at("biases").toBool() && ctx.needs_input_grad(input);
}

// A place for the column sums of a bias's gradient, where somebody asks for it.
at::Tensor sums_if(bool needed, const at::Tensor& matrix) {
  return needed ? floats(matrix, matrix.size(1)) : at::Tensor();
}

at::Tensor in_type(const at::Tensor& sums, at::ScalarType dtype) {
  return sums.defined() ? sums.to(dtype) : sums;
}

// fc2(act(fc1(x))).
class MLPFunction : public torch::autograd::Function<MLPFunction> {
 public:
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& input,
                            const at::Tensor& weight1, const at::Tensor& weight2,
                            const std::optional<at::Tensor>& bias1,
                            const std::optional<at::Tensor>& bias2, at::ScalarType dtype,
                            cuda::Activation activation, bool recompute, bool keeps) {
    const c10::DeviceGuard device(input.device());
    const NoAutocast no_autocast;
    const auto matrix = as_matrix(input.to(dtype));
    const auto first = working_copy(weight1, dtype), second = working_copy(weight2, dtype);
    const auto [before, after] =
        activated(activation, matrix, first, bias_copy(bias1, dtype), keeps);
    auto output = at::empty(with_last(input.sizes(), weight2.size(0)), matrix.options());
    auto rows = output.view({matrix.size(0), weight2.size(0)});
    affine_out(rows, after, second, bias_copy(bias2, dtype));
    ctx->save_for_backward({matrix, first, second, before, recompute ? at::Tensor() : after});
    keep(ctx, input, weight1, bias1.has_value());
    ctx->saved_data["activation"] = static_cast<int64_t>(activation);
    return output;
  }

  static variable_list backward(AutogradContext* ctx, variable_list gradients) {
    refuse_second_derivative(kLayer, kPlain);
    const c10::DeviceGuard device(gradients[0].device());
    const NoAutocast no_autocast;
    const auto saved = ctx->get_saved_variables();
    const auto &matrix = saved[0], &first = saved[1], &second = saved[2], &before = saved[3];
    const auto activation = static_cast<cuda::Activation>(ctx->saved_data.at("activation").toInt());
    const auto dtype = kept_type(*ctx, "parameters");
    const auto outer = as_matrix(gradients[0]);
    auto after = saved[4];
    const bool again = !after.defined() && ctx->needs_input_grad(2);
    at::Tensor inner, input, weight1, bias1, weight2, bias2;
    if (needs_bias(*ctx, 4)) bias2 = cuda::column_sum(gradients[0]).to(dtype);
    // Where the activation is wanted again, one kernel does that, the gradient and its sums.
    if (activation == cuda::Activation::kGeluTanh && !again) {
      inner = product_through_gelu(outer, second, before);
    }
    if (inner.defined()) {
      if (needs_bias(*ctx, 3)) bias1 = cuda::column_sum(inner);
    } else {
      inner = product(outer, second, outer.scalar_type());
      if (again) after = at::empty_like(before);
      bias1 = sums_if(needs_bias(*ctx, 3), before);
      turn_back(activation, before, inner, again ? after : at::Tensor(), bias1);
    }
    if (ctx->needs_input_grad(2)) weight2 = product(outer.t(), after, dtype);
    after.reset();
    if (ctx->needs_input_grad(1)) weight1 = product(inner.t(), matrix, dtype);
    if (ctx->needs_input_grad(0)) {
      input = product(inner, first, kept_type(*ctx, "input"))
                  .view(ctx->saved_data.at("sizes").toIntVector());
    }
    return {input, weight1, weight2, in_type(bias1, dtype), bias2, {}, {}, {}, {}};
  }
};

// down(silu(gate(x)) * up(x)).
class SwigluFunction : public torch::autograd::Function<SwigluFunction> {
 public:
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& input, const at::Tensor& gate_w,
                            const at::Tensor& up_w, const at::Tensor& down_w,
                            const std::optional<at::Tensor>& gate_b,
                            const std::optional<at::Tensor>& up_b,
                            const std::optional<at::Tensor>& down_b, at::ScalarType dtype,
                            bool recompute) {
    const c10::DeviceGuard device(input.device());
    const NoAutocast no_autocast;
    const auto matrix = as_matrix(input.to(dtype));
    const auto first = working_copy(gate_w, dtype), second = working_copy(up_w, dtype),
               third = working_copy(down_w, dtype);
    const auto gate = affine(matrix, first, bias_copy(gate_b, dtype));
    const auto up = affine(matrix, second, bias_copy(up_b, dtype));
    const auto after = gated(gate, up);
    auto output = at::empty(with_last(input.sizes(), down_w.size(0)), matrix.options());
    auto rows = output.view({matrix.size(0), down_w.size(0)});
    affine_out(rows, after, third, bias_copy(down_b, dtype));
    ctx->save_for_backward(
        {matrix, first, second, third, gate, up, recompute ? at::Tensor() : after});
    keep(ctx, input, gate_w, gate_b.has_value());
    return output;
  }

  static variable_list backward(AutogradContext* ctx, variable_list gradients) {
    refuse_second_derivative(kLayer, kPlain);
    const c10::DeviceGuard device(gradients[0].device());
    const NoAutocast no_autocast;
    const auto saved = ctx->get_saved_variables();
    const auto &matrix = saved[0], &gate = saved[4], &up = saved[5];
    const auto dtype = kept_type(*ctx, "parameters");
    const auto outer = as_matrix(gradients[0]);
    auto after = saved[6];
    const bool again = !after.defined() && ctx->needs_input_grad(3);
    if (again) after = at::empty_like(gate);
    at::Tensor gate_w, up_w, down_w, down_b;
    if (needs_bias(*ctx, 6)) down_b = cuda::column_sum(gradients[0]).to(dtype);
    const bool sums = needs_bias(*ctx, 4) || needs_bias(*ctx, 5);
    auto gate_b = sums_if(sums, gate), up_b = sums_if(sums, up);
    const auto gate_gradient = product(outer, saved[3], outer.scalar_type());
    const auto up_gradient =
        turn_back(gate, up, gate_gradient, again ? after : at::Tensor(), gate_b, up_b);
    if (ctx->needs_input_grad(3)) down_w = product(outer.t(), after, dtype);
    after.reset();
    if (ctx->needs_input_grad(1)) gate_w = product(gate_gradient.t(), matrix, dtype);
    if (ctx->needs_input_grad(2)) up_w = product(up_gradient.t(), matrix, dtype);
    at::Tensor input;
    if (ctx->needs_input_grad(0)) {
      input =
          input_gradient(gate_gradient, saved[1], up_gradient, saved[2], kept_type(*ctx, "input"))
              .view(ctx->saved_data.at("sizes").toIntVector());
    }
    if (!needs_bias(*ctx, 4)) gate_b.reset();
    if (!needs_bias(*ctx, 5)) up_b.reset();
    return {input,  gate_w, up_w, down_w, in_type(gate_b, dtype), in_type(up_b, dtype),
            down_b, {},     {}};
  }

 private:
  // The second product adds to the first.
  static at::Tensor input_gradient(const at::Tensor& gate_gradient, const at::Tensor& gate,
                                   const at::Tensor& up_gradient, const at::Tensor& up,
                                   at::ScalarType dtype) {
    auto result = product(gate_gradient, gate, dtype);
    add_product(result, up_gradient, up);
    return result;
  }
};

bool has_kernel(const at::Tensor& input, const at::Tensor& weight) {
  const auto dtype = compute_dtype(input);
  if (!cuda::has_dtype(dtype)) return false;
  if (weight.scalar_type() != dtype && !(is_autocast(input) && weight.scalar_type() == at::kFloat))
    return false;
  return cuda::can_run(input) && input.dim() > 0 && input.numel() > 0 &&
         input.size(-1) == weight.size(1);
}

}  // namespace

MLPImpl::MLPImpl(const MLPOptions& given) : options(given) {
  if (options.features() < 1 || options.hidden_features() < 0) {
    throw MisconfigurationError(str("MLP got ", options.features(), " features and ",
                                    options.hidden_features(),
                                    " hidden ones, expected at least 1. Write "
                                    "MLPOptions(768, 3072)."));
  }
  if (options.hidden_features() == 0) options.hidden_features(4 * options.features());
  const std::vector<std::string> known = {"gelu", "gelu_tanh", "relu", "swiglu"};
  if (std::find(known.begin(), known.end(), options.activation()) == known.end()) {
    throw MisconfigurationError(str("MLP got the activation \"", options.activation(),
                                    "\", expected one of ", join(known), ".",
                                    did_you_mean(options.activation(), known)));
  }
  if (!(options.dropout() >= 0 && options.dropout() <= 1)) {
    throw MisconfigurationError(
        str("MLP got dropout ", options.dropout(), ", expected a share between 0 and 1."));
  }
  reset();
}

void MLPImpl::reset() {
  const auto make = [&](const char* name, int64_t in, int64_t out) {
    return register_module(name, Linear(torch::nn::LinearOptions(in, out).bias(options.bias())));
  };
  const auto features = options.features(), hidden = options.hidden_features();
  if (options.activation() == "swiglu") {
    gate = make("gate", features, hidden);
    up = make("up", features, hidden);
    down = make("down", hidden, features);
  } else {
    fc1 = make("fc1", features, hidden);
    fc2 = make("fc2", hidden, features);
  }
}

void MLPImpl::pretty_print(std::ostream& stream) const {
  stream << "lightning::nn::MLP(features=" << options.features()
         << ", hidden_features=" << options.hidden_features()
         << ", activation=" << options.activation() << ", bias=" << std::boolalpha << options.bias()
         << ", dropout=" << options.dropout() << ")";
}

at::Tensor MLPImpl::composed(const at::Tensor& input) {
  if (gate) return down->forward(at::silu(gate->forward(input)) * up->forward(input));
  const auto before = fc1->forward(input);
  if (options.activation() == "relu") return fc2->forward(at::relu(before));
  return fc2->forward(at::gelu(before, options.activation() == "gelu" ? "none" : "tanh"));
}

at::Tensor MLPImpl::forward(const at::Tensor& input) {
  at::Tensor output;
  if (!has_kernel(input, gate ? gate->weight : fc1->weight)) {
    output = composed(input);
  } else if (gate) {
    output = SwigluFunction::apply(
        input, gate->weight, up->weight, down->weight, if_defined(gate->bias), if_defined(up->bias),
        if_defined(down->bias), compute_dtype(input), options.recompute());
  } else {
    output = MLPFunction::apply(input, fc1->weight, fc2->weight, if_defined(fc1->bias),
                                if_defined(fc2->bias), compute_dtype(input),
                                activation_of(options.activation()), options.recompute(),
                                at::GradMode::is_enabled());
  }
  return options.dropout() > 0 ? at::dropout(output, options.dropout(), is_training()) : output;
}

}  // namespace lightning::nn
