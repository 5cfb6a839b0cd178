// In which dtypes a model is kept and computes. Holds for Trainer and Fabric alike.
// Source: Lightning 2.6, `Precision`; what each name means is in the README's table.
#pragma once

#include <c10/core/Device.h>
#include <c10/core/ScalarType.h>

#include <functional>
#include <optional>
#include <string>
#include <utility>

#include "lightning/batch.h"
#include "lightning/distributed/collectives.h"
#include "lightning/fwd.h"
#include "lightning/scope.h"

namespace lightning {

// Under which key Lightning's FSDPStrategy keeps the state of its precision, a gradient scaler's.
inline constexpr const char* kFSDPPrecisionKey = "FSDPPrecision";

// One step of an optimizer, as the loop hands it down.
struct OptimizerStep {
  torch::optim::Optimizer& optimizer;
  // training_step, zero-grad and backward, in that order; gives the loss, undefined when the step
  // was skipped. Must be run exactly once by optimizers that take one closure, and may be run
  // again by those that search (LBFGS).
  std::function<at::Tensor()> closure;
  // on_before_optimizer_step and clipping; after the closure, before the update.
  std::function<void()> after_closure;
  // In manual optimization backward ran before the closure, which then gives no loss.
  bool manual = false;
  // Not null where each process has gradients of its own (shards): what is decided by gradients is
  // decided by those of all.
  Collectives* sharers = nullptr;
};

class Precision {
 public:
  static constexpr const char* kPartKind = "precision";

  virtual ~Precision() = default;

  virtual std::string name() const = 0;  // "32-true"

  // Told once, when the run knows its device and before anything is converted. The name may change:
  // "16-mixed" becomes "bf16-mixed" on a CPU.
  // Errors: MisconfigurationError where this device cannot do it, with what can.
  virtual void set_device(c10::Device) {}

  // The dtype parameters are kept in, and the one matrix products run in.
  virtual at::ScalarType parameter_dtype() const { return at::kFloat; }
  virtual at::ScalarType compute_dtype() const { return parameter_dtype(); }
  // Bits of a parameter, for ModelSummary's estimate.
  virtual int64_t parameter_bits() const {
    return static_cast<int64_t>(c10::elementSize(parameter_dtype())) * 8;
  }

  virtual void convert_module(torch::nn::Module&) {}
  // Floating tensors of a batch, before it is moved to the device.
  virtual Batch convert_input(Batch batch) { return batch; }
  // In Fabric: what a model's method is called with, and what it gave. The mixed precisions cast
  // there, where the Trainer leaves it to autocast.
  virtual Batch convert_call_input(Batch input) { return convert_input(std::move(input)); }
  virtual Batch convert_output(Batch output) { return output; }

  // Around a step of the model: autocast, default dtype.
  virtual Scope forward_context() { return nullptr; }
  // Around the creation of modules and of tensors.
  virtual Scope module_init_context() { return nullptr; }
  virtual Scope tensor_init_context() { return nullptr; }

  // The loss that backward runs on: scaled, under a gradient scaler.
  virtual at::Tensor scale_loss(at::Tensor loss) { return loss; }

  // Runs the closure, what comes after it, and the update.
  // Returns the closure's loss.
  virtual at::Tensor optimizer_step(const OptimizerStep& step);

  // State beside the model's (a scaler's); empty where there is none, with the key it is saved
  // under.
  virtual std::string state_key() const { return ""; }
  virtual State state_dict() const;
  virtual void load_state_dict(const State&) {}
  virtual void teardown() {}
};

}  // namespace lightning
