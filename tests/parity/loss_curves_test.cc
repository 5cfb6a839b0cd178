// Number for number: from the same weights and batches, on the CPU in fp32, a run's losses equal
// those of Python Lightning (loss_curves.py) within 1e-5 relative.
#include <torch/torch.h>

#include <algorithm>
#include <catch2/catch.hpp>
#include <cmath>
#include <fstream>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "lightning/data/data_loader.h"
#include "lightning/module.h"
#include "lightning/optim/schedulers.h"
#include "lightning/trainer.h"
#include "tests/support/python.h"
#include "tests/support/temp_dir.h"

namespace lightning::testing {
namespace {

constexpr int64_t kTokens = 12, kVocabulary = 50, kWidth = 32, kHeads = 4, kLayers = 2;

// What loss_curves.py wrote.
class Reference {
 public:
  Reference() {
    TempDir dir;
    run_python(
        "import runpy, sys; sys.argv = sys.argv[1:]; "
        "runpy.run_path(sys.argv[0], run_name='__main__')",
        {"tests/parity/loss_curves.py", dir.path()});
    std::ifstream in(dir.path("index.json"));
    index = Json::parse(in);
    std::ifstream data(dir.path("data.bin"), std::ios::binary);
    data_.assign(std::istreambuf_iterator<char>(data), {});
  }

  at::Tensor tensor(const std::string& name) {
    const Json& entry = index["tensors"].at(name);
    const auto dtype = entry["dtype"] == "int64" ? at::kLong : at::kFloat;
    const std::vector<int64_t> shape = entry["shape"];
    return at::from_blob(data_.data() + entry["offset"].get<size_t>(), shape, dtype).clone();
  }

  Json index;

 private:
  std::vector<char> data_;
};

Reference& reference() {
  static Reference instance;
  return instance;
}

// ---- The models, as in loss_curves.py -----------------------------------------------------------

struct Net : torch::nn::Module {
  virtual at::Tensor loss(const at::Tensor& x, const at::Tensor& y) = 0;
};

// Shapes: B batch, T tokens, D width, H heads, V vocabulary.
struct BlockImpl : torch::nn::Module {
  BlockImpl() {
    using torch::nn::LinearOptions;
    norm1 = register_module("norm1", torch::nn::LayerNorm(torch::nn::LayerNormOptions({kWidth})));
    qkv = register_module("qkv", torch::nn::Linear(LinearOptions(kWidth, 3 * kWidth).bias(false)));
    proj = register_module("proj", torch::nn::Linear(kWidth, kWidth));
    norm2 = register_module("norm2", torch::nn::LayerNorm(torch::nn::LayerNormOptions({kWidth})));
    up = register_module("up", torch::nn::Linear(kWidth, 4 * kWidth));
    down = register_module("down", torch::nn::Linear(4 * kWidth, kWidth));
  }
  at::Tensor forward(at::Tensor x_BTD) {
    const int64_t size = x_BTD.size(0), tokens = x_BTD.size(1);
    const auto parts = qkv->forward(norm1->forward(x_BTD))
                           .view({size, tokens, 3, kHeads, kWidth / kHeads})
                           .permute({2, 0, 3, 1, 4})
                           .unbind(0);
    const auto attended =
        at::scaled_dot_product_attention(parts[0], parts[1], parts[2], {}, 0.0, true);
    x_BTD = x_BTD + proj->forward(attended.transpose(1, 2).reshape({size, tokens, kWidth}));
    return x_BTD + down->forward(at::gelu(up->forward(norm2->forward(x_BTD))));
  }
  torch::nn::LayerNorm norm1{nullptr}, norm2{nullptr};
  torch::nn::Linear qkv{nullptr}, proj{nullptr}, up{nullptr}, down{nullptr};
};
TORCH_MODULE(Block);

struct Transformer : Net {
  Transformer() {
    embedding = register_module("embedding", torch::nn::Embedding(kVocabulary, kWidth));
    position = register_parameter("position", torch::zeros({kTokens, kWidth}));
    register_module("blocks", blocks);
    for (int64_t i = 0; i < kLayers; ++i) blocks->push_back(Block());
    norm = register_module("norm", torch::nn::LayerNorm(torch::nn::LayerNormOptions({kWidth})));
    head = register_module("head", torch::nn::Linear(kWidth, kVocabulary));
  }
  at::Tensor loss(const at::Tensor& x, const at::Tensor& y) override {
    at::Tensor x_BTD = embedding->forward(x) + position;
    for (const auto& block : *blocks) x_BTD = block->as<Block>()->forward(x_BTD);
    const at::Tensor logits_BTV = head->forward(norm->forward(x_BTD));
    return at::cross_entropy_loss(logits_BTV.flatten(0, 1), y.flatten());
  }
  torch::nn::Embedding embedding{nullptr};
  at::Tensor position;
  torch::nn::ModuleList blocks;
  torch::nn::LayerNorm norm{nullptr};
  torch::nn::Linear head{nullptr};
};

struct Convnet : Net {
  Convnet() {
    const auto conv = [](int64_t in, int64_t out) {
      return torch::nn::Conv2d(torch::nn::Conv2dOptions(in, out, 3).padding(1).bias(false));
    };
    conv1 = register_module("conv1", conv(1, 8));
    norm1 = register_module("norm1", torch::nn::BatchNorm2d(8));
    conv2 = register_module("conv2", conv(8, 16));
    norm2 = register_module("norm2", torch::nn::BatchNorm2d(16));
    head = register_module("head", torch::nn::Linear(16 * 3 * 3, 10));
  }
  at::Tensor loss(const at::Tensor& images, const at::Tensor& y) override {
    at::Tensor x = at::max_pool2d(at::relu(norm1->forward(conv1->forward(images))), 2);
    x = at::max_pool2d(at::relu(norm2->forward(conv2->forward(x))), 2);
    return at::cross_entropy_loss(head->forward(x.flatten(1)), y);
  }
  torch::nn::Conv2d conv1{nullptr}, conv2{nullptr};
  torch::nn::BatchNorm2d norm1{nullptr}, norm2{nullptr};
  torch::nn::Linear head{nullptr};
};

// ---- A run --------------------------------------------------------------------------------------

struct Curve : LightningModule {
  explicit Curve(const Json& run) : run(run) {
    net = run["model"] == "transformer" ? std::shared_ptr<Net>(std::make_shared<Transformer>())
                                        : std::make_shared<Convnet>();
    register_module("net", net);
    const at::NoGradGuard no_grad;
    const std::string model = run["model"];
    for (auto& item : net->named_parameters()) {
      item.value().copy_(reference().tensor(model + "." + item.key()));
    }
  }
  StepOutput training_step(const Batch& batch, int64_t) override {
    const at::Tensor loss = net->loss(batch["x"], batch["y"]);
    losses.push_back(loss.item<double>());
    return loss;
  }
  Optimizers configure_optimizers() override {
    std::shared_ptr<torch::optim::Optimizer> optimizer;
    if (run["optimizer"] == "sgd") {
      optimizer = std::make_shared<torch::optim::SGD>(parameters(),
                                                      torch::optim::SGDOptions(0.05).momentum(0.9));
    } else if (run["optimizer"] == "adam") {
      optimizer = std::make_shared<torch::optim::Adam>(parameters(), 1e-3);
    } else {
      optimizer = std::make_shared<torch::optim::AdamW>(
          parameters(), torch::optim::AdamWOptions(1e-3).weight_decay(0.01));
    }
    if (!run["schedule"]) return optimizer;
    const auto schedule =
        std::make_shared<StepLR>(optimizer, StepLROptions().step_size(30).gamma(0.5));
    return {optimizer, LRSchedulerConfig(schedule).set_interval("step")};
  }

