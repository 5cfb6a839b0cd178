// Precisions in which the whole model is kept and computes in one dtype.
//
// Inputs that are floating point are cast to it; integers never are. While a step of the model
// runs, tensors are created in it by default. The default dtype is the program's, not the thread's:
// other threads that create tensors meanwhile see it too. Source: Lightning 2.6, `DoublePrecision`
// and `HalfPrecision`.
#pragma once

#include "lightning/precision.h"

namespace lightning {

class TruePrecision : public Precision {
 public:
  TruePrecision(std::string name, at::ScalarType dtype) : name_(std::move(name)), dtype_(dtype) {}

  std::string name() const override { return name_; }
  at::ScalarType parameter_dtype() const override { return dtype_; }

  // Parameters, buffers and gradients that are floating point; counters stay integers.
  void convert_module(torch::nn::Module& module) override;
  Batch convert_input(Batch batch) override { return batch.to_floating(dtype_); }
  Batch convert_output(Batch output) override;

  Scope forward_context() override;
  Scope module_init_context() override;
  Scope tensor_init_context() override;

 private:
  std::string name_;
  at::ScalarType dtype_;
};

// "64-true"
class DoublePrecision : public TruePrecision {
 public:
  DoublePrecision() : TruePrecision("64-true", at::kDouble) {}
};

// "16-true", without a gradient scaler, and "bf16-true".
class HalfPrecision : public TruePrecision {
 public:
  // Errors: MisconfigurationError for a name other than these two.
  explicit HalfPrecision(const std::string& name = "16-true");

  // Errors: MisconfigurationError for "bf16-true" on a GPU that has no bfloat16.
  void set_device(c10::Device device) override;
};

}  // namespace lightning
