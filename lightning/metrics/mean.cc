#include "lightning/metrics/mean.h"

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/isnan.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <c10/util/Exception.h>

#include <algorithm>

#include "lightning/errors.h"
#include "lightning/log.h"

namespace lightning {
namespace {

enum : size_t { kSum, kWeight };

const std::vector<std::string> kStrategies = {"warn", "ignore", "error", "disable"};

}  // namespace

Mean::Mean(MeanOptions options) : options_(std::move(options)) {
  if (const auto* name = std::get_if<std::string>(&options_.nan_strategy())) {
    if (std::count(kStrategies.begin(), kStrategies.end(), *name) == 0) {
      throw MisconfigurationError(str("Mean got nan_strategy \"", *name, "\", expected one of ",
                                      join(kStrategies), " or a number that replaces nan.",
                                      did_you_mean(*name, kStrategies)));
    }
    nan_ = *name == "disable" ? Nan::kKeep : Nan::kDrop;
  } else {
    nan_ = Nan::kReplace;
  }
  add_state("mean_value", at::zeros({}), Reduction::kSum);
  add_state("weight", at::zeros({}), Reduction::kSum);
}

void Mean::check_nan(const at::Tensor& nan) const {
  const auto* name = std::get_if<std::string>(&options_.nan_strategy());
  if (name == nullptr || *name == "ignore") return;
  if (*name == "warn" && !nan.is_cpu()) return;
  if (!nan.any().item<bool>()) return;
  if (*name == "error") {
    throw MisconfigurationError(
        lightning::str("Mean got nan in ", nan.sum().item<int64_t>(), " of ", nan.numel(),
                       " values. Find where they come from, or drop them with "
                       "nan_strategy(\"ignore\")."));
  }
  warn_once(lightning::str("Mean got nan in ", nan.sum().item<int64_t>(), " of ", nan.numel(),
                           " values and leaves such values out. nan_strategy(\"ignore\") does so "
                           "without a warning."),
            "Mean of nan");
}

void Mean::update(const at::Tensor& values, const at::Tensor& weights) {
  const at::NoGradGuard no_grad;
  follow(values);
  const auto dtype = state(kSum).scalar_type();
  at::Tensor x = values.to(dtype);
  at::Tensor w = at::ones_like(x);
  if (weights.defined()) {
    try {
      w = weights.to(x.device(), dtype).broadcast_to(x.sizes());
    } catch (const c10::Error&) {
      throw MisconfigurationError(
          lightning::str("Mean got weights of shape ", weights.sizes(), " for values of shape ",
                         values.sizes(), ". Give one weight for all or one for each value."));
    }
  }
  if (nan_ != Nan::kKeep) {
    const at::Tensor nan = at::isnan(x).logical_or(at::isnan(w));
    check_nan(nan);
    const auto* replacement = std::get_if<double>(&options_.nan_strategy());
    // A weight of 0 drops a value without learning on the host which ones they are.
    x = at::where(nan, replacement ? *replacement : 0.0, x);
    w = at::where(nan, replacement ? 1.0 : 0.0, w);
  }
  state(kSum).add_((x * w).sum());
  state(kWeight).add_(w.sum());
}

at::Tensor Mean::compute() const { return state(kSum) / state(kWeight); }

}  // namespace lightning
