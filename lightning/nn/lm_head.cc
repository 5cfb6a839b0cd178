#include "lightning/nn/lm_head.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/mul.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <ostream>

#include "lightning/cuda/column_sum_of.h"
#include "lightning/nn/compute.h"
#include "lightning/nn/copy_parameters.h"
#include "lightning/nn/cross_entropy.h"
#include "lightning/nn/exp_losses.h"
#include "lightning/nn/last_use.h"
#include "lightning/nn/linear.h"
#include "lightning/param/working_copy.h"

namespace lightning::nn {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// What one computation of losses reads: hidden [N, C], weight [V, C] and bias [V] or none, all in
// the dtype of the logits.
struct Inputs {
  at::Tensor hidden, weight, bias;

  at::Tensor logits(int64_t first, int64_t rows) const {
    const auto part = hidden.narrow(0, first, rows);
    return affine(part, weight, bias);
  }
};

struct Wanted {
  bool hidden = false, weight = false, bias = false;
  bool any() const { return hidden || weight || bias; }
};

RowTargets narrowed(const RowTargets& targets, int64_t first, int64_t rows) {
  return {targets.classes.narrow(0, first, rows), targets.ignore_index, targets.label_smoothing};
}

// Calls f(first, rows) for each chunk; once where there are no rows, so that results exist.
template <class F>
void for_chunks(int64_t rows, int64_t chunk_rows, const F& f) {
  int64_t first = 0;
  do {
    const auto now = chunk_rows > 0 ? std::min(chunk_rows, rows - first) : rows;
    f(first, now);
    first += now;
  } while (first < rows);
}

// The gradients of the inputs, in the dtype of the loss, but for the factor that all share.
struct Products {
  Wanted wanted;
  at::Tensor hidden, weight, bias;

  // Adds what the gradient [n, V] of the logits of rows first to first + n contributes.
  void add(const Inputs& inputs, const at::Tensor& gradient, int64_t first) {
    const auto dtype = loss_dtype(gradient.scalar_type());
    if (wanted.hidden) {
      const auto part = product(gradient, inputs.weight, dtype);
      // Saved without the input where the weight is frozen: then there is one chunk.
      if (!inputs.hidden.defined() || inputs.hidden.size(0) == part.size(0)) {
        hidden = part;
      } else {
        if (!hidden.defined()) hidden = at::empty(inputs.hidden.sizes(), part.options());
        hidden.narrow(0, first, part.size(0)).copy_(part);
      }
    }
    if (wanted.weight) {
      const auto part = inputs.hidden.narrow(0, first, gradient.size(0));
      if (weight.defined()) {
        add_product(weight, gradient.t(), part);
      } else {
        weight = product(gradient.t(), part, dtype);
      }
    }
    if (wanted.bias) accumulate(bias, cuda::column_sum(gradient));
  }

 private:
  static void accumulate(at::Tensor& sum, const at::Tensor& part) {
    if (sum.defined()) {
      sum.add_(part);
    } else {
      sum = part;
    }
  }
};

// value * factor in another dtype, rounded once; over the value where that is allowed.
at::Tensor scaled(const at::Tensor& value, const at::Tensor& factor, at::ScalarType dtype,
                  bool may_overwrite) {
  if (value.scalar_type() == dtype && may_overwrite) return value.mul_(factor);
  auto result = at::empty(value.sizes(), value.options().dtype(dtype));
  at::mul_out(result, value, factor);
  return result;
}

// What backward has of the logits: nothing where it computes them again, or where there is none;
// themselves, for losses that are not reduced, whose own gradients differ from row to row; their
// unscaled gradient, with scales of its rows where these are not 1; or the products of that.
enum class Kept { kNothing, kLogits, kGradient, kProducts };

struct Settings {
  RowTargets targets;
  Reduction reduction = Reduction::kMean;
  at::ScalarType dtype = at::kFloat;  // of the logits
  int64_t chunk_rows = 0;
  Kept kept = Kept::kNothing;
};

Kept what_to_keep(Reduction reduction, bool in_chunks, bool with_gradient) {
  if (!with_gradient) return Kept::kNothing;
  if (reduction == Reduction::kNone) return in_chunks ? Kept::kNothing : Kept::kLogits;
  return in_chunks ? Kept::kProducts : Kept::kGradient;
}

// Where save_for_backward() has what; kProducts has the products in the inputs' places.
enum Slot : size_t {
  kFactor,
  kHidden,
  kWeight,
  kBias,
  kClasses,
  kRows,
  kScales,
  kStatistics,
  kSlots
};

class LMHeadFunction : public torch::autograd::Function<LMHeadFunction> {
 public:
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& hidden,
                            const at::Tensor& weight, const std::optional<at::Tensor>& added,
                            const Settings& settings) {
    const NoAutocast no_autocast;
    const auto bias = added.value_or(at::Tensor());
    const Inputs inputs{hidden.to(settings.dtype), working_copy(weight, settings.dtype),
                        bias.defined() ? working_copy(bias, settings.dtype) : at::Tensor()};
    const Wanted wanted{hidden.requires_grad(), weight.requires_grad(),
                        bias.defined() && bias.requires_grad()};
    variable_list saved(kSlots);
    const auto losses = losses_of(inputs, settings, wanted, saved);
    ReducedLoss result{losses, {}};
    if (settings.reduction != Reduction::kNone) {
      result = reduced(losses, settings.targets, settings.reduction);
    }
    saved[kFactor] = result.factor;
    if (settings.kept != Kept::kProducts) {
      if (wanted.weight || settings.kept == Kept::kNothing) saved[kHidden] = inputs.hidden;
      if (wanted.hidden || settings.kept == Kept::kNothing) saved[kWeight] = inputs.weight;
      if (settings.kept == Kept::kNothing) saved[kBias] = inputs.bias;
      saved[kClasses] = settings.targets.classes;
    }
    ctx->save_for_backward(std::move(saved));
    ctx->saved_data["kept"] = static_cast<int64_t>(settings.kept);
    ctx->saved_data["ignore_index"] = settings.targets.ignore_index;
    ctx->saved_data["label_smoothing"] = settings.targets.label_smoothing;
    ctx->saved_data["chunk_rows"] = settings.chunk_rows;
    ctx->saved_data["hooked"] = has_saved_tensor_hooks();
    ctx->saved_data["hidden"] = hidden.scalar_type();
    ctx->saved_data["weight"] = weight.scalar_type();
    if (bias.defined()) ctx->saved_data["bias"] = bias.scalar_type();
    return result.loss;
  }

