// A step of GPT-2 through Trainer.fit, with all default callbacks and a CSV logger, on random
// tokens; the peer is gpt2.py. --variant says of what:
//
//   nn       the network of examples/gpt2, on lightning/nn
//   nn16     the same with its residual stream in 16 bits
//   graph    nn with `compile: cuda_graph`
//   plain    a user's network of torch::nn (plain_gpt.h)
//   trainer, bare   that one with SGD through the Trainer, and in a loop without it: their
//                   difference is what the Trainer costs
//   ddp      nn on --devices 2; its milliseconds beside those of nn are what the second GPU costs
//   curves   no time: the losses of nn, nn16 and plain under autocast, and of plain in float32,
//            from the same weights on the same tokens, and how far they are apart
#include <torch/torch.h>

#include <memory>
#include <string>
#include <vector>

#include "benchmarks/plain_gpt.h"
#include "benchmarks/step_window.h"
#include "examples/gpt2/gpt.h"
#include "lightning.h"
#include "strategies/ddp.h"

namespace {

using benchmark::Arguments;
using benchmark::StepWindow;

// The framework steps LibTorch's own SGD by a fused kernel. A class of the user's keeps its own
// step, so that the trained and the bare loop do the same work and only the Trainer differs.
struct OwnSGD : torch::optim::SGD {
  using torch::optim::SGD::SGD;
};

GPTOptions sizes(const Arguments& a, const std::string& variant) {
  return GPTOptions()
      .residual_in_fp32(variant != "nn16")
      .layers(a.number("layers", 12))
      .features(a.number("width", 768))
      .heads(a.number("heads", 12))
      .vocabulary(a.number("vocabulary", 50304))
      .context(a.number("context", 1024));
}

struct Model : lightning::LightningModule {
  Model(const Arguments& a, std::string variant)
      : options(sizes(a, variant)), variant(std::move(variant)) {}
  void configure_model() override {
    if (variant == "nn" || variant == "nn16" || variant == "graph" || variant == "ddp") {
      fast = register_module("net", gpt::GPT(options));
    } else {
      plain = register_module("net", benchmark::PlainGPT(options));
    }
  }
  at::Tensor loss(const lightning::Batch& batch) {
    return fast ? fast->loss(batch["x"], batch["y"]) : plain->loss(batch["x"], batch["y"]);
  }
  lightning::StepOutput training_step(const lightning::Batch& batch, int64_t) override {
    const auto value = loss(batch);
    log("train_loss", value);
    if (keeps_losses) losses.push_back(value.detach());
    return value;
  }
  lightning::Optimizers configure_optimizers() override {
    if (variant == "trainer") return OwnSGD(parameters(), 1e-3);
    auto adamw = std::make_shared<torch::optim::AdamW>(
        parameters(), torch::optim::AdamWOptions(3e-4).weight_decay(0.01));
    if (!keeps_losses) return adamw;
    auto warmup = std::make_shared<lightning::WarmupLR>(adamw, lightning::WarmupLROptions(50));
    return {adamw, lightning::LRSchedulerConfig(warmup).set_interval("step")};
  }

