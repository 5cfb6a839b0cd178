// What stands behind parameters, on a GPU: its generator, and backward on a thread of its own.
#include <c10/core/CachingDeviceAllocator.h>
#include <torch/torch.h>

#include <catch2/catch.hpp>
#include <functional>

#include "lightning/nn/add_layer_norm.h"
#include "lightning/nn/attention.h"
#include "lightning/nn/embedding.h"
#include "lightning/nn/layer_norm.h"
#include "lightning/nn/lm_head.h"
#include "lightning/nn/mlp.h"
#include "lightning/param/activation_checkpoint.h"
#include "lightning/param/deferred_init.h"
#include "tests/param/sharded.h"

using namespace lightning;
namespace fast = lightning::nn;

namespace {

struct BlockImpl : torch::nn::Module {
  explicit BlockImpl(int64_t width) {
    norm1 = register_module("norm1", torch::nn::LayerNorm(torch::nn::LayerNormOptions({width})));
    qkv = register_module("qkv", torch::nn::Linear(width, 3 * width));
    norm2 = register_module("norm2", torch::nn::LayerNorm(torch::nn::LayerNormOptions({width})));
    up = register_module("up", torch::nn::Linear(width, 4 * width));
    down = register_module("down", torch::nn::Linear(4 * width, width));
  }
  at::Tensor forward(at::Tensor x) {
    const auto parts =
        qkv(norm1(x)).view({x.size(0), x.size(1), 3, 4, -1}).permute({2, 0, 3, 1, 4});
    const auto attended = at::scaled_dot_product_attention(parts[0], parts[1], parts[2],
                                                           /*attn_mask=*/{}, 0.2, true);
    x = x + attended.transpose(1, 2).reshape(x.sizes());
    return x + torch::dropout(down(torch::gelu(up(norm2(x)))), 0.2, is_training());
  }
  torch::nn::LayerNorm norm1{nullptr}, norm2{nullptr};
  torch::nn::Linear qkv{nullptr}, up{nullptr}, down{nullptr};
};
TORCH_MODULE(Block);

struct GPT : torch::nn::Module {
  GPT() {
    table = register_module("table", torch::nn::Embedding(50, 64));
    for (int64_t i = 0; i < 3; ++i) blocks->push_back(Block(64));
    register_module("blocks", blocks);
    head = register_module("head", torch::nn::Linear(64, 50));
  }
  at::Tensor loss(const at::Tensor& ids) {
    auto x = table(ids);
    for (const auto& block : *blocks) x = block->as<BlockImpl>()->forward(x);
    return torch::cross_entropy_loss(head(x).flatten(0, 1).to(torch::kFloat),
                                     ids.roll(1, 1).flatten());
  }
  torch::nn::Embedding table{nullptr};
  torch::nn::ModuleList blocks;
  torch::nn::Linear head{nullptr};
};

// On layers whose kernels no operator shows, in 16 bits.
struct FastBlockImpl : torch::nn::Module {
  explicit FastBlockImpl(int64_t width) {
    norm1 = register_module("norm1", fast::LayerNorm(std::vector<int64_t>{width}));
    attention = register_module("attention",
                                fast::Attention(fast::AttentionOptions(width, 4).rotary(true)));
    norm2 = register_module("norm2", fast::AddLayerNorm(std::vector<int64_t>{width}));
    mlp = register_module("mlp",
                          fast::MLP(fast::MLPOptions(width, 4 * width).activation("gelu_tanh")));
    gated = register_module("gated",
                            fast::MLP(fast::MLPOptions(width, 2 * width).activation("swiglu")));
  }
  at::Tensor forward(const at::Tensor& x) {
    const auto [sum, normalized] = norm2->forward(x, attention->forward(norm1->forward(x)));
    return sum + mlp->forward(normalized) + gated->forward(normalized);
  }
  fast::LayerNorm norm1{nullptr};
  fast::Attention attention{nullptr};
  fast::AddLayerNorm norm2{nullptr};
  fast::MLP mlp{nullptr}, gated{nullptr};
};
TORCH_MODULE(FastBlock);

struct FastGPT : torch::nn::Module {
  FastGPT() {
    table = register_module("table", fast::Embedding(56, 64));
    for (int64_t i = 0; i < 3; ++i) blocks->push_back(FastBlock(64));
    register_module("blocks", blocks);
    head = register_module("head", fast::LMHead(64, 56));
  }
  at::Tensor loss(const at::Tensor& ids) {
    auto x = table->forward(ids);
    for (const auto& block : *blocks) x = block->as<FastBlockImpl>()->forward(x);
    return head->loss(x, ids.roll(1, 1));
  }
  fast::Embedding table{nullptr};
  torch::nn::ModuleList blocks;
  fast::LMHead head{nullptr};
};

template <class Model>
std::shared_ptr<Model> make(c10::Device device, at::ScalarType dtype) {
  torch::manual_seed(1);
  auto model = std::make_shared<Model>();
  model->to(device, dtype);
  return model;
}

bool no_gpu() {
  if (torch::cuda::is_available()) return false;
  WARN("needs a GPU");
  return true;
}

bool near(const at::Tensor& a, const at::Tensor& b) {
  const auto error = (a.to(at::kDouble) - b.to(at::kDouble)).norm() / b.to(at::kDouble).norm();
  return error.item<double>() < (b.scalar_type() == at::kFloat ? 1e-5 : 1e-2);
}

// Attention's backward adds in no fixed order, so near; another dropout mask would be far.
template <class Model>
void check_equal(c10::Device device, at::ScalarType dtype, bool sharded, bool regions) {
  CAPTURE(dtype, sharded, regions);
  const auto plain = make<Model>(device, dtype), model = make<Model>(device, dtype);
  Shards* shards = nullptr;
  std::unique_ptr<Units> units;
  if (sharded) {
    auto keeper = std::make_unique<Shards>(3);
    shards = keeper.get();
    units = std::make_unique<Units>(plan_units(*model), std::move(keeper));
  }
  std::unique_ptr<ActivationCheckpoints> checkpoints;
  if (regions) checkpoints = std::make_unique<ActivationCheckpoints>(*model);
  const auto ids = torch::randint(50, {4, 32}, at::dtype(at::kLong).device(device));
  const auto step = [&](Model& gpt, Units* use_units, ActivationCheckpoints* use_checkpoints) {
    torch::manual_seed(2);
    at::Tensor loss;
    {
      const Scope use = use_units == nullptr ? nullptr : use_units->use(true);
      const Scope record = use_checkpoints == nullptr ? nullptr : use_checkpoints->use();
      loss = gpt.loss(ids);
    }
    loss.backward();
    // Where the generator is afterwards.
    return std::make_pair(loss.item<double>(), torch::rand(1, device).item<double>());
  };
  take_region_counts();
  const auto expected = step(*plain, nullptr, nullptr);
  CHECK(step(*model, units.get(), checkpoints.get()) == expected);
  CHECK(take_region_counts().replayed == (regions ? 3 : 0));
  const auto names = model->named_parameters();
  for (const auto& item : plain->named_parameters()) {
    INFO(item.key());
    if (!sharded) CHECK(near(names[item.key()].grad(), item.value().grad()));
  }
  if (!sharded) return;
  for (const auto& unit : units->units()) {
    CHECK_FALSE(unit->is_whole());
    for (const auto& each : unit->parameters()) {
      INFO(each->name());
      CHECK(near(shards->gradient(*each), plain->named_parameters()[each->name()].grad()));
    }
  }
}

// Draws on the device that it is told.
struct Drawn : torch::nn::Module {
  explicit Drawn(c10::Device device) {
    const auto options = at::TensorOptions().device(device);
    const torch::NoGradGuard no_grad;
    a = register_parameter("a", torch::empty({300, 70}, options));
    torch::nn::init::kaiming_uniform_(a);  // drawn, and then drawn over
    b = register_parameter("b", torch::randn({1000}, options) * 0.02);
    torch::nn::init::normal_(a, 0, 0.02);
    c = register_buffer("c", torch::arange(7, options).to(torch::kFloat).cos());
    d = register_parameter("d", torch::rand({33}, options));
  }
  at::Tensor a, b, c, d;
};

}  // namespace

