#include "lightning/nn/attention.h"

#include <ATen/SDPBackend.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/_fused_sdp_choice.h>
#include <ATen/ops/_scaled_dot_product_cudnn_attention.h>
#include <ATen/ops/_scaled_dot_product_cudnn_attention_backward.h>
#include <ATen/ops/_scaled_dot_product_flash_attention.h>
#include <ATen/ops/_scaled_dot_product_flash_attention_backward.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/scaled_dot_product_attention.h>
#include <c10/core/DeviceGuard.h>
#include <torch/csrc/autograd/custom_function.h>

#include <array>
#include <vector>

#include "lightning/cuda/attention_backward.h"
#include "lightning/cuda/column_sum_of.h"
#include "lightning/cuda/launch.h"
#include "lightning/cuda/pack.h"
#include "lightning/cuda/rotary.h"
#include "lightning/nn/compute.h"
#include "lightning/param/replay.h"
#include "lightning/param/touch.h"
#include "lightning/param/working_copy.h"
#include "lightning/scope.h"

// Shapes: B batch, T time, H heads of the queries, K heads of keys and values, D head size.

namespace lightning::nn {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

struct Shape {
  int64_t batch, time, heads, kv_heads, head_size;

  int64_t rows() const { return batch * time; }
  int64_t width() const { return (heads + 2 * kv_heads) * head_size; }
};

using Heads = std::array<at::Tensor, 3>;  // of q, k and v

// The views [B, T, heads, D] of q, k and v in a packed product [B * T, (H + 2K) D].
Heads heads_of(const at::Tensor& packed, const Shape& shape) {
  const auto all =
      packed.view({shape.batch, shape.time, shape.heads + 2 * shape.kv_heads, shape.head_size});
  return {all.narrow(2, 0, shape.heads), all.narrow(2, shape.heads, shape.kv_heads),
          all.narrow(2, shape.heads + shape.kv_heads, shape.kv_heads)};
}

// The same as [B, heads, T, D], as the attention operators want them.
Heads transposed(Heads heads) {
  for (auto& one : heads) one = one.transpose(1, 2);
  return heads;
}

void rotate_in_place(const at::Tensor& packed, const Shape& shape, const at::Tensor& table) {
  replayable({table}, {packed}, [shape](const auto& in, const auto& out) {
    if constexpr (cuda::kBuilt) {
      const c10::DeviceGuard device(out[0].device());
      cuda::Rotary arguments;
      arguments.dtype = cuda::dtype_of(out[0]);
      arguments.packed = out[0].mutable_data_ptr();
      arguments.rows = shape.rows();
      arguments.time = shape.time;
      arguments.width = shape.width();
      arguments.heads = shape.heads + shape.kv_heads;
      arguments.head_size = shape.head_size;
      arguments.table = in[0].template const_data_ptr<float>();
      cuda::rotate(arguments, cuda::stream_of(out[0]));
    }
  });
}

// What backward makes of a packed gradient [B * T, (H + 2K) D], whose parts are copied into it, or
// lie there where these are undefined: it is turned back by the table where defined, and `sums`
// over its columns are filled where defined.
void pack(const Heads& parts, const at::Tensor& packed, const Shape& shape, const at::Tensor& table,
          const at::Tensor& sums) {
  if constexpr (cuda::kBuilt) {
    const auto address = [](const at::Tensor& part) {
      return part.defined() ? part.const_data_ptr() : nullptr;
    };
    cuda::PackHeads arguments;
    arguments.dtype = cuda::dtype_of(packed);
    arguments.rows = shape.rows();
    arguments.time = shape.time;
    arguments.heads = shape.heads;
    arguments.kv_heads = shape.kv_heads;
    arguments.head_size = shape.head_size;
    arguments.q = address(parts[0]);
    arguments.k = address(parts[1]);
    arguments.v = address(parts[2]);
    arguments.packed = packed.mutable_data_ptr();
    arguments.table = table.defined() ? table.const_data_ptr<float>() : nullptr;
    arguments.sums = sums.defined() ? sums.mutable_data_ptr<float>() : nullptr;
    const auto workspace = at::empty({sums.defined() ? cuda::pack_workspace(arguments) : 0},
                                     packed.options().dtype(at::kFloat));
    arguments.workspace = workspace.mutable_data_ptr<float>();
    cuda::pack_heads(arguments, cuda::stream_of(packed));
  }
}

// ---- cuDNN and flash attention ------------------------------------------------------------------

struct Core {
  at::SDPBackend backend = at::SDPBackend::error;
  bool causal = true;
  double dropout = 0;
  at::Tensor table;  // of the rotary embedding, or undefined
};

// What forward leaves for backward.
struct CoreResult {
  at::Tensor output;  // [B, H, T, D]
  at::Tensor logsumexp, seed, offset;
};

CoreResult run(const Core& core, const Heads& qkv, bool with_backward) {
  const auto& [q, k, v] = qkv;
  if (core.backend == at::SDPBackend::cudnn_attention) {
    const auto result = at::_scaled_dot_product_cudnn_attention(
        q, k, v, std::nullopt, with_backward, core.dropout, core.causal, false);
    return {std::get<0>(result), std::get<1>(result), std::get<6>(result), std::get<7>(result)};
  }
  const auto result =
      at::_scaled_dot_product_flash_attention(q, k, v, core.dropout, core.causal, false);
  return {std::get<0>(result), std::get<1>(result), std::get<6>(result), std::get<7>(result)};
}

// The gradients of q, k and v, [B, heads, T, D], from that of the output.
std::tuple<at::Tensor, at::Tensor, at::Tensor> run_backward(const Core& core,
                                                            const at::Tensor& gradient,
                                                            const Heads& qkv,
                                                            const CoreResult& forward) {
  const auto& [q, k, v] = qkv;
  const auto time = q.size(2);
  const at::Tensor none;
  if (core.backend == at::SDPBackend::cudnn_attention) {
    return at::_scaled_dot_product_cudnn_attention_backward(
        gradient, q, k, v, forward.output, forward.logsumexp, forward.seed, forward.offset, none,
        none, none, time, time, core.dropout, core.causal);
  }
  return at::_scaled_dot_product_flash_attention_backward(
      gradient, q, k, v, forward.output, forward.logsumexp, none, none, time, time, core.dropout,
      core.causal, forward.seed, forward.offset);
}

// They as one of the packed product, written there by cuDNN; undefined where it cannot.
at::Tensor run_backward_packed(const Core& core, const at::Tensor& gradient, const Heads& qkv,
                               const CoreResult& forward, const Shape& shape) {
  if (core.backend != at::SDPBackend::cudnn_attention || core.dropout > 0) return {};
  const auto packed = at::empty({shape.rows(), shape.width()}, gradient.options());
  const auto [dq, dk, dv] = transposed(heads_of(packed, shape));
  const auto& [q, k, v] = qkv;
  const bool written = cuda::attention_backward(
      {q, k, v, forward.output, forward.logsumexp, gradient, dq, dk, dv, core.causal});
  return written ? packed : at::Tensor();
}

// [B, heads, T, D] with any strides as [B, T, heads, D] without gaps. The attention operators leave
// gradients and outputs so where q, k and v are views of a packed product: then no copy.
at::Tensor in_rows(const at::Tensor& heads) { return heads.transpose(1, 2).contiguous(); }

struct PackedGradient {
  at::Tensor matrix;  // [B * T, (H + 2K) D]
  at::Tensor sums;    // over its columns, float32; undefined where nobody wants them
};

// From the gradient of the output, [B, H, T, D].
PackedGradient packed_gradient(const Core& core, const at::Tensor& gradient, const Heads& qkv,
                               const CoreResult& forward, const Shape& shape, bool with_sums) {
  auto packed = run_backward_packed(core, gradient, qkv, forward, shape);
  Heads parts;
  if (!packed.defined()) {
    const auto [q, k, v] = run_backward(core, gradient, qkv, forward);
    parts = {in_rows(q), in_rows(k), in_rows(v)};
    packed = at::empty({shape.rows(), shape.width()}, gradient.options());
  } else if (!core.table.defined()) {
    return {packed, with_sums ? cuda::column_sum(packed) : at::Tensor()};
  }
  at::Tensor sums;
  if (with_sums) sums = at::empty({shape.width()}, packed.options().dtype(at::kFloat));
  pack(parts, packed, shape, core.table, sums);
  return {packed, sums};
}

// The projection `qkv` and the attention over it: [B, T, features] to [B, T, H D].
class AttentionFunction : public torch::autograd::Function<AttentionFunction> {
 public:
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& input, const at::Tensor& weight,
                            const std::optional<at::Tensor>& bias, at::ScalarType dtype,
                            const Shape& shape, const Core& core, bool with_backward) {
    const c10::DeviceGuard device(input.device());
    const NoAutocast no_autocast;
    const auto matrix = as_matrix(input.to(dtype));
    const auto copy = working_copy(weight, dtype);
    const auto packed = affine(matrix, copy, bias_copy(bias, dtype));
    if (core.table.defined()) rotate_in_place(packed, shape, core.table);
    const auto result = run(core, transposed(heads_of(packed, shape)), with_backward);
    ctx->save_for_backward({matrix, copy, packed, core.table, result.output, result.logsumexp,
                            result.seed, result.offset});
    ctx->saved_data["input"] = input.scalar_type();
    ctx->saved_data["weight"] = weight.scalar_type();
    ctx->saved_data["bias"] = bias.has_value();
    ctx->saved_data["shape"] =
        std::vector<int64_t>{shape.batch, shape.time, shape.heads, shape.kv_heads, shape.head_size};
    ctx->saved_data["backend"] = static_cast<int64_t>(core.backend);
    ctx->saved_data["causal"] = core.causal;
    ctx->saved_data["dropout"] = core.dropout;
    return result.output.transpose(1, 2).reshape({shape.batch, shape.time, -1});
  }

