// A GPT as GPT-2 is, on the layers of lightning/nn.
//
// B batch, T time, C features, V vocabulary.
#pragma once

#include <torch/torch.h>

#include <cmath>
#include <string>
#include <tuple>
#include <vector>

#include "lightning.h"

struct GPTOptions : lightning::Options<GPTOptions> {
  OPTION(int64_t, layers, 4, "Blocks of attention and feed-forward.");
  OPTION(int64_t, heads, 4, "Heads of an attention.");
  OPTION(int64_t, features, 128, "Width of the residual stream.");
  OPTION(int64_t, vocabulary, 256, "Tokens; bytes need 256, multiples of 64 are fast.");
  OPTION(int64_t, context, 128, "The longest sequence.");
  OPTION(double, dropout, 0.0, "The part of features and attention that training drops.");
  OPTION(bool, residual_in_fp32, true,
         "Whether the residual stream stays in float32 under mixed precision, as autocast has it; "
         "in 16 bits a step moves fewer bytes.");
  OPTION(double, lr, 3e-3, "The highest learning rate: it rises to this and falls to a tenth.");
  OPTION(int64_t, warmup_steps, 100, "Steps in which the learning rate rises.");
  OPTION(double, weight_decay, 0.1, "Decay of the matrices; biases and norms have none.");
};

namespace gpt {

namespace nn = lightning::nn;

// Attention and feed-forward, each added to the residual stream. A norm computes the sum as well,
// in one pass, so a block ends with the norm that the next one reads.
struct BlockImpl : torch::nn::Module {
  explicit BlockImpl(const GPTOptions& o) {
    const int64_t width = o.features();
    attention = register_module(
        "attention", nn::Attention(nn::AttentionOptions(width, o.heads()).dropout(o.dropout())));
    dropout = register_module("dropout", torch::nn::Dropout(o.dropout()));
    norm1 = register_module("norm1", nn::AddLayerNorm(std::vector<int64_t>{width}));
    mlp = register_module(
        "mlp",
        nn::MLP(nn::MLPOptions(width, 4 * width).activation("gelu_tanh").dropout(o.dropout())));
    norm2 = register_module("norm2", nn::AddLayerNorm(std::vector<int64_t>{width}));
  }
  // The residual stream and its norm, [B, T, C], to the same.
  std::tuple<at::Tensor, at::Tensor> forward(at::Tensor x_BTC, at::Tensor normalized_BTC) {
    const auto attended = dropout->forward(attention->forward(normalized_BTC));
    std::tie(x_BTC, normalized_BTC) = norm1->forward(x_BTC, attended);
    return norm2->forward(x_BTC, mlp->forward(normalized_BTC));
  }

  nn::Attention attention{nullptr};
  torch::nn::Dropout dropout{nullptr};
  nn::AddLayerNorm norm1{nullptr}, norm2{nullptr};
  nn::MLP mlp{nullptr};
};
TORCH_MODULE(Block);

struct GPTImpl : torch::nn::Module {
  explicit GPTImpl(const GPTOptions& o) {
    tokens = register_module("tokens", nn::Embedding(o.vocabulary(), o.features()));
    positions = register_module("positions", nn::Embedding(o.context(), o.features()));
    dropout = register_module("dropout", torch::nn::Dropout(o.dropout()));
    norm = register_module("norm", nn::LayerNorm(std::vector<int64_t>{o.features()}));
    for (int64_t i = 0; i < o.layers(); ++i) blocks->push_back(Block(o));
    register_module("blocks", blocks);
    head = nn::LMHead(tokens->weight);
    residual_in_fp32 = o.residual_in_fp32();
    initialize(static_cast<double>(o.layers()));
  }
  // GPT-2's: 0.02, and less by the number of additions for what is added to the residual stream.
  void initialize(double layers) {
    const torch::NoGradGuard no_grad;
    const double added = 0.02 / std::sqrt(2.0 * layers);
    for (auto& item : named_parameters()) {
      const auto& name = item.key();
      const bool is_added = name.find("proj.weight") != std::string::npos ||
                            name.find("fc2.weight") != std::string::npos;
      if (item.value().dim() == 2) {
        item.value().normal_(0.0, is_added ? added : 0.02);
      } else if (name.find("bias") != std::string::npos) {
        item.value().zero_();
      }
    }
  }
  // What the head reads, [B, T, C], of tokens [B, T].
  at::Tensor hidden(const at::Tensor& tokens_BT) {
    at::Tensor x = dropout->forward(nn::embed(tokens_BT, tokens->weight, positions->weight));
    if (!residual_in_fp32) x = x.to(nn::compute_dtype(x));
    at::Tensor normalized = norm->forward(x);
    for (const auto& block : *blocks) {
      std::tie(x, normalized) = block->as<Block>()->forward(x, normalized);
    }
    return normalized;
  }
  at::Tensor loss(const at::Tensor& tokens_BT, const at::Tensor& next_BT) {
    return head->loss(hidden(tokens_BT), next_BT);
  }
  // Of the token that follows the last, [B, V].
  at::Tensor next_logits(const at::Tensor& tokens_BT) {
    return head->forward(hidden(tokens_BT).select(1, -1));
  }

  bool residual_in_fp32 = true;
  nn::Embedding tokens{nullptr}, positions{nullptr};
  torch::nn::Dropout dropout{nullptr};
  nn::LayerNorm norm{nullptr};
  torch::nn::ModuleList blocks;
  nn::LMHead head{nullptr};  // not registered: an optimizer gets the shared weight once
};
TORCH_MODULE(GPT);

}  // namespace gpt
