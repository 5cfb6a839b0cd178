#include "lightning/cuda/column_sum.h"

#include <torch/torch.h>

#include <catch2/catch.hpp>

#include "lightning/cuda/column_sum_of.h"
#include "lightning/cuda/launch.h"
#include "tests/nn/gradients.h"

using namespace lightning;
using namespace lightning::testing;
using Catch::Contains;

TEST_CASE("column_sum gives float32, and float64 for float64", "[cuda]") {
  torch::manual_seed(1);
  for (const auto dtype : {at::kDouble, at::kFloat, at::kHalf, at::kBFloat16}) {
    const auto matrix = at::randn({33, 7}, at::kDouble).to(dtype);
    for (const auto& one : {matrix, matrix.t(), matrix.narrow(1, 1, 5), matrix.narrow(0, 0, 0)}) {
      const auto sums = cuda::column_sum(one);
      CHECK(sums.scalar_type() == (dtype == at::kDouble ? at::kDouble : at::kFloat));
      CHECK(sums.sizes() == at::IntArrayRef({one.size(1)}));
      CHECK(relative_error(sums, one.to(at::kDouble).sum(0)) <= 1e-5);
    }
  }
  const auto cube = at::randn({2, 3, 4}, at::kDouble);
  CHECK(at::allclose(cuda::column_sum(cube), cube.sum(at::IntArrayRef{0, 1})));
  CHECK(cuda::column_sum(at::ones({2, 3, 0})).sizes() == at::IntArrayRef({0}));
  CHECK_THROWS_WITH(cuda::column_sum(at::ones({})), Contains("expected [..., columns]"));
}

TEST_CASE("column_sum takes what was left with a tensor, once, and not after a write", "[cuda]") {
  const auto matrix = at::ones({4, 3}), left = at::full({3}, 7.0), sums = at::full({3}, 4.0);
  cuda::leave_column_sum(matrix, left);
  CHECK(at::equal(cuda::column_sum(matrix.view({2, 2, 3})), sums));
  CHECK(cuda::column_sum(matrix).is_same(left));
  CHECK(at::equal(cuda::column_sum(matrix), sums));
  cuda::leave_column_sum(matrix, left);
  matrix.mul_(2);
  CHECK(at::equal(cuda::column_sum(matrix), sums * 2));
}

TEST_CASE("column_sum's kernel agrees with float64, the same bits each time", "[cuda][gpu]") {
  if (!torch::cuda::is_available()) {
    WARN("needs a GPU");
    return;
  }
  torch::manual_seed(1);
  for (const auto dtype : {at::kDouble, at::kFloat, at::kHalf, at::kBFloat16}) {
    for (const int64_t columns : {1, 7, 128, 768, 1000, 3072, 50257}) {
      for (const int64_t rows : {0, 1, 3, 257, 5000}) {
        CAPTURE(dtype, columns, rows);
        const auto matrix = at::randn({rows, columns}, at::device(at::kCUDA).dtype(dtype));
        const auto views = {matrix, matrix.narrow(1, columns > 1 ? 1 : 0, (columns + 1) / 2),
                            at::randn({columns, rows}, matrix.options()).t()};
        for (const auto& one : views) {
          const auto sums = cuda::column_sum(one);
          CHECK(relative_error(sums, one.to(at::kDouble).sum(0)) <= 1e-5);
          CHECK(at::equal(sums, cuda::column_sum(one)));
        }
      }
    }
  }
}

TEST_CASE("column_sum's kernel can add to what is there", "[cuda][gpu]") {
  if (!torch::cuda::is_available()) {
    WARN("needs a GPU");
    return;
  }
  if constexpr (cuda::kBuilt) {
    for (const int64_t rows : {3, 3000}) {
      const auto matrix = at::randn({rows, 96}, at::device(at::kCUDA));
      const auto before = at::randn({96}, matrix.options());
      const auto sums = before.clone();
      cuda::ColumnSum arguments;
      arguments.matrix = matrix.data_ptr();
      arguments.rows = rows;
      arguments.columns = arguments.row_stride = 96;
      arguments.sums = sums.data_ptr<float>();
      arguments.accumulate = true;
      const auto workspace = at::full({cuda::column_sum_workspace(arguments)},
                                      std::numeric_limits<double>::quiet_NaN(), matrix.options());
      arguments.workspace = workspace.data_ptr<float>();
      cuda::column_sum(arguments, cuda::stream_of(matrix));
      CHECK(relative_error(sums, before.to(at::kDouble) + matrix.to(at::kDouble).sum(0)) <= 1e-5);
    }
  }
}
