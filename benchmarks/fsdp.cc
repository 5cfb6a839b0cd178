// A GPT of 1.3 B parameters in shards over --devices 2, through Trainer.fit; the peer is fsdp.py.
// All steps see one and the same batch of random tokens, so that the last loss tells that the
// sides learn alike. --variant is LAYERS-CASE:
//
//   nn       layers of lightning/nn
//   plain    those of torch::nn (plain_gpt.h)
//
//   true, mixed     in bf16-true and bf16-mixed
//   checkpointing   in bf16-true, with the activations of blocks computed anew in backward
//
// --recompute N: of the first N blocks of nn-true backward computes the GELU again.
// --overlap N: N more steps under the profiler, which tell how much of the collectives' time is
// hidden. --checkpoint FOLDER: there, at the end, a sharded checkpoint is saved and loaded, in the
// time until it is on the disk and until all ranks have it; with --async 1 by a thread, and what
// training waits for it is reported too.
#include "strategies/fsdp.h"

#include <torch/torch.h>

#include <algorithm>
#include <chrono>
#include <filesystem>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "benchmarks/plain_gpt.h"
#include "benchmarks/step_window.h"
#include "examples/gpt2/gpt.h"
#include "lightning.h"
#include "lightning/checkpoint/async_io.h"

namespace {

namespace nn = lightning::nn;

using benchmark::Arguments;
using benchmark::StepWindow;

// As examples/gpt2 has it, but each block ends with its own sum and not with the next one's norm.
// One that is computed anew then keeps one tensor, and ends before its last product.
struct ShortBlockImpl : torch::nn::Module {
  explicit ShortBlockImpl(const GPTOptions& o) {
    const auto width = o.features();
    norm1 = register_module("norm1", nn::LayerNorm(std::vector<int64_t>{width}));
    attention = register_module("attention", nn::Attention(nn::AttentionOptions(width, o.heads())));
    norm2 = register_module("norm2", nn::AddLayerNorm(std::vector<int64_t>{width}));
    mlp = register_module("mlp", nn::MLP(nn::MLPOptions(width, 4 * width).activation("gelu_tanh")));
  }
  at::Tensor forward(const at::Tensor& x) {
    const auto [sum, normalized] = norm2->forward(x, attention->forward(norm1->forward(x)));
    return sum + mlp->forward(normalized);
  }

  nn::LayerNorm norm1{nullptr};
  nn::AddLayerNorm norm2{nullptr};
  nn::Attention attention{nullptr};
  nn::MLP mlp{nullptr};
};
TORCH_MODULE(ShortBlock);

struct ShortGPTImpl : torch::nn::Module {
  explicit ShortGPTImpl(const GPTOptions& o) {
    tokens = register_module("tokens", nn::Embedding(o.vocabulary(), o.features()));
    positions = register_module("positions", nn::Embedding(o.context(), o.features()));
    for (int64_t i = 0; i < o.layers(); ++i) blocks->push_back(ShortBlock(o));
    register_module("blocks", blocks);
    norm = register_module("norm", nn::LayerNorm(std::vector<int64_t>{o.features()}));
    head = nn::LMHead(tokens->weight);
    benchmark::initialize(*this, o.layers());
  }
  at::Tensor loss(const at::Tensor& x, const at::Tensor& y) {
    auto h = nn::embed(x, tokens->weight, positions->weight);
    for (const auto& block : *blocks) h = block->as<ShortBlock>()->forward(h);
    return head->loss(norm->forward(h), y);
  }

  nn::Embedding tokens{nullptr}, positions{nullptr};
  torch::nn::ModuleList blocks;
  nn::LayerNorm norm{nullptr};
  nn::LMHead head{nullptr};  // not registered: an optimizer gets the shared weight once
};
TORCH_MODULE(ShortGPT);

struct Variant {
  explicit Variant(const Arguments& a) : name(a.text("variant", "nn-true")) {
    const auto dash = name.find('-');
    layers = name.substr(0, dash);
    task = dash == std::string::npos ? "" : name.substr(dash + 1);
    const bool known = (layers == "nn" || layers == "plain") &&
                       (task == "true" || task == "mixed" || task == "checkpointing");
    if (!known) throw std::runtime_error("unknown --variant " + name);
  }
  bool checkpoints() const { return task == "checkpointing"; }
  std::string precision() const { return task == "mixed" ? "bf16-mixed" : "bf16-true"; }

  std::string name, layers, task;
};

GPTOptions sizes(const Arguments& a) {
  return GPTOptions()
      .layers(a.number("layers", 24))
      .features(a.number("width", 2048))
      .heads(a.number("heads", 16))
      .vocabulary(a.number("vocabulary", 50304))
      .context(a.number("context", 2048));
}

struct Model : lightning::LightningModule {
  Model(const Arguments& a, const Variant& variant)
      : options(sizes(a)),
        variant(variant),
        recompute(variant.name == "nn-true" ? a.number("recompute", 0) : 0) {}
  void configure_model() override {
    if (variant.layers == "plain") {
      use(benchmark::PlainGPT(options));
    } else if (variant.checkpoints()) {
      use(ShortGPT(options));
    } else {
      gpt::GPT net(options);
      for (int64_t i = 0; i < std::min(recompute, options.layers()); ++i) {
        net->blocks[static_cast<size_t>(i)]->as<gpt::Block>()->mlp->options.recompute(true);
      }
      use(net);
    }
  }
  template <class Net>
  void use(Net net) {
    register_module("net", net);
    loss = [net](const lightning::Batch& batch) mutable {
      return net->loss(batch["x"], batch["y"]);
    };
  }
  lightning::StepOutput training_step(const lightning::Batch& batch, int64_t) override {
    const auto value = loss(batch);
    log("train_loss", value);
    last_loss = value.detach();
    return value;
  }
  lightning::Optimizers configure_optimizers() override {
    return torch::optim::AdamW(parameters(), torch::optim::AdamWOptions(3e-4).weight_decay(0.01));
  }

