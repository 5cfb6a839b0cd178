#include "lightning/nn/compute.h"

#include <ATen/autocast_mode.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <c10/util/Exception.h>

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
  if (left.scalar_type() == dtype) return at::mm(left, right);
  if (left.is_cuda() && is_16_bit(left.scalar_type()) && dtype == at::kFloat) {
    return at::mm(left, right, dtype);
  }
  return at::mm(left, right).to(dtype);
}

void affine_out(at::Tensor& rows, const at::Tensor& matrix, const at::Tensor& weight,
                const at::Tensor& bias) {
  if (bias.defined()) {
    at::addmm_out(rows, bias, matrix, weight.t());
  } else {
    at::mm_out(rows, matrix, weight.t());
  }
}

at::Tensor affine(const at::Tensor& matrix, const at::Tensor& weight, const at::Tensor& bias) {
  auto rows = at::empty({matrix.size(0), weight.size(0)}, matrix.options());
  affine_out(rows, matrix, weight, bias);
  return rows;
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
