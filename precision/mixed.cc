#include "precision/mixed.h"

#include <ATen/autocast_mode.h>
#include <c10/core/DefaultDtype.h>
#include <c10/util/Exception.h>

#include "lightning/errors.h"
#include "lightning/log.h"
#include "lightning/registry.h"

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

MixedPrecision::MixedPrecision(const std::string& name)
    : name_(name), dtype_(name == "bf16-mixed" ? at::kBFloat16 : at::kHalf) {
  if (name != "16-mixed" && name != "bf16-mixed") {
    throw MisconfigurationError(
        str("MixedPrecision got \"", name, "\", expected \"16-mixed\" or \"bf16-mixed\"."));
  }
}

void MixedPrecision::set_device(c10::Device device) {
  if (!device.is_cpu() && !device.is_cuda()) {
    throw MisconfigurationError(str("precision \"", name_, "\" got the device ", device,
                                    ", expected cpu or cuda. Use \"32-true\" there."));
  }
  if (name_ == "16-mixed" && device.is_cuda()) {
    throw MisconfigurationError(
        "precision \"16-mixed\" on a GPU needs a gradient scaler, which is not built yet. Use "
        "\"bf16-mixed\", which needs none, or \"32-true\".");
  }
  if (name_ == "16-mixed") {
    warn(
        "You passed `Trainer(accelerator='cpu', precision='16-mixed')` but AMP with fp16 is not "
        "supported on CPU. Using `precision='bf16-mixed'` instead.");
    name_ = "bf16-mixed";
    dtype_ = at::kBFloat16;
  }
  device_type_ = device.type();
}

Batch MixedPrecision::convert_output(Batch output) {
  return output.to_floating(c10::get_default_dtype_as_scalartype());
}

Scope MixedPrecision::forward_context() {
  TORCH_CHECK(device_type_,
              "MixedPrecision was asked for its forward context before "
              "set_device() told it for which kind of device.");
  return make_scope<AutocastGuard>(*device_type_, dtype_);
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
    "Parameters in float32, matrix products in float16; on a CPU the same as bf16-mixed.",
    [] { return std::make_unique<MixedPrecision>("16-mixed"); }};
const Registration<Precision> kBF16{"bf16", "An old name of bf16-mixed.",
                                    [] { return make_legacy("bf16", "bf16-mixed"); }};
const Registration<Precision> k16{"16", "An old name of 16-mixed.",
                                  [] { return make_legacy("16", "16-mixed"); }};

}  // namespace
}  // namespace lightning
