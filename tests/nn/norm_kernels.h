// The norm's kernels against float64, for the tests of the layers that use them.
#pragma once

#include <ATen/Functions.h>
#include <torch/cuda.h>

#include <algorithm>
#include <catch2/catch.hpp>
#include <limits>
#include <vector>

#include "lightning/cuda/launch.h"
#include "lightning/cuda/norm.h"
#include "tests/nn/gradients.h"

namespace lightning::testing {

struct NormCase {
  at::ScalarType input = at::kFloat, output = at::kFloat, weight = at::kFloat;
  int64_t rows = 1, width = 1;
  bool centred = true, adds = false;
  bool has_bias = true;
  int64_t offset = 0;  // elements between an aligned address and each tensor
};

inline double tolerance_of(at::ScalarType dtype) {
  return dtype == at::kFloat ? 1e-5 : dtype == at::kHalf ? 1e-3 : 5e-3;
}

class NormKernels {
 public:
  explicit NormKernels(const NormCase& one) : one_(one) {}

  void check() const {
    const auto input = values({one_.rows, one_.width}, one_.input);
    const auto delta = one_.adds ? values({one_.rows, one_.width}, one_.output) : at::Tensor();
    const auto weight = values({one_.width}, one_.weight);
    const auto bias = one_.has_bias ? values({one_.width}, one_.weight) : at::Tensor();
    auto arguments = forward_arguments();
    const auto sum = one_.adds ? unset({one_.rows, one_.width}, one_.input) : at::Tensor();
    const auto output = unset({one_.rows, one_.width}, one_.output);
    const auto mean = unset({one_.rows}, at::kFloat), rstd = unset({one_.rows}, at::kFloat);
    arguments.input = input.data_ptr();
    arguments.delta = pointer(delta);
    arguments.weight = weight.data_ptr();
    arguments.bias = pointer(bias);
    arguments.sum = pointer(sum);
    arguments.output = output.data_ptr();
    arguments.mean = one_.centred ? mean.data_ptr<float>() : nullptr;
    arguments.rstd = rstd.data_ptr<float>();
    cuda::norm_forward(arguments, cuda::stream_of(input));

    if (one_.adds) {
      const auto exact = input.to(at::kDouble) + delta.to(at::kDouble);
      CHECK(relative_error(sum, exact) <= tolerance_of(one_.input));
    }
    const auto x = (one_.adds ? sum : input);
    auto exact_x = x.to(at::kDouble).detach().requires_grad_();
    auto exact_weight = weight.to(at::kDouble).detach().requires_grad_();
    auto exact_bias =
        bias.defined() ? bias.to(at::kDouble).detach().requires_grad_() : at::Tensor();
    const auto exact = reference(exact_x, exact_weight, exact_bias);
    CHECK(relative_error(output, exact) <= tolerance_of(one_.output));

    const auto grad_output = values({one_.rows, one_.width}, one_.output);
    const auto grad_sum = one_.adds ? values({one_.rows, one_.width}, one_.input) : at::Tensor();
    exact.backward(grad_output.to(at::kDouble));
    auto exact_grad = exact_x.grad();
    if (one_.adds) exact_grad = exact_grad + grad_sum.to(at::kDouble);
    const auto grad_input = unset({one_.rows, one_.width}, one_.input);
    const auto grad_delta = unset({one_.rows, one_.width}, one_.output);
    const auto grad_weight = unset({one_.width}, one_.weight);
    const auto grad_bias = unset({one_.width}, one_.weight);
    cuda::NormBackward backward;
    backward.types = arguments.types;
    backward.rows = one_.rows;
    backward.width = one_.width;
    backward.x = x.data_ptr();
    backward.weight = weight.data_ptr();
    backward.mean = arguments.mean;
    backward.rstd = arguments.rstd;
    backward.grad_output = grad_output.data_ptr();
    backward.grad_sum = pointer(grad_sum);
    backward.grad_input = grad_input.data_ptr();
    backward.grad_delta = one_.adds ? grad_delta.data_ptr() : nullptr;
    backward.grad_weight = grad_weight.data_ptr();
    backward.grad_bias = bias.defined() ? grad_bias.data_ptr() : nullptr;
    const auto delta_sums = unset({one_.width}, at::kFloat);
    if (one_.adds && one_.centred) backward.delta_sums = delta_sums.data_ptr<float>();
    backward.blocks = cuda::norm_backward_blocks(backward);
    INFO("blocks " << backward.blocks);
    const auto workspace = unset({backward.blocks, 3, one_.width}, at::kFloat);
    backward.workspace = workspace.data_ptr<float>();
    cuda::norm_backward(backward, cuda::stream_of(input));
    CHECK(error(grad_input, exact_grad, rstd) <= tolerance_of(one_.input));
    if (one_.adds) CHECK(error(grad_delta, exact_grad, rstd) <= tolerance_of(one_.output));
    CHECK(error(grad_weight, exact_weight.grad(), rstd) <= tolerance_of(one_.weight));
    if (bias.defined())
      CHECK(error(grad_bias, exact_bias.grad(), rstd) <= tolerance_of(one_.weight));

    if (backward.delta_sums != nullptr) {
      CHECK(error(delta_sums, exact_grad.sum(0), rstd) <= std::max(1e-5, sum_tolerance()));
    }

    const auto again = unset({one_.width}, one_.weight);
    backward.grad_weight = again.data_ptr();
    cuda::norm_backward(backward, cuda::stream_of(input));
    CHECK(at::equal(again, grad_weight));
  }