  static variable_list backward(AutogradContext* ctx, variable_list gradients) {
    refuse_second_derivative("lightning::nn::Attention on a GPU",
                             "at::scaled_dot_product_attention");
    const c10::DeviceGuard device(gradients[0].device());
    const NoAutocast no_autocast;
    const auto saved = ctx->get_saved_variables();
    const auto sizes = ctx->saved_data.at("shape").toIntVector();
    const Shape shape{sizes[0], sizes[1], sizes[2], sizes[3], sizes[4]};
    const Core core{static_cast<at::SDPBackend>(ctx->saved_data.at("backend").toInt()),
                    ctx->saved_data.at("causal").toBool(), ctx->saved_data.at("dropout").toDouble(),
                    saved[3]};
    const auto outer =
        gradients[0].contiguous().view({shape.batch, shape.time, shape.heads, shape.head_size});
    const auto dtype = ctx->saved_data.at("weight").toScalarType();
    at::Tensor input, weight, bias;
    const bool with_bias = ctx->saved_data.at("bias").toBool() && ctx->needs_input_grad(2);
    const auto [packed, sums] =
        packed_gradient(core, outer.transpose(1, 2), transposed(heads_of(saved[2], shape)),
                        {saved[4], saved[5], saved[6], saved[7]}, shape, with_bias);
    if (ctx->needs_input_grad(1)) weight = product(packed.t(), saved[0], dtype);
    if (ctx->needs_input_grad(0)) {
      input = product(packed, saved[1], ctx->saved_data.at("input").toScalarType())
                  .view({shape.batch, shape.time, -1});
    }
    if (with_bias) bias = sums.to(dtype);
    return {input, weight, bias, {}, {}, {}, {}};
  }
};

