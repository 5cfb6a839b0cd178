#include "precision/mixed.h"

#include <ATen/autocast_mode.h>
#include <c10/core/DefaultDtype.h>
#include <c10/util/Exception.h>
#include <torch/optim/lbfgs.h>

#include <utility>

#include "lightning/errors.h"
#include "lightning/log.h"
#include "lightning/optim/fused_step.h"
#include "lightning/registry.h"
#include "precision/bf16_support.h"

namespace lightning {
namespace {

// Autocast on, for the thread that made it. Source: torch 2.11, `torch.autocast`.
class AutocastGuard {
 public:
  AutocastGuard(c10::DeviceType device, at::ScalarType dtype)
      : device_(device),
        was_enabled_(at::autocast::is_autocast_enabled(device)),
        was_dtype_(at::autocast::get_autocast_dtype(device)),
        was_cached_(at::autocast::is_autocast_cache_enabled()) {
    at::autocast::set_autocast_enabled(device, true);
    at::autocast::set_autocast_dtype(device, dtype);
    at::autocast::increment_nesting();
    at::autocast::set_autocast_cache_enabled(false);
  }
  ~AutocastGuard() {
    // Casts that a surrounding context keeps stay until the outermost one ends.
    if (at::autocast::decrement_nesting() == 0) at::autocast::clear_cache();
    at::autocast::set_autocast_enabled(device_, was_enabled_);
    at::autocast::set_autocast_dtype(device_, was_dtype_);
    at::autocast::set_autocast_cache_enabled(was_cached_);
  }
  AutocastGuard(const AutocastGuard&) = delete;
  AutocastGuard& operator=(const AutocastGuard&) = delete;

 private:
  c10::DeviceType device_;
  bool was_enabled_;
  at::ScalarType was_dtype_;
  bool was_cached_;
};

}  // namespace

MixedPrecision::MixedPrecision(const std::string& name, std::shared_ptr<GradScaler> scaler)
    : name_(name),
      dtype_(name == "bf16-mixed" ? at::kBFloat16 : at::kHalf),
      scaler_(std::move(scaler)) {
  if (name != "16-mixed" && name != "bf16-mixed") {
    throw MisconfigurationError(
        str("MixedPrecision got \"", name, "\", expected \"16-mixed\" or \"bf16-mixed\"."));
  }
  if (scaler_ != nullptr && name == "bf16-mixed") {
    throw MisconfigurationError(
        "MixedPrecision got \"bf16-mixed\" and a gradient scaler, which bfloat16 does not need: it "
        "has the range of float32. Leave the scaler out, or use \"16-mixed\".");
  }
}

void MixedPrecision::set_device(c10::Device device) {
  if (!device.is_cpu() && !device.is_cuda()) {
    throw MisconfigurationError(str("precision \"", name_, "\" got the device ", device,
                                    ", expected cpu or cuda. Use \"32-true\" there."));
  }
  if (name_ == "16-mixed" && scaler_ == nullptr && device.is_cpu()) {
    warn(
        "You passed `Trainer(accelerator='cpu', precision='16-mixed')` but AMP with fp16 is not "
        "supported on CPU. Using `precision='bf16-mixed'` instead.");
    name_ = "bf16-mixed";
    dtype_ = at::kBFloat16;
  }
  if (dtype_ == at::kBFloat16) check_bf16(name_, "\"16-mixed\" or \"32-true\"", device);
  if (dtype_ == at::kHalf && scaler_ == nullptr) scaler_ = std::make_shared<GradScaler>();
  copies_ = device.is_cuda() ? std::make_unique<WorkingCopies>(dtype_) : nullptr;
  device_type_ = device.type();
  info(str("Using ", dtype_ == at::kHalf ? "16bit" : "bfloat16",
           " Automatic Mixed Precision (AMP)"));
}

Batch MixedPrecision::convert_output(Batch output) {
  return output.to_floating(c10::get_default_dtype_as_scalartype());
}

Scope MixedPrecision::forward_context() {
  TORCH_CHECK(device_type_,
              "MixedPrecision was asked for its forward context before "
              "set_device() told it for which kind of device.");
  if (copies_ == nullptr) return make_scope<AutocastGuard>(*device_type_, dtype_);
  return make_scope<std::pair<Scope, AutocastGuard>>(
      std::piecewise_construct, std::forward_as_tuple(WorkingCopies::use(copies_.get())),
      std::forward_as_tuple(*device_type_, dtype_));
}

at::Tensor MixedPrecision::scale_loss(at::Tensor loss) {
  return scaler_ != nullptr ? scaler_->scale(loss) : loss;
}

at::Tensor MixedPrecision::optimizer_step(const OptimizerStep& step) {
  if (scaler_ != nullptr) return scaled_step(step);
  StepAids aids;
  aids.copies = copies_.get();
  return fused_step(
      step.optimizer,
      [&step] {
        auto loss = step.closure();
        step.after_closure();
        return loss;
      },
      aids);
}

at::Tensor MixedPrecision::scaled_step(const OptimizerStep& step) {
  if (dynamic_cast<torch::optim::LBFGS*>(&step.optimizer) != nullptr) {
    throw MisconfigurationError(
        "AMP and the LBFGS optimizer are not compatible: LBFGS runs the model several times in a "
        "step, and \"16-mixed\" decides by the gradients of one run whether to step. Use "
        "\"bf16-mixed\" or \"32-true\", or another optimizer.");
  }
  // Also where an exception ends the step, which may be done again.
  const Scope done = scope_exit([this] { scaler_->abandon(); });
  auto loss = step.closure();
  const bool skipped = !loss.defined() && !step.manual;
  if (!skipped) scaler_->unscale_(step.optimizer, step.sharers);
  step.after_closure();
  if (skipped) return loss;
  scaler_->step(step.optimizer, copies_.get());
  scaler_->update();
  return loss;
}

State MixedPrecision::state_dict() const {
  return scaler_ != nullptr ? scaler_->state_dict() : State();
}

void MixedPrecision::load_state_dict(const State& state) {
  if (scaler_ != nullptr) scaler_->load_state_dict(state);
}

void MixedPrecision::teardown() {
  if (copies_ != nullptr) copies_->clear();
}

namespace {

// The names of older versions, which Lightning still takes.
std::unique_ptr<Precision> make_legacy(const char* old, const char* name) {
  warn(str("`precision=", old, "` is supported for historical reasons but its usage is ",
           "discouraged. Please set your precision to ", name, " instead!"));
  return std::make_unique<MixedPrecision>(name);
}

const Registration<Precision> kBF16Mixed{
    "bf16-mixed", "Parameters in float32, matrix products in bfloat16.",
    [] { return std::make_unique<MixedPrecision>("bf16-mixed"); }};
const Registration<Precision> k16Mixed{
    "16-mixed",
    "Parameters in float32, matrix products in float16, with a gradient scaler; on a CPU the same "
    "as bf16-mixed.",
    [] { return std::make_unique<MixedPrecision>("16-mixed"); }};
const Registration<Precision> kBF16{"bf16", "An old name of bf16-mixed.",
                                    [] { return make_legacy("bf16", "bf16-mixed"); }};
const Registration<Precision> k16{"16", "An old name of 16-mixed.",
                                  [] { return make_legacy("16", "16-mixed"); }};

}  // namespace
}  // namespace lightning
