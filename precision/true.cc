#include "precision/true.h"

#include <c10/core/DefaultDtype.h>
#include <torch/nn/module.h>

#include "lightning/errors.h"
#include "lightning/registry.h"
#include "precision/bf16_support.h"
#include "precision/default_dtype.h"

namespace lightning {
namespace {

// torch::nn::Module::to would cast integers too, as BatchNorm's num_batches_tracked.
void cast(at::Tensor& tensor, at::ScalarType dtype) {
  if (!tensor.is_floating_point() || tensor.scalar_type() == dtype) return;
  const auto gradient = tensor.grad();
  tensor.mutable_grad().reset();
  tensor.set_data(tensor.detach().to(dtype));
  if (gradient.defined()) tensor.mutable_grad() = gradient.to(dtype);
}

}  // namespace

void TruePrecision::convert_module(torch::nn::Module& module) {
  for (auto& parameter : module.parameters()) cast(parameter, dtype_);
  for (auto& buffer : module.buffers()) cast(buffer, dtype_);
}

Batch TruePrecision::convert_output(Batch output) {
  return output.to_floating(c10::get_default_dtype_as_scalartype());
}

Scope TruePrecision::forward_context() { return default_dtype_scope(dtype_); }
Scope TruePrecision::module_init_context() { return default_dtype_scope(dtype_); }
Scope TruePrecision::tensor_init_context() { return default_dtype_scope(dtype_); }

HalfPrecision::HalfPrecision(const std::string& name)
    : TruePrecision(name, name == "bf16-true" ? at::kBFloat16 : at::kHalf) {
  if (name != "16-true" && name != "bf16-true") {
    throw MisconfigurationError(
        str("HalfPrecision got \"", name, "\", expected \"16-true\" or \"bf16-true\"."));
  }
}

void HalfPrecision::set_device(c10::Device device) {
  if (parameter_dtype() == at::kBFloat16) check_bf16(name(), "\"16-true\" or \"32-true\"", device);
}

namespace {

const Registration<Precision> k64True{"64-true", "Everything in float64.",
                                      [] { return std::make_unique<DoublePrecision>(); }};
const Registration<Precision> k64{"64", "The same as 64-true.",
                                  [] { return std::make_unique<DoublePrecision>(); }};
const Registration<Precision> k16True{
    "16-true", "Everything in float16, without a gradient scaler: small gradients become zero.",
    [] { return std::make_unique<HalfPrecision>("16-true"); }};
const Registration<Precision> kBF16True{
    "bf16-true", "Everything in bfloat16: half the memory, the range of float32.",
    [] { return std::make_unique<HalfPrecision>("bf16-true"); }};

}  // namespace
}  // namespace lightning
