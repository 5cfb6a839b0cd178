// Many copies at once, against copy_() of the same tensors.
#include "strategies/bulk_copy.h"

#include <torch/torch.h>
#include <unistd.h>

#include <catch2/catch.hpp>
#include <string>
#include <utility>
#include <vector>

#include "lightning/checkpoint/torch_file.h"
#include "lightning/errors.h"
#include "tests/support/temp_dir.h"

using namespace lightning;
using Catch::Contains;
using lightning::testing::TempDir;

namespace {

constexpr int64_t kPiece = int64_t{1} << 20;  // elements of float32 that a thread takes at once

// Pairs of what is written and what is read, of each kind that a checkpoint may hold.
std::vector<std::pair<at::Tensor, at::Tensor>> copies(at::Device device) {
  torch::manual_seed(3);
  const auto to = at::TensorOptions(device);
  const auto floats = at::randn({3, kPiece + 5});
  const auto bytes = at::randint(0, 255, {2 * kPiece * 4 + 77}, at::kByte);
  return {
      {at::zeros({3, kPiece + 5}, to), floats},
      {at::zeros({4 * kPiece}, to), at::randn({4 * kPiece})},
      {at::zeros({2, kPiece + 5}, to), floats.narrow(0, 1, 2)},
      {at::zeros({9, 4}, to).narrow(0, 2, 5), at::randn({5, 4})},
      {at::zeros({bytes.numel() - 3}, to.dtype(at::kByte)), bytes.narrow(0, 3, bytes.numel() - 3)},
      {at::zeros({}, to), at::full({}, 2.5)},
      {at::zeros({0, 7}, to), at::zeros({0, 7})},
      {at::zeros({6}, to.dtype(at::kBool)), at::randn({6}) > 0},
      {at::zeros({kPiece}, to.dtype(at::kBFloat16)), at::randn({kPiece})},
      {at::zeros({4, 6}, to).t(), at::randn({6, 4})},
      {at::zeros({6, 4}, to), at::randn({4, 6}).t()},
      {at::zeros({5}, to.dtype(at::kComplexFloat)), at::randn({5}, at::kComplexFloat).conj()},
      {at::zeros({5}, to.dtype(at::kComplexFloat)), at::randn({5}, at::kComplexFloat)},
  };
}

void check_copies(at::Device device) {
  BulkCopy bulk;
  auto pairs = copies(device);
  for (const auto& [to, from] : pairs) bulk.add(to, from);
  for (const auto& [to, from] : pairs) {
    CHECK((to.numel() == 0 || at::count_nonzero(to).item<int64_t>() == 0));  // not yet
  }
  bulk.run();
  for (size_t i = 0; i < pairs.size(); ++i) {
    CAPTURE(i);
    const auto& [to, from] = pairs[i];
    CHECK(at::equal(to.cpu(), from.to(to.scalar_type()).resolve_conj()));
  }
}

}  // namespace

TEST_CASE("tensors of all sizes, dtypes and layouts are copied as copy_ copies them", "[fsdp]") {
  check_copies(at::kCPU);
}

TEST_CASE("tensors are copied to a GPU, behind what still runs there", "[fsdp][gpu]") {
  if (!torch::cuda::is_available()) {
    WARN("needs a GPU");
    return;
  }
  check_copies(at::Device(at::kCUDA, 0));
  const auto device = at::TensorOptions(at::kCUDA);
  const auto values = at::randn({16 * kPiece});
  const auto factor = at::randn({4096, 4096}, device);
  const auto to = at::empty({16 * kPiece}, device);
  auto slow = factor;
  for (int i = 0; i < 50; ++i) slow = at::mm(slow, factor);
  to.fill_(slow[0][0]);  // comes late
  BulkCopy bulk;
  bulk.add(to, values);
  bulk.run();
  CHECK(at::equal(to.cpu(), values));
}

TEST_CASE("of copies to the same memory the last one stays", "[fsdp]") {
  const auto to = at::zeros({3 * kPiece});
  BulkCopy bulk;
  bulk.add(to, at::full({3 * kPiece}, 1.0));
  bulk.add(to.narrow(0, kPiece, 2 * kPiece), at::full({2 * kPiece}, 2.0));
  bulk.add(to.narrow(0, 2 * kPiece - 1, 2), at::full({2}, 3.0));
  bulk.run();
  CHECK(to[kPiece - 1].item<float>() == 1);
  CHECK(to[kPiece].item<float>() == 2);
  CHECK(to[2 * kPiece - 2].item<float>() == 2);
  CHECK(to[2 * kPiece - 1].item<float>() == 3);
  CHECK(to[2 * kPiece].item<float>() == 3);
  CHECK(to[2 * kPiece + 1].item<float>() == 2);
}

TEST_CASE("a file that is cut short before its tensors are copied is an error", "[fsdp]") {
  const TempDir dir;
  const auto path = dir.path("a");
  write_torch_file(State::dict({{"a", at::full({4 * kPiece}, 1.0)}}), path);
  const auto state = read_torch_file(path);
  const auto to = at::zeros({4 * kPiece});
  BulkCopy bulk;
  bulk.add(to, state.at("a").as_tensor());
  REQUIRE(::truncate(path.c_str(), 2 * kPiece * 4) == 0);
  CHECK_THROWS_WITH(bulk.run(), Contains(path) && Contains("was cut short"));
}
