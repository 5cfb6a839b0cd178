// The layers of lightning/nn, whose forward and backward are their own, in shards and regions.
#include <ATen/autocast_mode.h>
#include <torch/torch.h>

#include <catch2/catch.hpp>

#include "lightning/nn/add_layer_norm.h"
#include "lightning/nn/attention.h"
#include "lightning/nn/embedding.h"
#include "lightning/nn/lm_head.h"
#include "lightning/nn/mlp.h"
#include "lightning/param/activation_checkpoint.h"
#include "lightning/param/deferred_init.h"
#include "tests/param/sharded.h"

using namespace lightning;

namespace {

struct BlockImpl : torch::nn::Module {
  BlockImpl(int64_t width, const std::string& activation) {
    norm1 = register_module("norm1", nn::AddLayerNorm(std::vector<int64_t>{width}));
    attention = register_module(
        "attention", nn::Attention(nn::AttentionOptions(width, 2).rotary(true).dropout(0.1)));
    norm2 = register_module("norm2", nn::AddLayerNorm(std::vector<int64_t>{width}));
    mlp = register_module("mlp", nn::MLP(nn::MLPOptions(width, 0).activation(activation)));
  }
  std::pair<at::Tensor, at::Tensor> forward(at::Tensor x, at::Tensor delta) {
    at::Tensor y;
    std::tie(x, y) = norm1(x, delta);
    std::tie(x, y) = norm2(x, attention(y));
    return {x, mlp(y)};
  }
  nn::AddLayerNorm norm1{nullptr}, norm2{nullptr};
  nn::Attention attention{nullptr};
  nn::MLP mlp{nullptr};
};
TORCH_MODULE(Block);

struct GPT : torch::nn::Module {
  explicit GPT(const std::string& activation) {
    table = register_module("table", nn::Embedding(torch::nn::EmbeddingOptions(13, 8)));
    for (int64_t i = 0; i < 3; ++i) blocks->push_back(Block(8, activation));
    register_module("blocks", blocks);
    head = register_module("head", nn::LMHead(table->weight));
  }
  at::Tensor loss(const at::Tensor& ids) {
    auto x = table(ids);
    auto delta = torch::zeros_like(x);
    for (const auto& block : *blocks) {
      std::tie(x, delta) = block->as<BlockImpl>()->forward(x, delta);
    }
    return head->loss(x + delta, ids.roll(1, 1));
  }
  nn::Embedding table{nullptr};
  torch::nn::ModuleList blocks;
  nn::LMHead head{nullptr};
};

at::Tensor train(GPT& model, bool autocast) {
  torch::manual_seed(2);
  const auto ids = torch::randint(13, {2, 6});
  at::autocast::set_autocast_enabled(at::kCPU, autocast);
  const auto loss = model.loss(ids);
  at::autocast::clear_cache();
  at::autocast::set_autocast_enabled(at::kCPU, false);
  loss.backward();
  return loss.detach();
}

}  // namespace

TEST_CASE("lightning/nn layers give the same in shards, in regions and born empty, bit by bit",
          "[param][nn]") {
  const auto* const activation = GENERATE("gelu", "swiglu");
  const bool autocast = GENERATE(false, true);
  const bool regions = GENERATE(false, true);
  CAPTURE(activation, autocast, regions);
  torch::manual_seed(1);
  GPT plain(activation);
  torch::manual_seed(1);
  DeferredInit deferred;
  std::shared_ptr<GPT> model;
  {
    const Scope scope = deferred.record();
    model = std::make_shared<GPT>(activation);
  }
  deferred.materialize(*model);

  auto keeper = std::make_unique<Shards>(3);
  auto* const shards = keeper.get();
  Units units(plan_units(*model), std::move(keeper));
  std::unique_ptr<ActivationCheckpoints> checkpoints;
  if (regions) checkpoints = std::make_unique<ActivationCheckpoints>(*model);
  take_region_counts();
  const auto expected = train(plain, autocast);
  const Scope use = units.use(true);
  const Scope recording = checkpoints == nullptr ? nullptr : checkpoints->use();
  CHECK(torch::equal(train(*model, autocast), expected));
  CHECK(take_region_counts().replayed == (regions ? 3 : 0));

  for (const auto& unit : units.units()) {
    for (const auto& parameter : unit->parameters()) {
      INFO(parameter->name());
      const auto gradient = plain.named_parameters()[parameter->name()].grad();
      CHECK(torch::equal(shards->gradient(*parameter), gradient));
    }
  }
}
