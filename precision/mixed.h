// Float32 parameters; matrix products and convolutions in 16 bits, by LibTorch's autocast.
// Source: Lightning 2.6, `MixedPrecision`.
#pragma once

#include <memory>
#include <optional>

#include "lightning/param/working_copy.h"
#include "lightning/precision.h"
#include "precision/grad_scaler.h"

namespace lightning {

// "bf16-mixed" and "16-mixed". Autocast holds for the run's kind of device and for the thread that
// entered the forward context; contexts may be nested.
//
// The weights' 16-bit copies are not kept between operators (as in Lightning 2.6): a kept copy
// would be wrong once the optimizer stepped inside the context, and takes memory until backward.
// Layers of lightning/nn on a GPU are the exception: they read copies that the optimizer's step
// writes (lightning/param/working_copy.h), which are let go of when the run ends.
//
// "16-mixed" has a gradient scaler. Under it an optimizer step is: closure, unscale,
// on_before_optimizer_step and clipping, the update where all gradients are finite, the next scale.
// Where training_step gave no loss, the update is left out. Where gradients are in shards, all
// processes step, or none, and their scales stay equal: one scalar is reduced in each step.
class MixedPrecision : public Precision {
 public:
  // Without a scaler of its own "16-mixed" makes one on a GPU. With one it trains in float16 on a
  // CPU too.
  // Errors: MisconfigurationError for a name other than these two, and for "bf16-mixed" with a
  // scaler.
  explicit MixedPrecision(const std::string& name, std::shared_ptr<GradScaler> scaler = nullptr);

  std::string name() const override { return name_; }
  at::ScalarType compute_dtype() const override { return dtype_; }
  GradScaler* scaler() const { return scaler_.get(); }  // null where there is none

  // On a CPU "16-mixed" without a scaler becomes "bf16-mixed", with a warning.
  // Errors: MisconfigurationError for a GPU that has no bfloat16, and for a kind of device that
  // autocast does not know.
  void set_device(c10::Device device) override;

  Batch convert_call_input(Batch input) override { return input.to_floating(dtype_); }
  // To the default dtype.
  Batch convert_output(Batch output) override;
  // Errors: c10::Error before set_device().
  Scope forward_context() override;

  at::Tensor scale_loss(at::Tensor loss) override;
  // Errors: MisconfigurationError for LBFGS under a scaler, which may leave a step out.
  at::Tensor optimizer_step(const OptimizerStep& step) override;

  // Of the scaler, under the original's name of this class.
  std::string state_key() const override { return "MixedPrecision"; }
  State state_dict() const override;
  void load_state_dict(const State& state) override;
  void teardown() override;

 private:
  at::Tensor scaled_step(const OptimizerStep& step);

  std::string name_;
  at::ScalarType dtype_;
  std::optional<c10::DeviceType> device_type_;
  std::shared_ptr<GradScaler> scaler_;
  std::unique_ptr<WorkingCopies> copies_;  // on a GPU
};

}  // namespace lightning