// What LibTorch would run for such q, k and v: an empty product of these sizes is asked about. The
// caching allocator gives its memory to the product itself next.
at::SDPBackend backend_for(const Shape& shape, const at::Tensor& input, at::ScalarType dtype,
                           const Core& core, bool with_backward) {
  // Flash attention on some cards refuses wide heads only where it will run backward.
  const auto options =
      input.options().dtype(dtype).requires_grad(with_backward && shape.head_size > 192);
  // A region that is recorded would hold the probe to its end.
  auto* const watch = watch_operators(nullptr);
  const auto watched = scope_exit([watch] { watch_operators(watch); });
  const auto probe = at::empty({shape.rows(), shape.width()}, options);
  const auto [q, k, v] = transposed(heads_of(probe, shape));
  return static_cast<at::SDPBackend>(at::_fused_sdp_choice(q, k, v, {}, core.dropout, core.causal,
                                                           {}, shape.heads != shape.kv_heads));
}

bool has_kernel(const at::Tensor& input, const at::Tensor& weight, const Shape& shape) {
  const auto dtype = compute_dtype(input);
  const bool fits =
      weight.scalar_type() == dtype || (is_autocast(input) && weight.scalar_type() == at::kFloat);
  return fits && at::isReducedFloatingType(dtype) && cuda::can_run(input) &&
         shape.head_size % 8 == 0 && input.numel() > 0 && input.size(2) == weight.size(1);
}

