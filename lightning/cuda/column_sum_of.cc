#include "lightning/cuda/column_sum_of.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/sum.h>
#include <c10/core/DeviceGuard.h>
#include <c10/util/Exception.h>

#include <utility>

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

// What a tensor carries beside its values.
struct LeftSums : c10::BackendMeta {
  LeftSums(at::Tensor sums, uint32_t version) : sums(std::move(sums)), version(version) {}
  at::Tensor sums;
  uint32_t version;  // of the tensor they are of
};

// The sums that were left with the tensor; undefined where there are none.
at::Tensor taken_from(const at::Tensor& matrix) {
  auto* const impl = matrix.unsafeGetTensorImpl();
  const auto* const left = dynamic_cast<const LeftSums*>(impl->get_backend_meta());
  if (left == nullptr) return {};
  const auto sums = left->version == matrix._version() ? left->sums : at::Tensor();
  impl->set_backend_meta(nullptr);
  return sums;
}

}  // namespace

void leave_column_sum(const at::Tensor& matrix, const at::Tensor& sums) {
  matrix.unsafeGetTensorImpl()->set_backend_meta(
      c10::make_intrusive<LeftSums>(sums, matrix._version()));
}

at::Tensor column_sum(const at::Tensor& tensor) {
  TORCH_CHECK(tensor.dim() > 0, "column_sum got a scalar, expected [..., columns].");
  if (auto sums = taken_from(tensor); sums.defined()) return sums;
  const at::NoGradGuard no_grad;
  const auto matrix = tensor.dim() == 1 ? tensor.unsqueeze(0) : tensor.flatten(0, -2);
  const auto dtype = matrix.scalar_type();
  const bool has_kernel = has_dtype(dtype);
  if constexpr (kBuilt) {
    if (has_kernel && can_run(matrix)) {
      return by_kernel(matrix.stride(1) == 1 ? matrix : matrix.contiguous());
    }
  }
  return at::sum(matrix, {0}, /*keepdim=*/false, has_kernel ? at::kFloat : dtype);
}

}  // namespace lightning::cuda