  GPTOptions options;
  std::string variant;
  gpt::GPT fast{nullptr};
  benchmark::PlainGPT plain{nullptr};
  bool keeps_losses = false;
  std::vector<at::Tensor> losses;
};

at::Tensor random_rows(const GPTOptions& o, int64_t count) {
  return torch::randint(0, o.vocabulary(), {count, o.context() + 1}, at::kLong);
}

// Text that can be learnt: of each token one of four follows, one of them mostly.
at::Tensor markov_rows(const GPTOptions& o, int64_t count) {
  const auto followers = torch::randint(0, o.vocabulary(), {o.vocabulary(), 4}, at::kLong);
  const auto shares = torch::tensor({0.7, 0.15, 0.1, 0.05});
  std::vector<at::Tensor> columns = {torch::randint(0, o.vocabulary(), {count}, at::kLong)};
  for (int64_t i = 0; i < o.context(); ++i) {
    const auto choice = at::multinomial(shares, count, /*replacement=*/true);
    columns.push_back(followers.index({columns.back(), choice}));
  }
  return torch::stack(columns, 1);
}

lightning::TrainerOptions trainer_options(const Arguments& a) {
  return benchmark::trainer_options(a, "bf16-mixed");
}

void fit(const Arguments& a, const std::string& variant, const std::shared_ptr<Model>& model,
         const std::shared_ptr<StepWindow>& window, const lightning::DataLoader& data) {
  auto options = trainer_options(a);
  options.max_steps(window->total()).callbacks({window});
  if (variant == "trainer") options.precision("32-true");
  if (variant == "graph") options.compile("cuda_graph");
  if (variant == "ddp") {
    options.strategy(lightning::DDPStrategyOptions().gradient_as_bucket_view(true));
  }
  lightning::Trainer(options).fit(model, data);
}

void bare(const Arguments& a, const std::shared_ptr<Model>& model, StepWindow& window,
          lightning::DataLoader& data) {
  const c10::Device device(a.text("accelerator", "cuda") == "cuda" ? c10::Device("cuda:0")
                                                                   : c10::Device("cpu"));
  model->configure_model();
  model->to(device);
  OwnSGD optimizer(model->parameters(), 1e-3);
  for (auto pass = data.iterate(); auto batch = pass->next();) {
    const auto loss = model->loss(batch->to(device));
    optimizer.zero_grad();
    loss.backward();
    optimizer.step();
    window.count(device);
  }
}

void measure(const Arguments& a, const std::string& variant) {
  const auto o = sizes(a, variant);
  const auto batch = a.number("batch", 32);
  const auto model = std::make_shared<Model>(a, variant);
  const auto window = std::make_shared<StepWindow>(a);
  // As many batches as there are steps on each device, and one epoch.
  const auto devices = a.number("devices", 1);
  auto data = benchmark::next_tokens(random_rows(o, devices * batch * window->total()), batch);
  if (variant == "bare") {
    bare(a, model, *window, data);
  } else {
    fit(a, variant, model, window, data);
  }
  const double flops = benchmark::flops_per_token(*model, o.layers(), o.features(), o.context());
  if (!window->is_global_zero()) return;
  benchmark::report(a, a.text("name", "gpt2") + "_" + variant, *window, batch * o.context(), flops);
}

// The loss of each step, from given weights.
at::Tensor curve(const Arguments& a, const std::string& variant, const std::string& precision,
                 const at::Tensor& rows, const std::vector<at::Tensor>& weights) {
  const auto model = std::make_shared<Model>(a, variant);
  model->keeps_losses = true;
  model->ensure_configured();
  {
    const torch::NoGradGuard no_grad;
    // The same layers in the same order, under other names.
    const auto own = model->parameters();
    TORCH_CHECK(own.size() == weights.size(), "The two networks differ.");
    for (size_t i = 0; i < own.size(); ++i) {
      TORCH_CHECK(own[i].sizes() == weights[i].sizes(), "The two networks differ.");
      own[i].copy_(weights[i]);
    }
  }
  const auto batch = a.number("batch", 16);
  lightning::Trainer(trainer_options(a)
                         .precision(precision)
                         .max_steps(rows.size(0) / batch)
                         .enable_checkpointing(false))
      .fit(model, benchmark::next_tokens(rows, batch));
  return at::stack(model->losses).cpu().to(at::kDouble);
}

void compare_curves(const Arguments& a) {
  torch::manual_seed(0);
  const auto o = sizes(a, "plain");
  benchmark::PlainGPT source(o);
  const auto weights = source->parameters();
  const auto rows = markov_rows(o, a.number("batch", 16) * a.number("steps", 200));
  const auto fast = curve(a, "nn", "bf16-mixed", rows, weights);
  const auto fast16 = curve(a, "nn16", "bf16-mixed", rows, weights);
  const auto plain = curve(a, "plain", "bf16-mixed", rows, weights);
  const auto exact = curve(a, "plain", "32-true", rows, weights);
  const auto most = [](const at::Tensor& left, const at::Tensor& right) {
    return (left - right).abs().max().item<double>();
  };
  benchmark::report(a, a.text("name", "gpt2") + "_curves",
                    {{"steps", static_cast<double>(fast.numel())},
                     {"first_loss", fast[0].item<double>()},
                     {"last_loss", fast[-1].item<double>()},
                     {"max_difference", most(fast, plain)},
                     {"mean_difference", (fast - plain).abs().mean().item<double>()},
                     {"max_difference_16", most(fast16, plain)},
                     {"nn_from_float32", most(fast, exact)},
                     {"plain_from_float32", most(plain, exact)}});
}

}  // namespace

int main(int argc, char** argv) {
  const Arguments arguments(argc, argv);
  const auto variant = arguments.text("variant", "nn");
  torch::manual_seed(0);
  if (variant == "curves") {
    compare_curves(arguments);
  } else {
    measure(arguments, variant);
  }
}