void check(const AttentionOptions& options) {
  const auto heads = options.heads(), kv_heads = options.kv_heads();
  if (options.features() < 1 || heads < 1) {
    throw MisconfigurationError(str("Attention got ", options.features(), " features and ", heads,
                                    " heads, expected at least 1 of each. Write "
                                    "AttentionOptions(768, 12)."));
  }
  if (options.head_size() < 0 || (options.head_size() == 0 && options.features() % heads != 0)) {
    throw MisconfigurationError(str("Attention got ", options.features(), " features for ", heads,
                                    " heads and head_size ", options.head_size(),
                                    ", expected heads to divide features. Give a head_size where "
                                    "they do not."));
  }
  if (kv_heads < 0 || (kv_heads > 0 && heads % kv_heads != 0)) {
    throw MisconfigurationError(str("Attention got kv_heads ", kv_heads, " for ", heads,
                                    " heads, expected a divisor of heads, or 0 for as many."));
  }
  if (!(options.dropout() >= 0 && options.dropout() < 1)) {
    throw MisconfigurationError(str("Attention got dropout ", options.dropout(),
                                    ", expected a share of at least 0 and below 1."));
  }
}

}  // namespace

AttentionImpl::AttentionImpl(const AttentionOptions& given) : options(given) {
  check(options);
  if (options.kv_heads() == 0) options.kv_heads(options.heads());
  if (options.head_size() == 0) options.head_size(options.features() / options.heads());
  if (options.rotary() && (options.head_size() % 2 != 0 || options.rotary_base() <= 0)) {
    throw MisconfigurationError(str("Attention got rotary with head_size ", options.head_size(),
                                    " and rotary_base ", options.rotary_base(),
                                    ", expected an even size and a positive base."));
  }
  reset();
}

void AttentionImpl::reset() {
  const auto inner = options.heads() * options.head_size();
  const auto width = inner + 2 * options.kv_heads() * options.head_size();
  const auto linear = [&](int64_t in, int64_t out) {
    return Linear(torch::nn::LinearOptions(in, out).bias(options.bias()));
  };
  qkv = register_module("qkv", linear(options.features(), width));
  proj = register_module("proj", linear(inner, options.features()));
  rotary_ = Rotary(options.head_size(), options.rotary_base());
}

void AttentionImpl::pretty_print(std::ostream& stream) const {
  stream << "lightning::nn::Attention(features=" << options.features()
         << ", heads=" << options.heads() << ", kv_heads=" << options.kv_heads()
         << ", head_size=" << options.head_size() << std::boolalpha << ", bias=" << options.bias()
         << ", causal=" << options.causal() << ", rotary=" << options.rotary()
         << ", dropout=" << options.dropout() << ")";
}

at::Tensor AttentionImpl::composed(const at::Tensor& input, const at::Tensor& table) {
  const Shape shape{input.size(0), input.size(1), options.heads(), options.kv_heads(),
                    options.head_size()};
  auto heads = heads_of(as_matrix(qkv->forward(input)), shape);
  if (table.defined()) {
    heads[0] = rotate(heads[0], table);
    heads[1] = rotate(heads[1], table);
  }
  const auto [q, k, v] = transposed(heads);
  const auto output =
      at::scaled_dot_product_attention(q, k, v, {}, is_training() ? options.dropout() : 0.0,
                                       options.causal(), {}, options.heads() != options.kv_heads());
  return proj->forward(output.transpose(1, 2).reshape(
      {shape.batch, shape.time, options.heads() * options.head_size()}));
}

at::Tensor AttentionImpl::forward(const at::Tensor& input) {
  TORCH_CHECK(input.dim() == 3 && input.size(2) == options.features(), "Attention got an input of ",
              input.sizes(), ", expected [batch, time, ", options.features(), "].");
  const Shape shape{input.size(0), input.size(1), options.heads(), options.kv_heads(),
                    options.head_size()};
  const auto dtype = compute_dtype(input);
  at::Tensor table;
  if (options.rotary()) {
    table =
        rotary_.table(shape.time, input.device(), dtype == at::kDouble ? at::kDouble : at::kFloat);
  }
  if (has_kernel(input, qkv->weight, shape)) {
    const c10::DeviceGuard device(input.device());
    const bool with_backward =
        at::GradMode::is_enabled() && (input.requires_grad() || qkv->weight.requires_grad() ||
                                       (qkv->bias.defined() && qkv->bias.requires_grad()));
    Core core{at::SDPBackend::error, options.causal(), is_training() ? options.dropout() : 0.0,
              table};
    core.backend = backend_for(shape, input, dtype, core, with_backward);
    if (core.backend == at::SDPBackend::cudnn_attention ||
        core.backend == at::SDPBackend::flash_attention) {
      return proj->forward(AttentionFunction::apply(input, qkv->weight, if_defined(qkv->bias),
                                                    dtype, shape, core, with_backward));
    }
  }
  return composed(input, table);
}

}  // namespace lightning::nn
