#include "lightning/nn/compute.h"

#include <ATen/autocast_mode.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/mm.h>
#include <c10/util/Exception.h>

#include "lightning/cuda/gemm.h"
#include "lightning/param/working_copy.h"

namespace lightning::nn {

bool is_autocast(const at::Tensor& input) {
  const auto device = input.device().type();
  return at::isFloatingType(input.scalar_type()) && input.scalar_type() != at::kDouble &&
         at::autocast::is_autocast_available(device) && at::autocast::is_autocast_enabled(device);
}

at::ScalarType compute_dtype(const at::Tensor& input) {
  return is_autocast(input) ? at::autocast::get_autocast_dtype(input.device().type())
                            : input.scalar_type();
}

NoAutocast::NoAutocast() : guard_(c10::autocast_dispatch_keyset) {}

at::Tensor product(const at::Tensor& left, const at::Tensor& right, at::ScalarType dtype) {
  const auto own = left.scalar_type();
  if (left.is_cuda() && at::isReducedFloatingType(own) && (dtype == own || dtype == at::kFloat)) {
    auto result = at::empty({left.size(0), right.size(1)}, left.options().dtype(dtype));
    if (cuda::gemm({left, right, result})) return result;
  }
  if (own == dtype) return at::mm(left, right);
  if (left.is_cuda() && at::isReducedFloatingType(own) && dtype == at::kFloat)
    return at::mm(left, right, dtype);
  return at::mm(left, right).to(dtype);
}

at::Tensor scaled_product(const at::Tensor& factor, const at::Tensor& left, const at::Tensor& right,
                          at::ScalarType dtype) {
  const auto own = left.scalar_type();
  if (left.is_cuda() && at::isReducedFloatingType(own) && (dtype == own || dtype == at::kFloat)) {
    cuda::Gemm g{left, right,
                 at::empty({left.size(0), right.size(1)}, left.options().dtype(dtype))};
    g.factor = factor;
    if (cuda::gemm(g)) return g.out;
  }
  return product(left, right, at::promote_types(dtype, at::kFloat)).mul_(factor).to(dtype);
}

void add_product(at::Tensor& sum, const at::Tensor& left, const at::Tensor& right) {
  if (cuda::gemm({left, right, sum, /*bias=*/{}, /*accumulate=*/true})) return;
  if (left.scalar_type() == sum.scalar_type()) {
    at::addmm_out(sum, sum, left, right);
  } else {
    sum.add_(product(left, right, sum.scalar_type()));
  }
}

void affine_out(at::Tensor& rows, const at::Tensor& matrix, const at::Tensor& weight,
                const at::Tensor& bias) {
  const auto transposed = weight.t();
  if (cuda::gemm({matrix, transposed, rows, bias})) return;
  if (bias.defined()) {
    at::addmm_out(rows, bias, matrix, transposed);
  } else {
    at::mm_out(rows, matrix, transposed);
  }
}

at::Tensor affine(const at::Tensor& matrix, const at::Tensor& weight, const at::Tensor& bias) {
  auto rows = at::empty({matrix.size(0), weight.size(0)}, matrix.options());
  affine_out(rows, matrix, weight, bias);
  return rows;
}

bool affine_gelu_out(const at::Tensor& before, const at::Tensor& after, const at::Tensor& matrix,
                     const at::Tensor& weight, const at::Tensor& bias) {
  return cuda::gemm({matrix, weight.t(), after, bias, /*accumulate=*/false, /*gelu=*/true, before});
}

at::Tensor product_through_gelu(const at::Tensor& left, const at::Tensor& right,
                                const at::Tensor& before) {
  cuda::Gemm g{left, right, {}};
  if (!left.is_cuda() || !at::isReducedFloatingType(left.scalar_type())) return {};
  g.out = at::empty_like(before);
  g.aux = before;
  g.gelu_gradient = true;
  return cuda::gemm(g) ? g.out : at::Tensor();
}

std::optional<at::Tensor> if_defined(const at::Tensor& tensor) {
  return tensor.defined() ? std::make_optional(tensor) : std::nullopt;
}

at::Tensor bias_copy(const std::optional<at::Tensor>& bias, at::ScalarType dtype) {
  return bias ? working_copy(*bias, dtype) : at::Tensor();
}

void refuse_second_derivative(const char* layer, const char* instead) {
  TORCH_CHECK(!at::GradMode::is_enabled(), layer,
              " was asked for a graph of its backward (create_graph), but its fused backward has "
              "no derivative of its own. Use ",
              instead, " for what is differentiated twice.");
}

at::Tensor as_matrix(const at::Tensor& tensor) {
  TORCH_CHECK(tensor.dim() > 0, "A layer got a scalar, expected [..., features].");
  const auto columns = tensor.size(-1);
  int64_t rows = 1;
  for (const auto size : tensor.sizes().slice(0, tensor.dim() - 1)) rows *= size;
  return tensor.reshape({rows, columns});
}

std::vector<int64_t> with_last(at::IntArrayRef sizes, int64_t last) {
  auto result = sizes.vec();
  result.back() = last;
  return result;
}

}  // namespace lightning::nn