  GPTOptions options;
  Variant variant;
  int64_t recompute;
  std::function<at::Tensor(const lightning::Batch&)> loss;
  at::Tensor last_loss;
};

int64_t folder_bytes(const std::string& folder) {
  int64_t bytes = 0;
  for (const auto& entry : std::filesystem::directory_iterator(folder)) {
    if (entry.is_regular_file()) bytes += static_cast<int64_t>(entry.file_size());
  }
  return bytes;
}

// What is asked of all ranks once fit has run its steps.
struct End : lightning::Callback {
  End(std::string checkpoint, const StepWindow& window)
      : checkpoint(std::move(checkpoint)), window(window) {}

  void on_before_backward(lightning::Trainer&, lightning::LightningModule& module,
                          const at::Tensor&) override {
    forward_gigabytes = benchmark::tensor_gigabytes(module.device());
  }

  void on_train_end(lightning::Trainer& trainer, lightning::LightningModule& module) override {
    auto& strategy = trainer.strategy();
    const auto loss = dynamic_cast<Model&>(module).last_loss.to(at::kFloat);
    const auto peak = torch::full({}, window.peak_gigabytes(), loss.options());
    const auto last_loss = strategy.reduce(loss, lightning::ReduceOp::kMean);
    const auto highest = strategy.reduce(peak, lightning::ReduceOp::kMax);
    values = {{"last_loss", last_loss.item<double>()},
              {"highest_peak_gb", highest.item<double>()},
              {"forward_gb", forward_gigabytes}};
    if (!checkpoint.empty()) save_and_load(trainer, module);
  }

  void save_and_load(lightning::Trainer& trainer, lightning::LightningModule& module) {
    auto& strategy = trainer.strategy();
    const auto path = checkpoint + "/sharded.ckpt";
    auto* const io = dynamic_cast<lightning::AsyncCheckpointIO*>(&strategy.checkpoint_io());
    const auto save_once = [&] {
      trainer.save_checkpoint(path);
      stall = io == nullptr ? 0 : io->last_stall_seconds();
      if (io != nullptr) io->wait();
    };
    if (io != nullptr) save_once();  // a copy's memory is fresh the first time
    const double save = seconds(strategy, save_once);
    const double load = seconds(strategy, [&] {
      const auto state = strategy.load_checkpoint(path);
      strategy.load_model_state(module, state.at("state_dict"), /*strict=*/true);
      const auto& optimizers = state.at("optimizer_states").as_list();
      strategy.load_optimizer_state(*trainer.optimizers().at(0), module, optimizers.at(0));
    });
    if (strategy.is_global_zero()) {
      saved = {{"save_s", save},
               {"load_s", load},
               {"saved_gb", static_cast<double>(folder_bytes(path)) / 1e9}};
      if (io != nullptr) saved.emplace_back("stall_s", stall);
      strategy.remove_checkpoint(path);
    }
  }

  // Until all ranks are done, and their devices.
  template <class Work>
  static double seconds(lightning::Strategy& strategy, const Work& work) {
    const auto wait = [&] {
      if (strategy.root_device().is_cuda()) {
        torch::cuda::synchronize(strategy.root_device().index());
      }
      strategy.barrier("benchmark");
    };
    wait();
    const auto begin = std::chrono::steady_clock::now();
    work();
    wait();
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  }

  std::string checkpoint;
  const StepWindow& window;
  double forward_gigabytes = 0;  // of tensors, when backward begins
  double stall = 0;              // of training, by the last save
  benchmark::Values values, saved;
};

lightning::FSDPStrategyOptions strategy_options(const Variant& variant) {
  lightning::FSDPStrategyOptions options;
  options.state_dict_type("sharded");
  if (variant.checkpoints()) {
    options.activation_checkpointing_policy(
        {variant.layers == "plain" ? "PlainBlock" : "ShortBlock"});
  }
  return options;
}

}  // namespace

int main(int argc, char** argv) {
  const Arguments a(argc, argv);
  const Variant variant(a);
  torch::manual_seed(0);
  const auto batch = a.number("batch", 8), devices = a.number("devices", 2);
  const auto model = std::make_shared<Model>(a, variant);
  const auto& o = model->options;
  const auto window = std::make_shared<StepWindow>(a);
  const auto end = std::make_shared<End>(a.text("checkpoint", ""), *window);
  const auto rows =
      torch::randint(0, o.vocabulary(), {devices * batch, o.context() + 1}, at::kLong);

  auto options = benchmark::trainer_options(a, variant.precision())
                     .devices(devices)
                     .strategy(strategy_options(variant))
                     .max_steps(window->total())
                     .enable_checkpointing(false)
                     .callbacks({window, end});
  if (a.number("async", 0) != 0) {
    options.plugins({lightning::Plugin(std::make_shared<lightning::AsyncCheckpointIO>())});
  }
  lightning::Trainer(options).fit(model,
                                  benchmark::next_tokens(rows.repeat({window->total(), 1}), batch));
  if (!window->is_global_zero()) return 0;
  const auto name = a.text("name", "fsdp") + "_";
  const double flops = benchmark::flops_per_token(*model, o.layers(), o.features(), o.context());
  benchmark::report(a, name + variant.name, *window, devices * batch * o.context(),
                    flops / static_cast<double>(devices), end->values);
  if (!end->saved.empty()) benchmark::report(a, name + "save", end->saved);
}
