// The bias of a plain torch::nn::Linear under autocast on a GPU. LibTorch's layer multiplies, and
// then adds its float32 bias to the 16-bit product in place (`output += bias`), for which LibTorch
// has one slow kernel for all mixtures of dtypes: 12 of the 92 ms of a GPT-2 step. Here the same
// sum, bit for bit, runs as fast as memory allows, and the bias's gradient is summed in float32.
//
// Nothing to call: it takes the place of what autocast does at `add_`, which is nothing, and leaves
// every other sum as it is.
#include "lightning/cuda/bias_add.h"

#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/sum.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <numeric>
#include <vector>

#include "lightning/cuda/column_sum_of.h"
#include "lightning/cuda/launch.h"
#include "lightning/param/replay.h"
#include "lightning/param/touch.h"

namespace lightning::nn {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

void add_in_place(const at::Tensor& rows, const at::Tensor& bias) {
  whole(bias);
  if constexpr (cuda::kBuilt) {
    const c10::DeviceGuard device(rows.device());
    cuda::BiasAdd arguments;
    arguments.dtype = cuda::dtype_of(rows);
    arguments.matrix = rows.mutable_data_ptr();
    arguments.bias = bias.const_data_ptr<float>();
    arguments.columns = rows.size(-1);
    arguments.rows = rows.numel() / arguments.columns;
    cuda::bias_add(arguments, cuda::stream_of(rows));
    rows.unsafeGetTensorImpl()->bump_version();
  }
}

class BiasAddFunction : public torch::autograd::Function<BiasAddFunction> {
 public:
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& rows, const at::Tensor& bias) {
    add_in_place(rows, bias);
    ctx->mark_dirty({rows});
    return rows;
  }

  static variable_list backward(AutogradContext* ctx, variable_list gradients) {
    const auto& gradient = gradients[0];
    at::Tensor bias;
    if (ctx->needs_input_grad(1)) {
      if (at::GradMode::is_enabled()) {  // a graph of this is asked for
        std::vector<int64_t> rows(static_cast<size_t>(gradient.dim() - 1));
        std::iota(rows.begin(), rows.end(), 0);
        bias = at::sum(gradient, rows, /*keepdim=*/false, at::kFloat);
      } else {
        bias = cuda::column_sum(gradient);
      }
    }
    return {gradient, bias};
  }
};

// Of any sum in place: one that the kernel takes, and that LibTorch would do without an error.
bool is_bias_add(const at::Tensor& rows, const at::Tensor& bias, const at::Scalar& alpha) {
  if (!rows.is_cuda() || !at::isReducedFloatingType(rows.scalar_type()) || rows.dim() < 2 ||
      rows.numel() == 0 || !rows.is_contiguous() || rows.is_view() || !cuda::can_run(rows)) {
    return false;
  }
  if (bias.dim() != 1 || bias.scalar_type() != at::kFloat || bias.size(0) != rows.size(-1) ||
      bias.device() != rows.device() || !bias.is_contiguous() || !bias.has_storage()) {
    return false;
  }
  if (recording_region()) return false;  // whose replay runs operators
  const bool would_fail = at::GradMode::is_enabled() && rows.is_leaf() && rows.requires_grad();
  return !would_fail && !rows.is_inference() && alpha.equal(1);
}

at::Tensor& add_under_autocast(at::Tensor& rows, const at::Tensor& other, const at::Scalar& alpha) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  if (!is_bias_add(rows, other, alpha)) return rows.add_(other, alpha);
  if (at::GradMode::is_enabled() && (rows.requires_grad() || other.requires_grad())) {
    BiasAddFunction::apply(rows, other);
  } else {
    add_in_place(rows, other);
  }
  return rows;
}

TORCH_LIBRARY_IMPL(aten, AutocastCUDA, m) { m.impl("add_.Tensor", TORCH_FN(add_under_autocast)); }

}  // namespace
}  // namespace lightning::nn
