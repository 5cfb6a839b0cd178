// Float32 parameters; matrix products and convolutions in 16 bits, by LibTorch's autocast.
// Source: Lightning 2.6, `MixedPrecision`.
#pragma once

#include <optional>

#include "lightning/precision.h"

namespace lightning {

// "bf16-mixed" and "16-mixed". Autocast holds for the run's kind of device and for the thread that
// entered the forward context; contexts may be nested.
//
// The weights' 16-bit copies are not kept between operators (as in Lightning 2.6): a kept copy
// would be wrong once the optimizer stepped inside the context, and takes memory until backward.
class MixedPrecision : public Precision {
 public:
  // Errors: MisconfigurationError for a name other than these two.
  explicit MixedPrecision(const std::string& name);

  std::string name() const override { return name_; }
  at::ScalarType compute_dtype() const override { return dtype_; }

  // On a CPU "16-mixed" becomes "bf16-mixed", with a warning.
  // Errors: MisconfigurationError for "16-mixed" on a GPU, whose gradient scaler is not built yet,
  // and for a kind of device that autocast does not know.
  void set_device(c10::Device device) override;

  Batch convert_call_input(Batch input) override { return input.to_floating(dtype_); }
  // To the default dtype.
  Batch convert_output(Batch output) override;
  // Errors: c10::Error before set_device().
  Scope forward_context() override;

 private:
  std::string name_;
  at::ScalarType dtype_;
  std::optional<c10::DeviceType> device_type_;
};

}  // namespace lightning
