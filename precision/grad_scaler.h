// Keeps small gradients of float16 from becoming zero: the loss is multiplied by a large factor,
// the gradients are divided by it before the optimizer sees them, and the factor is searched while
// training runs. Where a gradient is not finite, the optimizer's step is left out and the factor
// shrinks; after a number of steps without, it grows.
//
// Owned by a precision, used on the loop's thread. Nothing here waits for the device but
// get_scale(), state_dict() and step() with an optimizer that only its own step() can update.
//
// Source: torch 2.11, `torch.amp.GradScaler`; with gradients in shards
// `torch.distributed.fsdp.sharded_grad_scaler.ShardedGradScaler`.
#pragma once

#include <ATen/core/Tensor.h>

#include <map>
#include <vector>

#include "lightning/checkpoint/state.h"
#include "lightning/distributed/collectives.h"
#include "lightning/fwd.h"
#include "lightning/options.h"

namespace lightning {

class WorkingCopies;

struct GradScalerOptions : Options<GradScalerOptions> {
  OPTION(double, init_scale, 65536.0, "The factor at first.");
  OPTION(double, growth_factor, 2.0, "Multiplies the factor when it grows; above 1.");
  OPTION(double, backoff_factor, 0.5,
         "Multiplies the factor after gradients that are not finite; below 1.");
  OPTION(int64_t, growth_interval, 2000,
         "Steps in a row with finite gradients after which the factor grows.");
};

class GradScaler {
 public:
  // Errors: MisconfigurationError for a growth_factor up to 1, a backoff_factor from 1 on, an
  // init_scale or growth_interval that is not positive.
  explicit GradScaler(const GradScalerOptions& options = {});

  // The loss, multiplied; on its device, in its dtype or wider.
  at::Tensor scale(const at::Tensor& loss);

  // Divides the gradients in place, at most once between two updates. Sparse ones are taken by
  // their values.
  //   sharers   given where gradients are in shards: a gradient that is not finite on one of these
  //             processes is one on all, which all call this
  // Errors: c10::Error before the first scale() and when called twice or after step();
  // MisconfigurationError for gradients in float16.
  void unscale_(torch::optim::Optimizer& optimizer, Collectives* sharers = nullptr);

  // Unscales, where that was not done, and steps, unless a gradient is not finite; also writes the
  // copies, if given.
  // Errors: c10::Error when called twice without update(), or when no parameter has a gradient.
  void step(torch::optim::Optimizer& optimizer, WorkingCopies* copies = nullptr);

  // The factor for the next iteration, by what was found in the gradients of all optimizers.
  void update();
  // Forgets what an iteration that did not come to its end left behind.
  void abandon();

  double get_scale() const;

  // scale, growth_factor, backoff_factor, growth_interval, _growth_tracker, as Python's.
  State state_dict() const;
  // Errors: CheckpointError for an empty state, a missing key or another type.
  void load_state_dict(const State& state);

 private:
  enum class Stage { kReady, kUnscaled, kStepped };
  struct PerOptimizer {
    Stage stage = Stage::kReady;
    std::vector<at::Tensor> found_inf;  // of each device: 1 where a gradient is not finite
  };

  void check_scaled(const char* method) const;
  at::Tensor found_inf_of(const PerOptimizer& state) const;

  GradScalerOptions options_;
  int64_t first_tracker_ = 0;
  // Scalars on the device of the first loss; undefined before.
  at::Tensor scale_, growth_tracker_;
  std::map<const torch::optim::Optimizer*, PerOptimizer> optimizers_;
};

}  // namespace lightning
