#include <torch/torch.h>

#include "lightning.h"

struct Classifier : lightning::LightningModule {
  torch::nn::Sequential net{nullptr};

  void configure_model() override {
    net = register_module("net",
                          torch::nn::Sequential(torch::nn::Flatten(), torch::nn::Linear(784, 10)));
  }
  lightning::StepOutput training_step(const lightning::Batch& batch, int64_t) override {
    auto loss = torch::cross_entropy_loss(net->forward(batch["image"]), batch["label"]);
    log("train_loss", loss, lightning::LogOptions().prog_bar(true));
    return loss;
  }
  lightning::StepOutput validation_step(const lightning::Batch& batch, int64_t) override {
    log("val_loss", torch::cross_entropy_loss(net->forward(batch["image"]), batch["label"]));
    return lightning::skip;
  }
  lightning::Optimizers configure_optimizers() override {
    return torch::optim::AdamW(parameters(), 1e-3);
  }
};

int main() {
  const auto options = lightning::DataLoaderOptions(64).num_workers(1);
  const auto images = [](bool train) {
    return std::make_shared<lightning::FashionMNIST>(lightning::FashionMNISTOptions().train(train));
  };
  lightning::Trainer trainer(lightning::TrainerOptions().max_epochs(2).callbacks(
      {lightning::EarlyStoppingOptions("val_loss").patience(2)}));
  trainer.fit(
      std::make_shared<Classifier>(),
      lightning::DataLoader(images(true), lightning::DataLoaderOptions(options).shuffle(true)),
      lightning::DataLoader(images(false), options));
}
