#include "lightning/nn/exp_losses.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/zeros.h>
#include <ATen/record_function.h>
#include <c10/core/DeviceGuard.h>

#include <limits>

#include "lightning/cuda/device.h"
#include "lightning/cuda/exp_product.h"
#include "lightning/cuda/exp_rows.h"
#include "lightning/cuda/gemm.h"
#include "lightning/cuda/launch.h"
#include "lightning/param/replay.h"
#include "lightning/param/touch.h"

namespace lightning::nn {
namespace {

constexpr int kHopper = 90;

bool is_readable(const at::Tensor& matrix) {
  return matrix.scalar_type() == at::kBFloat16 && matrix.is_contiguous() &&
         reinterpret_cast<uintptr_t>(matrix.const_data_ptr()) % 16 == 0 &&
         matrix.size(0) <= std::numeric_limits<int32_t>::max() && matrix.size(1) % 8 == 0;
}

bool can_run(const at::Tensor& hidden, const at::Tensor& weight, const RowTargets& targets) {
  if constexpr (cuda::kBuilt && cuda::kExpProductBuilt) {
    return cuda::gemm_mode() != cuda::GemmMode::kOff && cuda::can_run(hidden) &&
           cuda::compute_capability(hidden.get_device()) == kHopper && hidden.numel() > 0 &&
           is_readable(hidden) && is_readable(weight) && weight.size(0) > 0 &&
           weight.size(0) % 8 == 0 && targets.label_smoothing == 0 && !recording_region();
  }
  return false;
}

at::Tensor shifts_of(const at::Tensor& hidden, const at::Tensor& weight,
                     const RowTargets& targets) {
  const auto shifts = at::empty({hidden.size(0)}, hidden.options().dtype(at::kFloat));
  if constexpr (cuda::kBuilt) {
    cuda::TargetShifts arguments;
    arguments.rows = hidden.size(0);
    arguments.depth = hidden.size(1);
    arguments.classes = weight.size(0);
    arguments.a = hidden.const_data_ptr();
    arguments.b = weight.const_data_ptr();
    arguments.targets = targets.classes.const_data_ptr<int64_t>();
    arguments.ignore_index = targets.ignore_index;
    arguments.shifts = shifts.mutable_data_ptr<float>();
    cuda::target_shifts(arguments, cuda::stream_of(hidden));
  }
  return shifts;
}

cuda::ExpProduct product_of(const at::Tensor& hidden, const at::Tensor& weight,
                            const at::Tensor& shifts, const at::Tensor& sums,
                            const at::Tensor& out) {
  cuda::ExpProduct arguments;
  arguments.rows = hidden.size(0);
  arguments.columns = weight.size(0);
  arguments.depth = hidden.size(1);
  arguments.a = hidden.const_data_ptr();
  arguments.b = weight.const_data_ptr();
  arguments.out = out.mutable_data_ptr();
  arguments.shifts = shifts.const_data_ptr<float>();
  arguments.sums = sums.mutable_data_ptr<float>();
  return arguments;
}

void finish(const ExpLosses& result, const at::Tensor& sums, const RowTargets& targets,
            const at::Tensor& overflow) {
  if constexpr (cuda::kBuilt) {
    cuda::ExpRows arguments;
    arguments.rows = result.gradient.size(0);
    arguments.columns = result.gradient.size(1);
    arguments.sums = sums.const_data_ptr<float>();
    arguments.parts = sums.size(0);
    arguments.stride = sums.size(1);
    arguments.targets = targets.classes.const_data_ptr<int64_t>();
    arguments.ignore_index = targets.ignore_index;
    arguments.out = result.gradient.mutable_data_ptr();
    arguments.losses = result.losses.mutable_data_ptr<float>();
    arguments.scales = result.scales.mutable_data_ptr<float>();
    arguments.overflow = overflow.mutable_data_ptr<int>();
    cuda::finish_exp_rows(arguments, cuda::stream_of(result.gradient));
  }
}

}  // namespace

std::optional<ExpLosses> exp_losses(const at::Tensor& hidden, const at::Tensor& weight,
                                    const RowTargets& targets) {
  whole(weight);  // it is read by its address
  if (!can_run(hidden, weight, targets)) return std::nullopt;
  const at::NoGradGuard no_grad;
  const c10::DeviceGuard device(hidden.device());
  const auto floats = hidden.options().dtype(at::kFloat);
  const auto rows = hidden.size(0), classes = weight.size(0);
  const auto shifts = shifts_of(hidden, weight, targets);
  const auto sums = at::empty({cuda::exp_parts(classes), cuda::exp_padded_rows(rows)}, floats);
  const auto overflow = at::zeros({1}, floats.dtype(at::kInt));
  const ExpLosses result{at::empty({rows}, floats), at::empty({rows, classes}, hidden.options()),
                         at::empty({rows}, floats)};
  if constexpr (cuda::kBuilt && cuda::kExpProductBuilt) {
    auto product = product_of(hidden, weight, shifts, sums, result.gradient);
    const auto stream = cuda::stream_of(hidden);
    {
      RECORD_FUNCTION("lightning::gemm", std::vector<c10::IValue>({hidden, weight.t()}));
      cuda::exp_product(product, stream);
    }
    finish(result, sums, targets, overflow);
    product.exponential = false;
    product.only_if = overflow.const_data_ptr<int>();
    cuda::exp_product(product, stream);
    cross_entropy_rows_in_place_if(overflow, result.gradient, targets, result.losses);
    result.scales.masked_fill_(overflow.ne(0), 1);
  }
  return result;
}

void scale_rows_out(at::Tensor& out, const at::Tensor& matrix, const at::Tensor& scales) {
  const auto is_plain = [](const at::Tensor& one) {
    return one.is_contiguous() && one.size(1) % 8 == 0 &&
           reinterpret_cast<uintptr_t>(one.const_data_ptr()) % 16 == 0;
  };
  if (out.scalar_type() != matrix.scalar_type() || !cuda::has_dtype(out.scalar_type()) ||
      !cuda::can_run(out) || !is_plain(out) || !is_plain(matrix)) {
    at::mul_out(out, matrix, scales.unsqueeze(1));
    return;
  }
  if constexpr (cuda::kBuilt) {
    const c10::DeviceGuard device(out.device());
    cuda::ScaleRows arguments;
    arguments.dtype = cuda::dtype_of(out);
    arguments.rows = out.size(0);
    arguments.columns = out.size(1);
    arguments.in = matrix.const_data_ptr();
    arguments.out = out.mutable_data_ptr();
    arguments.scales = scales.const_data_ptr<float>();
    cuda::scale_rows(arguments, cuda::stream_of(out));
  }
}

}  // namespace lightning::nn
