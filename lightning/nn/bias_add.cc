// The bias of torch::nn::functional::linear, and of what LibTorch's C++ layers make of it, on a GPU
// in 16 bits. It multiplies, and then adds the bias to the product in place (`output += bias`), for
// which LibTorch has one slow kernel for everything that is broadcast: under autocast 12 of the 92
// ms of a GPT-2 step. Here the same sum, bit for bit, runs as fast as memory allows.
// (torch::nn::Linear itself has no such pass: torch_linear.cc.)
//
// Nothing to call: it takes the place of CUDA's `add_`, and leaves every other sum to LibTorch's.
// Under autocast it takes that of what autocast does at `add_`, too, which is nothing: there the
// bias's gradient is summed in float32.
#include "lightning/cuda/bias_add.h"

#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/sum.h>
#ifdef LIGHTNING_TORCH_CUDA
#include <ATen/ops/add_cuda_dispatch.h>
#endif
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/util/Exception.h>
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

void launch(const at::Tensor& rows, const at::Tensor& bias) {
  if constexpr (cuda::kBuilt) {
    const c10::DeviceGuard device(rows.device());
    cuda::BiasAdd arguments;
    arguments.dtype = cuda::dtype_of(rows);
    arguments.bias_dtype = cuda::dtype_of(bias);
    arguments.matrix = rows.mutable_data_ptr();
    arguments.bias = bias.const_data_ptr();
    arguments.columns = rows.size(-1);
    arguments.rows = rows.numel() / arguments.columns;
    cuda::bias_add(arguments, cuda::stream_of(rows));
  }
}

void add_in_place(const at::Tensor& rows, const at::Tensor& bias) {
  launch(rows, whole(bias));
  rows.unsafeGetTensorImpl()->bump_version();
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
      rows.numel() == 0 || !rows.is_contiguous() || !cuda::can_run(rows)) {
    return false;
  }
  return bias.dim() == 1 && bias.size(0) == rows.size(-1) && bias.device() == rows.device() &&
         (bias.scalar_type() == at::kFloat || bias.scalar_type() == rows.scalar_type()) &&
         bias.is_contiguous() && bias.has_storage() && !bias.is_alias_of(rows) && alpha.equal(1);
}

// What autograd says of the rows before it lets them be written.
bool may_be_written(const at::Tensor& rows) {
  const bool is_wanted_leaf = at::GradMode::is_enabled() && rows.is_leaf() && rows.requires_grad();
  return !is_wanted_leaf && !rows.is_view() && !rows.is_inference();
}

at::Tensor& add_under_autocast(at::Tensor& rows, const at::Tensor& other, const at::Scalar& alpha) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  // A region's replay runs operators.
  if (recording_region() || other.scalar_type() != at::kFloat || !is_bias_add(rows, other, alpha) ||
      !may_be_written(rows)) {
    return rows.add_(other, alpha);
  }
  if (at::GradMode::is_enabled() && (rows.requires_grad() || other.requires_grad())) {
    BiasAddFunction::apply(rows, other);
  } else {
    add_in_place(rows, other);
  }
  return rows;
}

TORCH_LIBRARY_IMPL(aten, AutocastCUDA, m) { m.impl("add_.Tensor", TORCH_FN(add_under_autocast)); }

#ifdef LIGHTNING_TORCH_CUDA

at::Tensor& add_on_cuda(at::Tensor& rows, const at::Tensor& other, const at::Scalar& alpha) {
  if (!is_bias_add(rows, other, alpha)) return at::cuda::add_(rows, other, alpha);
  launch(rows, other);
  return rows;
}

// LibTorch warns of a kernel in the place of another, which is meant here.
class Silence : public c10::WarningHandler {
 public:
  void process(const c10::Warning&) override {}
};

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  if constexpr (!cuda::kBuilt) return;
  Silence silence;
  const c10::WarningUtils::WarningHandlerGuard guard(&silence);
  m.impl("add_.Tensor", TORCH_FN(add_on_cuda));
}

#endif

}  // namespace
}  // namespace lightning::nn