 private:
  static void* pointer(const at::Tensor& tensor) {
    return tensor.defined() ? tensor.data_ptr() : nullptr;
  }

  // The kernel's inputs are what the exact ones are, so only float32's roundings are in the sums.
  double sum_tolerance() const { return one_.input == at::kFloat ? 1e-4 : 5e-3; }

  // Of a gradient. For a width of 1 it is a difference of equal numbers, as large as the largest
  // `rstd` times an element of grad_output, and its error is measured by that.
  double error(const at::Tensor& got, const at::Tensor& exact, const at::Tensor& rstd) const {
    if (one_.width > 1) return relative_error(got, exact);
    const auto difference = (got.to(at::kDouble) - exact).abs().max().item<double>();
    return difference /
           std::max({4.0, exact.abs().max().item<double>(), 4 * rstd.max().item<double>()});
  }

  cuda::NormForward forward_arguments() const {
    cuda::NormForward arguments;
    const auto of = [](at::ScalarType dtype) {
      return cuda::dtype_of(at::empty({0}, at::device(at::kCUDA).dtype(dtype)));
    };
    arguments.types = {of(one_.input), of(one_.output), of(one_.weight)};
    REQUIRE(cuda::norm_takes(arguments.types, one_.width));
    arguments.rows = one_.rows;
    arguments.width = one_.width;
    arguments.centred = one_.centred;
    arguments.eps = 1e-5F;
    return arguments;
  }

  at::Tensor reference(const at::Tensor& x, const at::Tensor& weight,
                       const at::Tensor& bias) const {
    if (one_.centred) return at::layer_norm(x, {one_.width}, weight, bias, 1e-5F);
    return at::rms_norm(x, {one_.width}, weight, 1e-5F);
  }

  // Of NaN, which stays where no kernel writes.
  at::Tensor unset(at::IntArrayRef sizes, at::ScalarType dtype) const {
    const auto numel = c10::multiply_integers(sizes);
    return at::full({numel + one_.offset}, std::numeric_limits<double>::quiet_NaN(),
                    at::device(at::kCUDA).dtype(dtype))
        .slice(0, one_.offset)
        .view(sizes);
  }

  at::Tensor values(at::IntArrayRef sizes, at::ScalarType dtype) const {
    const auto result = unset(sizes, dtype);
    return result.copy_(at::randn(sizes, at::device(at::kCUDA).dtype(at::kDouble)) * 0.7 + 0.3);
  }

  NormCase one_;
};

// Every combination of dtypes that has kernels, over narrow, common, odd and wide rows.
inline void check_norm_kernels(bool centred, bool adds) {
  struct Types {
    at::ScalarType input, output, weight;
  };
  const std::vector<Types> all = {{at::kFloat, at::kFloat, at::kFloat},
                                  {at::kFloat, at::kHalf, at::kFloat},
                                  {at::kFloat, at::kBFloat16, at::kFloat},
                                  {at::kHalf, at::kHalf, at::kFloat},
                                  {at::kHalf, at::kHalf, at::kHalf},
                                  {at::kBFloat16, at::kBFloat16, at::kFloat},
                                  {at::kBFloat16, at::kBFloat16, at::kBFloat16}};
  at::manual_seed(1);
  for (const auto& types : all) {
    for (const int64_t width : {1, 7, 128, 768, 1000, 1024, 1600, 3072, 5120, 8190, 16384}) {
      for (const int64_t rows : {1, 3, 257, 2100}) {
        if (rows == 2100 && width > 1024) continue;
        for (const int64_t offset : {0, 1}) {
          if (offset == 1 && rows != 3) continue;
          CAPTURE(types.input, types.output, types.weight, width, rows, offset, centred, adds);
          NormCase one{types.input, types.output, types.weight, rows, width, centred, adds};
          one.has_bias = centred && rows != 1;
          one.offset = offset;
          if constexpr (cuda::kBuilt) NormKernels(one).check();
        }
      }
    }
  }
}

}  // namespace lightning::testing
