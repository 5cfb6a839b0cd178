// GPT-2 as a user of LibTorch writes it: torch::nn and at:: only. Its parameters come in the order
// of examples/gpt2/gpt.h.
#pragma once

#include <torch/torch.h>

#include <cmath>
#include <string>

#include "examples/gpt2/gpt.h"

namespace benchmark {

// GPT-2's: 0.02, and less by the number of additions for what is added to the residual stream.
inline void initialize(torch::nn::Module& net, int64_t layers) {
  const torch::NoGradGuard no_grad;
  const double added = 0.02 / std::sqrt(2.0 * static_cast<double>(layers));
  for (auto& item : net.named_parameters()) {
    const auto ends_with = [&](const std::string& end) {
      return item.key().size() >= end.size() &&
             item.key().compare(item.key().size() - end.size(), end.size(), end) == 0;
    };
    if (item.value().dim() == 2) {
      const bool is_added = ends_with("proj.weight") || ends_with("fc2.weight");
      item.value().normal_(0.0, is_added ? added : 0.02);
    } else if (ends_with("bias")) {
      item.value().zero_();
    }
  }
}

struct PlainAttentionImpl : torch::nn::Module {
  PlainAttentionImpl(int64_t width, int64_t heads) : heads(heads) {
    qkv = register_module("qkv", torch::nn::Linear(width, 3 * width));
    proj = register_module("proj", torch::nn::Linear(width, width));
  }
  at::Tensor forward(const at::Tensor& x) {
    const auto batch = x.size(0), time = x.size(1), width = x.size(2);
    const auto parts = qkv->forward(x).chunk(3, 2);
    const auto head = [&](const at::Tensor& part) {
      return part.view({batch, time, heads, width / heads}).transpose(1, 2);
    };
    const auto y = at::scaled_dot_product_attention(head(parts[0]), head(parts[1]), head(parts[2]),
                                                    {}, /*dropout_p=*/0.0, /*is_causal=*/true);
    return proj->forward(y.transpose(1, 2).reshape({batch, time, width}));
  }

  int64_t heads;
  torch::nn::Linear qkv{nullptr}, proj{nullptr};
};
TORCH_MODULE(PlainAttention);

struct PlainMLPImpl : torch::nn::Module {
  explicit PlainMLPImpl(int64_t width) {
    fc1 = register_module("fc1", torch::nn::Linear(width, 4 * width));
    fc2 = register_module("fc2", torch::nn::Linear(4 * width, width));
  }
  at::Tensor forward(const at::Tensor& x) {
    return fc2->forward(at::gelu(fc1->forward(x), "tanh"));
  }

  torch::nn::Linear fc1{nullptr}, fc2{nullptr};
};
TORCH_MODULE(PlainMLP);

struct PlainBlockImpl : torch::nn::Module {
  PlainBlockImpl(int64_t width, int64_t heads) {
    const torch::nn::LayerNormOptions norm({width});
    ln1 = register_module("ln1", torch::nn::LayerNorm(norm));
    attention = register_module("attention", PlainAttention(width, heads));
    ln2 = register_module("ln2", torch::nn::LayerNorm(norm));
    mlp = register_module("mlp", PlainMLP(width));
  }
  at::Tensor forward(at::Tensor x) {
    x = x + attention->forward(ln1->forward(x));
    return x + mlp->forward(ln2->forward(x));
  }

  torch::nn::LayerNorm ln1{nullptr}, ln2{nullptr};
  PlainAttention attention{nullptr};
  PlainMLP mlp{nullptr};
};
TORCH_MODULE(PlainBlock);

struct PlainGPTImpl : torch::nn::Module {
  explicit PlainGPTImpl(const GPTOptions& o) {
    tokens = register_module("tokens", torch::nn::Embedding(o.vocabulary(), o.features()));
    positions = register_module("positions", torch::nn::Embedding(o.context(), o.features()));
    for (int64_t i = 0; i < o.layers(); ++i) {
      blocks->push_back(PlainBlock(o.features(), o.heads()));
    }
    register_module("blocks", blocks);
    norm =
        register_module("norm", torch::nn::LayerNorm(torch::nn::LayerNormOptions({o.features()})));
    initialize(*this, o.layers());
  }
  at::Tensor loss(const at::Tensor& x, const at::Tensor& y) {
    const auto places = torch::arange(x.size(1), x.options());
    auto h = tokens->forward(x) + positions->forward(places);
    for (const auto& block : *blocks) h = block->as<PlainBlock>()->forward(h);
    const auto logits = torch::nn::functional::linear(norm->forward(h), tokens->weight);
    return at::cross_entropy_loss(logits.flatten(0, 1), y.flatten());
  }

  torch::nn::Embedding tokens{nullptr}, positions{nullptr};
  torch::nn::ModuleList blocks;
  torch::nn::LayerNorm norm{nullptr};
};
TORCH_MODULE(PlainGPT);

}  // namespace benchmark