  static variable_list backward(AutogradContext* ctx, variable_list gradients) {
    refuse_second_derivative("lightning::nn::LMHead's loss",
                             "forward() and torch::nn::functional::cross_entropy");
    const NoAutocast no_autocast;
    const auto saved = ctx->get_saved_variables();
    const bool has_bias = ctx->saved_data.count("bias") > 0;
    const Wanted wanted{ctx->needs_input_grad(0), ctx->needs_input_grad(1),
                        has_bias && ctx->needs_input_grad(2)};
    const auto& upstream = gradients[0];
    bool may_overwrite = true;
    at::Tensor factor;
    Products products{wanted, {}, {}, {}};
    if (saved[kFactor].defined()) {
      factor = upstream * saved[kFactor];
      if (kept_in(ctx) == Kept::kGradient) return of_gradient(ctx, saved, wanted, factor);
      products = of_products(ctx, saved, wanted, may_overwrite);
    } else {
      // The largest row's factor is applied in the end: 16 bits hold what the others are of it.
      factor = upstream.numel() == 0
                   ? upstream.sum()
                   : upstream.abs().max().clamp_min(std::numeric_limits<float>::min());
      products = of_rows(ctx, saved, wanted, upstream / factor);
    }
    const auto result = [&](const at::Tensor& value, const char* of) {
      if (!value.defined()) return at::Tensor();
      return scaled(value, factor, ctx->saved_data.at(of).toScalarType(), may_overwrite);
    };
    return {result(products.hidden, "hidden"), result(products.weight, "weight"),
            result(products.bias, "bias"), at::Tensor()};
  }

 private:
  static at::Tensor losses_of(const Inputs& inputs, const Settings& settings, const Wanted& wanted,
                              variable_list& saved) {
    const auto rows = inputs.hidden.size(0);
    const auto kept = settings.kept;
    if (kept == Kept::kGradient && !inputs.bias.defined()) {
      if (const auto result = exp_losses(inputs.hidden, inputs.weight, settings.targets)) {
        saved[kRows] = result->gradient;
        saved[kScales] = result->scales;
        return result->losses;
      }
    }
    Products products{wanted, {}, {}, {}};
    at::Tensor losses;
    for_chunks(rows, settings.chunk_rows, [&](int64_t first, int64_t now) {
      const auto targets = narrowed(settings.targets, first, now);
      const auto logits = inputs.logits(first, now);
      RowLosses part;
      if (kept == Kept::kGradient || kept == Kept::kProducts) {
        part.losses = cross_entropy_rows_in_place(logits, targets);
      } else {
        part = cross_entropy_rows(logits, targets);
      }
      if (kept == Kept::kProducts) products.add(inputs, logits, first);
      if (kept == Kept::kGradient || kept == Kept::kLogits) saved[kRows] = logits;
      if (kept == Kept::kLogits) saved[kStatistics] = part.statistics;
      if (now == rows) {
        losses = part.losses;
      } else {
        if (!losses.defined()) losses = at::empty({rows}, part.losses.options());
        losses.narrow(0, first, now).copy_(part.losses);
      }
    });
    if (kept == Kept::kProducts) {
      saved[kHidden] = products.hidden;
      saved[kWeight] = products.weight;
      saved[kBias] = products.bias;
    }
    return losses;
  }

