#include "lightning/trainer.h"

#include <torch/torch.h>

#include <catch2/catch.hpp>

#include "lightning/data/data_loader.h"
#include "lightning/module.h"
#include "tests/support/temp_dir.h"

using namespace lightning;
using lightning::testing::TempDir;

namespace {

struct Regression : LightningModule {
  torch::nn::Linear layer{nullptr};
  std::vector<double> losses;

  void configure_model() override { layer = register_module("layer", torch::nn::Linear(4, 1)); }
  StepOutput training_step(const Batch& batch, int64_t) override {
    auto loss = torch::mse_loss(layer->forward(batch[0]), batch[1]);
    log("train_loss", loss, LogOptions().prog_bar(true));
    losses.push_back(loss.item<double>());
    return loss;
  }
  StepOutput validation_step(const Batch& batch, int64_t) override {
    auto loss = torch::mse_loss(layer->forward(batch[0]), batch[1]);
    log("val_loss", loss);
    return loss;
  }
  StepOutput test_step(const Batch& batch, int64_t) override {
    log("test_loss", torch::mse_loss(layer->forward(batch[0]), batch[1]));
    return {};
  }
  Batch predict_step(const Batch& batch, int64_t) override { return layer->forward(batch[0]); }
  Optimizers configure_optimizers() override { return torch::optim::SGD(parameters(), 0.1); }
};

DataLoader loader(int64_t rows = 32) {
  torch::manual_seed(0);
  const auto x = torch::randn({rows, 4});
  const auto y = x.sum(1, true);
  return DataLoader(std::make_shared<TensorDataset>(std::initializer_list<at::Tensor>{x, y}),
                    DataLoaderOptions().batch_size(8));
}

}  // namespace

TEST_CASE("fit trains, validates, saves the best checkpoint, and test loads it", "[trainer]") {
  TempDir dir;
  auto module = std::make_shared<Regression>();
  Trainer trainer(TrainerOptions().max_epochs(5).default_root_dir(dir.path()));
  trainer.fit(module, loader(), loader());
  CHECK(trainer.current_epoch() == 5);
  CHECK(trainer.global_step() == 20);
  CHECK(module->losses.back() < module->losses.front());
  CHECK(trainer.metric("val_loss").value() < 1.0);
  const auto results = trainer.test(nullptr, loader(), RunArguments().ckpt_path("best"));
  REQUIRE(results.size() == 1);
  CHECK(results[0].at("test_loss") == Approx(trainer.metric("test_loss").value()));
  const auto predictions = trainer.predict(module, loader());
  REQUIRE(predictions.size() == 1);
  CHECK(predictions[0].size() == 4);
}
