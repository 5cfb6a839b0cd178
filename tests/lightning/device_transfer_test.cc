#include "lightning/device_transfer.h"

#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/torch.h>

#include <catch2/catch.hpp>
#include <utility>
#include <vector>

#include "lightning/batch.h"

using namespace lightning;

namespace {

bool no_gpu() {
  if (torch::cuda::is_available() && torch::cuda::device_count() > 0) return false;
  WARN("needs a GPU");
  return true;
}

}  // namespace

TEST_CASE("a batch that is where it shall be is not copied", "[transfer]") {
  const auto tensor = torch::arange(6);
  const auto moved = Batch::map({{"x", tensor}, {"name", "a"}}).to(at::kCPU);
  CHECK(moved["x"].is_same(tensor));
  CHECK(moved.at("name").as_string() == "a");
}

TEST_CASE("a batch arrives on a GPU as Tensor::to would bring it", "[transfer][gpu]") {
  if (no_gpu()) return;
  const at::Device gpu("cuda:0");
  const auto matrix = torch::randn({5, 7});
  const std::vector<std::pair<const char*, at::Tensor>> all = {
      {"matrix", matrix},
      {"transposed", matrix.t()},
      {"columns", matrix.slice(1, 0, 7, 2)},
      {"transposed columns", matrix.slice(1, 0, 7, 2).t()},
      {"expanded", matrix.select(0, 0).expand({3, 7})},
      {"scalar", torch::tensor(3.5)},
      {"empty", torch::empty({0, 4})},
      {"booleans", matrix > 0},
      {"integers", torch::arange(9)},
      {"halves", matrix.to(at::kHalf)},
      {"pinned", matrix.pin_memory()},
      {"channels last", torch::randn({2, 3, 4, 5}).contiguous(at::MemoryFormat::ChannelsLast)},
      {"conjugate", torch::randn({4}, at::kComplexFloat).conj()},
      {"sparse", (matrix > 0).to(at::kFloat).to_sparse()},
      {"on the GPU already", matrix.to(gpu)},
  };
  for (const auto& [what, tensor] : all) {
    INFO(what);
    const auto moved = Batch(tensor).to(gpu).tensor();
    const auto expected = tensor.to(gpu);
    CHECK(moved.device() == gpu);
    CHECK(moved.scalar_type() == expected.scalar_type());
    if (tensor.layout() == at::kStrided) CHECK(moved.strides() == expected.strides());
    CHECK(at::equal(moved.to_dense().cpu(), expected.to_dense().cpu()));
  }
  auto learned = torch::randn({3}, at::TensorOptions().requires_grad(true));
  CHECK(Batch(learned).to(gpu).tensor().requires_grad());
  CHECK(Batch(matrix).to(at::kCUDA).tensor().is_cuda());
}

TEST_CASE("batches in flight do not overwrite one another", "[transfer][gpu]") {
  if (no_gpu()) return;
  const at::Device gpu("cuda:0");
  // Host and device memory of a batch are free for the next one while the GPU is still busy.
  auto busy = torch::randn({2048, 2048}, gpu);
  auto sum = torch::zeros({}, at::TensorOptions().device(gpu).dtype(at::kDouble));
  double expected = 0;
  for (int i = 0; i < 200; ++i) {
    auto host = torch::full({1 << 16}, i, at::kFloat);
    const auto batch = Batch::list({host, host + 1}).to(gpu);
    host = at::Tensor();
    busy = busy.mm(busy).clamp(-1, 1);
    sum += batch[0].sum(at::kDouble) + batch[1].sum(at::kDouble);
    expected += (2.0 * i + 1) * (1 << 16);
  }
  CHECK(sum.item<double>() == expected);
}

TEST_CASE("the host does not wait for the GPU while a batch is moved", "[transfer][gpu]") {
  if (no_gpu()) return;
  const at::Device gpu("cuda:0");
  const auto host = torch::ones({1 << 20});
  Batch(host).to(gpu);  // takes pinned memory, which waits
  auto busy = torch::randn({4096, 4096}, gpu);
  torch::cuda::synchronize();
  for (int i = 0; i < 60; ++i) busy = busy.mm(busy).clamp(-1, 1);  // tens of milliseconds
  const auto moved = Batch(host).to(gpu).tensor();
  const auto done = busy.sum();
  // Were the copy queued behind the products, or had the host waited, nothing would be left to do.
  const c10::impl::VirtualGuardImpl impl(c10::kCUDA);
  CHECK_FALSE(impl.queryStream(impl.getStream(gpu)));
  CHECK(moved.sum().item<double>() == 1 << 20);
}