  // Of a loss that is a sum or a mean: the results, from the logits' gradient but for the factor.
  static variable_list of_gradient(AutogradContext* ctx, const variable_list& saved,
                                   const Wanted& wanted, const at::Tensor& factor) {
    const auto& rows = saved[kRows];
    const auto dtype = [&](const char* of) { return ctx->saved_data.at(of).toScalarType(); };
    const auto& scales = saved[kScales];
    at::Tensor hidden, weight, bias;
    if (wanted.hidden) {
      // Before its rows are scaled a product may be too large for float16.
      const bool wide = scales.defined() && dtype("hidden") == at::kHalf;
      hidden = scaled_product(factor, rows, saved[kWeight], wide ? at::kFloat : dtype("hidden"));
      if (scales.defined()) scale_rows_out(hidden, hidden, scales);
      if (wide) hidden = hidden.to(at::kHalf);
    }
    if (wanted.weight) {
      auto inputs = saved[kHidden];
      if (scales.defined()) {
        inputs = at::empty_like(inputs);
        scale_rows_out(inputs, saved[kHidden], scales);
      }
      weight = scaled_product(factor, rows.t(), inputs, dtype("weight"));
    }
    if (wanted.bias) bias = cuda::column_sum(rows).mul_(factor).to(dtype("bias"));
    return {hidden, weight, bias, at::Tensor()};
  }

  // Of a loss that is a sum or a mean, from what forward made of chunks; what is `may_overwrite`
  // stays so, if nobody has them.
  static Products of_products(AutogradContext* ctx, const variable_list& saved,
                              const Wanted& wanted, bool& may_overwrite) {
    Products products{wanted, {}, {}, {}};
    const bool hooked = ctx->saved_data.at("hooked").toBool();
    const auto take = [&](Slot slot, bool is_wanted, at::Tensor& to) {
      if (!is_wanted) return;
      may_overwrite = may_overwrite && is_last_use(saved[slot], hooked);
      to = saved[slot];
    };
    take(kHidden, wanted.hidden, products.hidden);
    take(kWeight, wanted.weight, products.weight);
    take(kBias, wanted.bias, products.bias);
    return products;
  }

  // Of losses that are not reduced.
  //
  //   upstream  [N], their gradients
  static Products of_rows(AutogradContext* ctx, const variable_list& saved, const Wanted& wanted,
                          const at::Tensor& upstream) {
    Products products{wanted, {}, {}, {}};
    const Inputs inputs{saved[kHidden], saved[kWeight], saved[kBias]};
    const RowTargets targets{saved[kClasses], ctx->saved_data.at("ignore_index").toInt(),
                             ctx->saved_data.at("label_smoothing").toDouble()};
    if (kept_in(ctx) == Kept::kLogits) {
      const auto& logits = saved[kRows];
      const bool over = is_last_use(logits, ctx->saved_data.at("hooked").toBool());
      const auto into = over ? logits : at::empty_like(logits);
      cross_entropy_gradient(logits, {{}, saved[kStatistics]}, targets, {upstream, {}}, into);
      products.add(inputs, into, 0);
      return products;
    }
    const auto chunk_rows = ctx->saved_data.at("chunk_rows").toInt();
    for_chunks(inputs.hidden.size(0), chunk_rows, [&](int64_t first, int64_t now) {
      const auto logits = inputs.logits(first, now);
      const auto part = narrowed(targets, first, now);
      const auto forward = cross_entropy_rows(logits, part);
      cross_entropy_gradient(logits, forward, part, {upstream.narrow(0, first, now), {}}, logits);
      products.add(inputs, logits, first);
    });
    return products;
  }

  static Kept kept_in(AutogradContext* ctx) {
    return static_cast<Kept>(ctx->saved_data.at("kept").toInt());
  }
};

// Of the same sizes but without the last one.
bool fits(const at::Tensor& target, const at::Tensor& hidden) {
  return hidden.dim() > 0 && target.sizes() == hidden.sizes().slice(0, hidden.dim() - 1);
}

at::ScalarType logits_dtype(const at::Tensor& hidden, const at::Tensor& weight) {
  const auto dtype = compute_dtype(hidden);
  TORCH_CHECK(
      is_autocast(hidden) ? weight.scalar_type() != at::kDouble : weight.scalar_type() == dtype,
      "LMHead got an input of ", hidden.scalar_type(), " for a weight of ", weight.scalar_type(),
      ", expected one dtype, or autocast.");
  return dtype;
}

}  // namespace

