// A step of a language model in the manner of Llama with 1.2 billion parameters through
// Trainer.fit, on lightning/nn and random tokens; the peer is llama.py.
//
// B batch, T time, C features, V vocabulary.
#include <torch/torch.h>

#include <memory>
#include <string>
#include <tuple>

#include "benchmarks/step_window.h"
#include "lightning.h"

namespace {

namespace nn = lightning::nn;
using benchmark::Arguments;
using benchmark::StepWindow;

struct Sizes {
  explicit Sizes(const Arguments& a)
      : layers(a.number("layers", 16)),
        width(a.number("width", 2048)),
        heads(a.number("heads", 32)),
        kv_heads(a.number("kv_heads", 8)),
        hidden(a.number("hidden", 8192)),
        vocabulary(a.number("vocabulary", 128256)),
        context(a.number("context", 2048)),
        batch(a.number("batch", 8)) {}
  int64_t layers, width, heads, kv_heads, hidden, vocabulary, context, batch;
};

nn::RMSNormOptions norm_of(int64_t width) { return nn::RMSNormOptions({width}).eps(1e-5); }

struct BlockImpl : torch::nn::Module {
  explicit BlockImpl(const Sizes& s) {
    attention = register_module("attention", nn::Attention(nn::AttentionOptions(s.width, s.heads)
                                                               .kv_heads(s.kv_heads)
                                                               .bias(false)
                                                               .rotary(true)
                                                               .rotary_base(500000.0)));
    norm1 = register_module("norm1", nn::AddRMSNorm(norm_of(s.width)));
    mlp = register_module(
        "mlp", nn::MLP(nn::MLPOptions(s.width, s.hidden).activation("swiglu").bias(false)));
    norm2 = register_module("norm2", nn::AddRMSNorm(norm_of(s.width)));
  }
  // The residual stream and its norm, [B, T, C], to the same.
  std::tuple<at::Tensor, at::Tensor> forward(at::Tensor x_BTC, at::Tensor normalized_BTC) {
    std::tie(x_BTC, normalized_BTC) = norm1->forward(x_BTC, attention->forward(normalized_BTC));
    return norm2->forward(x_BTC, mlp->forward(normalized_BTC));
  }

  nn::Attention attention{nullptr};
  nn::AddRMSNorm norm1{nullptr}, norm2{nullptr};
  nn::MLP mlp{nullptr};
};
TORCH_MODULE(Block);

struct LlamaImpl : torch::nn::Module {
  explicit LlamaImpl(const Sizes& s) {
    tokens = register_module("tokens", nn::Embedding(s.vocabulary, s.width));
    norm = register_module("norm", nn::RMSNorm(norm_of(s.width)));
    for (int64_t i = 0; i < s.layers; ++i) blocks->push_back(Block(s));
    register_module("blocks", blocks);
    head = nn::LMHead(tokens->weight);
    const torch::NoGradGuard no_grad;
    for (auto& p : parameters()) {
      if (p.dim() == 2) p.normal_(0.0, 0.02);
    }
  }
  at::Tensor loss(const at::Tensor& tokens_BT, const at::Tensor& next_BT) {
    at::Tensor x = tokens->forward(tokens_BT);
    at::Tensor normalized = norm->forward(x);
    for (const auto& block : *blocks) {
      std::tie(x, normalized) = block->as<Block>()->forward(x, normalized);
    }
    return head->loss(normalized, next_BT);
  }

  nn::Embedding tokens{nullptr};
  nn::RMSNorm norm{nullptr};
  torch::nn::ModuleList blocks;
  nn::LMHead head{nullptr};  // not registered: an optimizer gets the shared weight once
};
TORCH_MODULE(Llama);

struct Model : lightning::LightningModule {
  explicit Model(const Sizes& sizes) : sizes(sizes) {}
  void configure_model() override { net = register_module("net", Llama(sizes)); }
  lightning::StepOutput training_step(const lightning::Batch& batch, int64_t) override {
    const auto loss = net->loss(batch["x"], batch["y"]);
    log("train_loss", loss);
    return loss;
  }
  lightning::Optimizers configure_optimizers() override {
    return torch::optim::AdamW(parameters(), torch::optim::AdamWOptions(1e-4));
  }

  Sizes sizes;
  Llama net{nullptr};
};

}  // namespace

int main(int argc, char** argv) {
  const Arguments a(argc, argv);
  const Sizes s(a);
  torch::manual_seed(0);
  const auto model = std::make_shared<Model>(s);
  const auto window = std::make_shared<StepWindow>(a);
  const auto rows =
      torch::randint(0, s.vocabulary, {s.batch * window->total(), s.context + 1}, at::kLong);
  // A checkpoint of several GB at the end of the only epoch would be beside the point.
  lightning::Trainer(benchmark::trainer_options(a, "bf16-true")
                         .max_steps(window->total())
                         .enable_checkpointing(false)
                         .callbacks({window}))
      .fit(model, benchmark::next_tokens(rows, s.batch));
  const double flops = benchmark::flops_per_token(*model, s.layers, s.width, s.context);
  benchmark::report(a, a.text("name", "llama") + "_nn", *window, s.batch * s.context, flops);
}
