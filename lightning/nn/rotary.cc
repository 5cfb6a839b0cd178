#include "lightning/nn/rotary.h"

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/cos.h>
#include <ATen/ops/outer.h>
#include <ATen/ops/pow.h>
#include <ATen/ops/sin.h>
#include <ATen/ops/stack.h>
#include <c10/core/InferenceMode.h>
#include <c10/util/Exception.h>

#include "lightning/recording.h"

namespace lightning::nn {

at::Tensor Rotary::table(int64_t time, c10::Device device, at::ScalarType dtype) {
  const bool fits = kept_.defined() && kept_.size(0) >= time && kept_.device() == device &&
                    kept_.scalar_type() == dtype;
  if (!fits) {
    // A table first asked for by a validation in inference mode serves training too.
    const c10::InferenceMode no_inference(false);
    const at::NoGradGuard no_grad;
    const auto options = at::TensorOptions().dtype(at::kDouble);  // on the CPU, once
    const auto exponents = at::arange(0, head_size_, 2, options) / static_cast<double>(head_size_);
    int64_t length = 64;
    while (length < time) length *= 2;
    const auto angles = at::outer(at::arange(length, options), at::pow(base_, -exponents));
    kept_ = at::stack({at::cos(angles), at::sin(angles)}, -1)
                .to(device, dtype, /*non_blocking=*/device.is_cuda());
  }
  hold_for_recording(kept_);  // a longer one may take its place
  return kept_.narrow(0, 0, time);
}

at::Tensor rotate(const at::Tensor& heads, const at::Tensor& table) {
  TORCH_CHECK(heads.dim() == 4 && table.dim() == 3 && heads.size(1) == table.size(0) &&
                  heads.size(3) == 2 * table.size(1),
              "rotate got heads of ", heads.sizes(), " and a table of ", table.sizes(),
              ", expected [batch, time, heads, size] and [time, size / 2, 2].");
  const auto half = table.size(1);
  const auto first = heads.narrow(3, 0, half).to(table.scalar_type());
  const auto second = heads.narrow(3, half, half).to(table.scalar_type());
  const auto cosine = table.select(2, 0).unsqueeze(1);
  const auto sine = table.select(2, 1).unsqueeze(1);
  return at::cat({first * cosine - second * sine, second * cosine + first * sine}, -1)
      .to(heads.scalar_type());
}

}  // namespace lightning::nn