LMHeadImpl::LMHeadImpl(const LMHeadOptions& options)
    : torch::nn::LinearImpl(torch::nn::LinearOptions(options.in_features(), options.out_features())
                                .bias(options.bias())),
      chunk_rows_(options.chunk_rows()) {
  TORCH_CHECK(chunk_rows_ >= 0, "LMHead got chunk_rows ", chunk_rows_,
              ", expected a number of rows, or 0 for all.");
}

// Born without rows, so that nothing is drawn for a weight that is not used.
LMHeadImpl::LMHeadImpl(const at::Tensor& weight)
    : LMHeadImpl(LMHeadOptions(weight.dim() == 2 ? weight.size(1) : 1, 0)) {
  TORCH_CHECK(weight.dim() == 2, "LMHead got a weight of ", weight.sizes(),
              ", expected [out_features, in_features].");
  options.out_features(weight.size(0));
  tie(weight);
}

void LMHeadImpl::tie(const at::Tensor& shared) {
  TORCH_CHECK(shared.dim() == 2 && shared.size(0) == options.out_features() &&
                  shared.size(1) == options.in_features(),
              "LMHead of [", options.out_features(), ", ", options.in_features(),
              "] cannot be tied to a weight of ", shared.sizes(), ".");
  weight = shared;
  parameters_["weight"] = shared;
}

void LMHeadImpl::check_registered() const {
  TORCH_CHECK(weight.is_same(parameters_["weight"]),
              "LMHead's member `weight` was assigned, but another tensor is registered: "
              "checkpoints and optimizers would have that one. Share a weight with "
              "tie(embedding->weight), or construct LMHead(embedding->weight).");
}

at::Tensor LMHeadImpl::forward(const at::Tensor& hidden) {
  check_registered();
  return linear(hidden, weight, bias);
}

at::Tensor LMHeadImpl::loss(const at::Tensor& hidden, const at::Tensor& target,
                            const torch::nn::CrossEntropyLossOptions& options) {
  check_registered();
  const bool plain = needs_plain(target, options);
  const auto& per_class = target.is_floating_point() ? target.select(-1, 0) : target;
  TORCH_CHECK(fits(per_class, hidden), "LMHead's loss got an input of ", hidden.sizes(),
              " and a target of ", target.sizes(), ", expected a class for each row: ",
              hidden.dim() > 0 ? hidden.sizes().slice(0, hidden.dim() - 1) : hidden.sizes(), ".");
  const auto reduction = reduction_of(options);
  at::Tensor loss;
  if (plain) {
    TORCH_CHECK(chunk_rows_ == 0, "LMHead with chunk_rows ", chunk_rows_,
                " has no loss for class weights or probabilities as the target, which need all "
                "logits at once. Leave chunk_rows at 0.");
    const auto rows = target.is_floating_point() ? as_matrix(target) : target.reshape({-1});
    loss = fused_cross_entropy(as_matrix(forward(hidden)), rows, options);
  } else {
    TORCH_CHECK(hidden.size(-1) == weight.size(1), "LMHead got an input of ", hidden.sizes(),
                " for a weight of ", weight.sizes(),
                " [out_features, in_features]; the input's last size must be in_features.");
    Settings settings;
    settings.targets = row_targets(target, hidden.device(), options);
    settings.reduction = reduction;
    settings.dtype = logits_dtype(hidden, weight);
    settings.chunk_rows = chunk_rows_;
    const bool with_gradient =
        at::GradMode::is_enabled() && (hidden.requires_grad() || weight.requires_grad() ||
                                       (bias.defined() && bias.requires_grad()));
    settings.kept =
        what_to_keep(reduction, chunk_rows_ > 0 && chunk_rows_ < target.numel(), with_gradient);
    loss =
        LMHeadFunction::apply(as_matrix(hidden), weight,
                              bias.defined() ? std::make_optional(bias) : std::nullopt, settings);
  }
  return reduction == Reduction::kNone ? loss.view(per_class.sizes()) : loss;
}

std::shared_ptr<torch::nn::Module> LMHeadImpl::clone(
    const std::optional<torch::Device>& device) const {
  auto copy =
      std::make_shared<LMHeadImpl>(LMHeadOptions(options.in_features(), options.out_features())
                                       .bias(options.bias())
                                       .chunk_rows(chunk_rows_));
  copy_parameters(*this, *copy, device);
  return copy;
}

void LMHeadImpl::pretty_print(std::ostream& stream) const {
  stream << std::boolalpha << "lightning::nn::LMHead(in_features=" << options.in_features()
         << ", out_features=" << options.out_features() << ", bias=" << options.bias() << ")";
}

}  // namespace lightning::nn
