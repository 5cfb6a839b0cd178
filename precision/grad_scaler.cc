#include "precision/grad_scaler.h"

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/_amp_foreach_non_finite_check_and_unscale.h>
#include <ATen/ops/_amp_update_scale.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <c10/util/Exception.h>
#include <torch/optim/optimizer.h>

#include <utility>
#include <vector>

#include "lightning/errors.h"
#include "lightning/optim/fused_step.h"

namespace lightning {
namespace {

void check(bool fits, const char* name, double value, const char* expected) {
  if (fits) return;
  throw MisconfigurationError(
      str("GradScaler got ", name, "=", value, ", expected ", expected, "."));
}

// Gradients of one device and dtype, as the operator takes them.
using Gradients = std::vector<std::vector<at::Tensor>>;

void add(Gradients& all, at::Tensor gradient) {
  for (auto& list : all) {
    if (list[0].device() != gradient.device() || list[0].scalar_type() != gradient.scalar_type()) {
      continue;
    }
    list.push_back(std::move(gradient));
    return;
  }
  all.push_back({std::move(gradient)});
}

Gradients gradients_of(torch::optim::Optimizer& optimizer) {
  Gradients all;
  for (auto& group : optimizer.param_groups()) {
    for (auto& parameter : group.params()) {
      const at::Tensor& gradient = parameter.grad();
      if (!gradient.defined()) continue;
      if (gradient.scalar_type() == at::kHalf) {
        throw MisconfigurationError(
            str("The gradient scaler got a gradient in float16, of a parameter of shape ",
                parameter.sizes(),
                ". It divides gradients in float32 or bfloat16: keep the parameters in float32, or "
                "train in \"16-true\", which scales nothing."));
      }
      add(all, gradient.is_sparse() ? gradient._values() : gradient);
    }
  }
  return all;
}

// The one of this device; made where there is none.
at::Tensor& of_device(std::vector<at::Tensor>& found_inf, const at::Tensor& like) {
  for (auto& found : found_inf) {
    if (found.device() == like.device()) return found;
  }
  return found_inf.emplace_back(at::zeros({}, like.options().dtype(at::kFloat)));
}

}  // namespace

GradScaler::GradScaler(const GradScalerOptions& options) : options_(options) {
  check(options.init_scale() > 0, "init_scale", options.init_scale(), "a factor above 0");
  check(options.growth_factor() > 1, "growth_factor", options.growth_factor(), "one above 1");
  check(options.backoff_factor() > 0 && options.backoff_factor() < 1, "backoff_factor",
        options.backoff_factor(), "one between 0 and 1");
  check(options.growth_interval() > 0, "growth_interval",
        static_cast<double>(options.growth_interval()), "1 step or more");
}

void GradScaler::check_scaled(const char* method) const {
  TORCH_CHECK(scale_.defined(), "GradScaler::", method,
              " was called before any loss was scaled. Run backward on scale(loss) first.");
}

at::Tensor GradScaler::scale(const at::Tensor& loss) {
  if (!scale_.defined()) {
    const auto here = at::TensorOptions().device(loss.device());
    scale_ = at::full({}, options_.init_scale(), here.dtype(at::kFloat));
    growth_tracker_ = at::full({}, first_tracker_, here.dtype(at::kInt));
  }
  return loss * scale_.to(loss.device(), /*non_blocking=*/true);
}

void GradScaler::unscale_(torch::optim::Optimizer& optimizer, Collectives* sharers) {
  check_scaled("unscale_");
  auto& state = optimizers_[&optimizer];
  TORCH_CHECK(state.stage == Stage::kReady, "GradScaler::unscale_ was called ",
              state.stage == Stage::kUnscaled ? "a second time" : "after step()",
              " for an optimizer. Call update() in between.");
  const at::NoGradGuard no_grad;
  // By way of float64, as Python does.
  const auto inverse = scale_.to(at::kDouble).reciprocal().to(at::kFloat);
  for (const auto& list : gradients_of(optimizer)) {
    // A copy to the host that nobody waits for is read before it is there.
    const auto device = list[0].device();
    at::_amp_foreach_non_finite_check_and_unscale_(
        list, of_device(state.found_inf, list[0]),
        inverse.to(device, /*non_blocking=*/!device.is_cpu()));
  }
  if (sharers != nullptr) {
    // The shards of a process may all be empty.
    const auto own = found_inf_of(state);
    const auto none = at::zeros_like(scale_);
    state.found_inf = {sharers->reduce(own.defined() ? own : none, ReduceOp::kMax)};
  }
  state.stage = Stage::kUnscaled;
}

at::Tensor GradScaler::found_inf_of(const PerOptimizer& state) const {
  at::Tensor sum;
  for (const auto& found : state.found_inf) {
    const auto here = found.to(scale_.device(), /*non_blocking=*/true);
    sum = sum.defined() ? sum + here : here;
  }
  return sum;
}

void GradScaler::step(torch::optim::Optimizer& optimizer, WorkingCopies* copies) {
  check_scaled("step");
  auto& state = optimizers_[&optimizer];
  TORCH_CHECK(state.stage != Stage::kStepped,
              "GradScaler::step was called a second time for an optimizer. Call update() in "
              "between.");
  if (state.stage == Stage::kReady) unscale_(optimizer);
  const auto found_inf = found_inf_of(state);
  TORCH_CHECK(found_inf.defined(),
              "GradScaler::step got an optimizer without a single gradient, so there is nothing to "
              "check. Does the loss reach its parameters, and do they require gradients?");
  StepAids aids;
  aids.copies = copies;
  aids.found_inf = found_inf;
  fused_step(optimizer, nullptr, aids);
  state.stage = Stage::kStepped;
}

void GradScaler::update() {
  check_scaled("update");
  const at::NoGradGuard no_grad;
  at::Tensor sum;
  for (const auto& item : optimizers_) {
    const auto found = found_inf_of(item.second);
    if (found.defined()) sum = sum.defined() ? sum + found : found;
  }
  TORCH_CHECK(sum.defined(),
              "GradScaler::update was called without step() or unscale_() since the last update.");
  at::_amp_update_scale_(scale_, growth_tracker_, sum, options_.growth_factor(),
                         options_.backoff_factor(), options_.growth_interval());
  optimizers_.clear();
}

void GradScaler::abandon() { optimizers_.clear(); }

double GradScaler::get_scale() const {
  return scale_.defined() ? scale_.item().toDouble() : options_.init_scale();
}

State GradScaler::state_dict() const {
  const int64_t tracker =
      growth_tracker_.defined() ? growth_tracker_.item().toLong() : first_tracker_;
  return State::dict({{"scale", get_scale()},
                      {"growth_factor", options_.growth_factor()},
                      {"backoff_factor", options_.backoff_factor()},
                      {"growth_interval", options_.growth_interval()},
                      {"_growth_tracker", tracker}});
}

void GradScaler::load_state_dict(const State& state) {
  if (state.empty()) {
    throw CheckpointError(
        "The state of the gradient scaler is empty, as that of a scaler which was switched off. "
        "Train on without it, or from a checkpoint that has one.");
  }
  auto read = options_;
  read.init_scale(state.at("scale").as_double())
      .growth_factor(state.at("growth_factor").as_double())
      .backoff_factor(state.at("backoff_factor").as_double())
      .growth_interval(state.at("growth_interval").as_int());
  first_tracker_ = state.at("_growth_tracker").as_int();
  options_ = read;
  if (!scale_.defined()) return;
  scale_.fill_(options_.init_scale());
  growth_tracker_.fill_(first_tracker_);
}

}  // namespace lightning
