#include "lightning/cuda/column_sum_of.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/sum.h>
#include <c10/core/DeviceGuard.h>
#include <c10/util/Exception.h>

#include "lightning/cuda/column_sum.h"
#include "lightning/cuda/launch.h"

namespace lightning::cuda {
namespace {

at::Tensor by_kernel(const at::Tensor& matrix) {
  const c10::DeviceGuard guard(matrix.device());
  const auto options = matrix.options().dtype(at::kFloat);
  const auto sums = at::empty({matrix.size(1)}, options);
  ColumnSum arguments;
  arguments.matrix = matrix.const_data_ptr();
  arguments.dtype = dtype_of(matrix);
  arguments.rows = matrix.size(0);
  arguments.columns = matrix.size(1);
  arguments.row_stride = matrix.stride(0);
  arguments.sums = sums.mutable_data_ptr<float>();
  const auto workspace = at::empty({column_sum_workspace(arguments)}, options);
  arguments.workspace = workspace.mutable_data_ptr<float>();
  column_sum(arguments, stream_of(matrix));
  return sums;
}

}  // namespace

at::Tensor column_sum(const at::Tensor& matrix) {
  TORCH_CHECK(matrix.dim() == 2, "column_sum got a tensor of ", matrix.sizes(),
              ", expected [rows, columns].");
  const at::NoGradGuard no_grad;
  const auto dtype = matrix.scalar_type();
  const bool has_kernel = dtype == at::kFloat || dtype == at::kHalf || dtype == at::kBFloat16;
  if constexpr (kBuilt) {
    if (has_kernel && can_run(matrix)) {
      return by_kernel(matrix.stride(1) == 1 ? matrix : matrix.contiguous());
    }
  }
  return at::sum(matrix, {0}, /*keepdim=*/false, has_kernel ? at::kFloat : dtype);
}

}  // namespace lightning::cuda