TEST_CASE("on a GPU shards and regions leave losses, gradients and the generator as they are",
          "[param][gpu]") {
  if (no_gpu()) return;
  for (const auto dtype : {at::kFloat, at::kBFloat16}) {
    for (const bool sharded : {false, true}) {
      for (const bool regions : {false, true}) {
        if (!sharded && !regions) continue;
        check_equal<GPT>(at::kCUDA, dtype, sharded, regions);
        check_equal<FastGPT>(at::kCUDA, dtype, sharded, regions);
      }
    }
  }
}

TEST_CASE("on a GPU regions drop what the kernels of lightning/nn fill", "[param][gpu]") {
  if (no_gpu()) return;
  const c10::Device device(at::kCUDA, 0);
  const auto model = make<FastGPT>(device, at::kBFloat16);
  const auto ids = torch::randint(50, {8, 128}, at::dtype(at::kLong).device(device));
  const auto bytes = [] {
    const auto all = static_cast<size_t>(c10::CachingAllocator::StatType::AGGREGATE);
    return c10::getDeviceAllocator(c10::kCUDA)->getDeviceStats(0).allocated_bytes[all].current;
  };
  // Between forward and backward.
  const auto live = [&](ActivationCheckpoints* checkpoints) {
    const auto before = bytes();
    at::Tensor loss;
    {
      const Scope record = checkpoints == nullptr ? nullptr : checkpoints->use();
      loss = model->loss(ids);
    }
    const auto held = bytes() - before;
    loss.backward();
    return held;
  };
  live(nullptr);  // gradients, tables and workspaces are there from now on
  const auto plain = live(nullptr);
  ActivationCheckpoints checkpoints(*model);
  const auto dropped = live(&checkpoints);
  INFO(plain << " bytes without regions, " << dropped << " with them");
  CHECK(dropped < plain / 3);
}

TEST_CASE("a model that is born empty on a GPU has the weights that are drawn there",
          "[param][gpu]") {
  if (no_gpu()) return;
  const c10::Device device(at::kCUDA, 0);
  torch::manual_seed(3);
  const Drawn expected(device);
  const auto next = torch::rand(1, device).item<double>();
  torch::manual_seed(3);
  DeferredInit deferred(device);
  std::shared_ptr<Drawn> model;
  {
    const Scope scope = deferred.record();
    model = std::make_shared<Drawn>(device);
  }
  CHECK(model->a.is_meta());
  deferred.materialize(*model);
  CHECK(torch::rand(1, device).item<double>() == next);
  for (const auto& [got, wanted] : {std::make_pair(model->a, expected.a),
                                    {model->b, expected.b},
                                    {model->c, expected.c},
                                    {model->d, expected.d}}) {
    CHECK(got.is_cuda());
    CHECK(torch::equal(got, wanted));
  }
}