  Json run;
  std::shared_ptr<Net> net;
  std::vector<double> losses;
};

std::vector<double> train(const Json& run) {
  TempDir dir;
  Json flags = Json::parse(R"({"accelerator": "cpu", "logger": false, "max_epochs": 1,
                               "enable_progress_bar": false, "enable_model_summary": false,
                               "enable_checkpointing": false})");
  flags["default_root_dir"] = dir.path();
  flags["max_steps"] = reference().index["steps"];
  flags.update(run["trainer"]);
  TrainerOptions options;
  options.read(flags, "trainer");
  Trainer trainer(options);

  const std::string model = run["model"];
  const at::Tensor x = reference().tensor(model + ".batches.x");
  const at::Tensor y = reference().tensor(model + ".batches.y");
  const DataLoader batches(FunctionDataset(x.size(0),
                                           [&](int64_t i) {
                                             return Batch::map({{"x", x[i]}, {"y", y[i]}});
                                           }),
                           DataLoaderOptions().batch_size(std::nullopt));
  const auto module = std::make_shared<Curve>(run);
  trainer.fit(module, batches);
  return module->losses;
}

TEST_CASE("losses equal those of Python Lightning within 1e-5", "[parity]") {
  torch::set_num_threads(1);
  for (const Json& run : reference().index["runs"]) {
    const std::string name = run["name"];
    DYNAMIC_SECTION(name) {
      const std::vector<double> python = run["losses"];
      const std::vector<double> ours = train(run);

      REQUIRE(ours.size() == python.size());
      double worst = 0.0;
      size_t at = 0;
      for (size_t i = 0; i < ours.size(); ++i) {
        const double error = std::abs(ours[i] - python[i]) / std::abs(python[i]);
        if (error > worst) std::tie(worst, at) = std::make_tuple(error, i);
      }
      INFO(name << " differs most in batch " << at << ": " << python[at] << " in Python, "
                << ours[at] << " here");
      CHECK(worst <= 1e-5);
    }
  }
}

}  // namespace
}  // namespace lightning::testing
