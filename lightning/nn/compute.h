// In which dtype a layer computes now, as autocast would have it.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <optional>
#include <vector>

namespace lightning::nn {

// Whether autocast is on for the tensor's device and casts it: floating, but not float64.
bool is_autocast(const at::Tensor& input);

// The dtype of autocast where it casts this input, else the input's own.
at::ScalarType compute_dtype(const at::Tensor& input);

// Autocast off on this thread while it lives: what a layer casts itself is not cast again.
class NoAutocast {
 public:
  NoAutocast();

 private:
  c10::impl::ExcludeDispatchKeyGuard guard_;
};

// left [m, k] times right [k, n], written in `dtype`: float32 from 16-bit factors in one pass where
// the device can, else the product and a cast. These and the ones below run by cuda::gemm() where
// that can, else by ATen.
at::Tensor product(const at::Tensor& left, const at::Tensor& right, at::ScalarType dtype);

// The same times `factor`, one number on the device in float32 or float64, rounded once.
at::Tensor scaled_product(const at::Tensor& factor, const at::Tensor& left, const at::Tensor& right,
                          at::ScalarType dtype);

// Adds left times right to `sum`, in its dtype and, where one product can, in one pass.
void add_product(at::Tensor& sum, const at::Tensor& left, const at::Tensor& right);

// matrix [rows, in] times weight [out, in]^T plus bias [out] where defined, all of one dtype, into
// `rows` [rows, out]; the product adds the bias itself.
void affine_out(at::Tensor& rows, const at::Tensor& matrix, const at::Tensor& weight,
                const at::Tensor& bias);
at::Tensor affine(const at::Tensor& matrix, const at::Tensor& weight, const at::Tensor& bias);

// As affine_out() into `before`, which may be undefined where nobody wants it, and its GELU by tanh
// into `after`, in one pass. False, with nothing written, where there is no such pass.
bool affine_gelu_out(const at::Tensor& before, const at::Tensor& after, const at::Tensor& matrix,
                     const at::Tensor& weight, const at::Tensor& bias);

// left times right [m, n] times the derivative of the GELU by tanh at `before` [m, n], in one pass.
// Undefined where there is no such pass.
at::Tensor product_through_gelu(const at::Tensor& left, const at::Tensor& right,
                                const at::Tensor& before);

// What an autograd function takes for a bias: it knows no undefined tensors.
std::optional<at::Tensor> if_defined(const at::Tensor& tensor);
// The bias in the dtype that the layer computes in, by working_copy(); undefined where there is
// none.
at::Tensor bias_copy(const std::optional<at::Tensor>& bias, at::ScalarType dtype);

// Called by a backward that cannot be differentiated itself: where a graph of it is asked for, an
// error that names the layer and what to use `instead`.
void refuse_second_derivative(const char* layer, const char* instead);

// [rows, features] from any rank; a copy only where the strides need one.
at::Tensor as_matrix(const at::Tensor& tensor);

// The sizes with the last one replaced.
std::vector<int64_t> with_last(at::IntArrayRef sizes, int64_t last);

}  // namespace lightning::nn
