// A convolutional network learns to tell ten kinds of clothes apart: `make fashion-mnist`.
#include <torch/torch.h>

#include <cstdio>

#include "lightning.h"

using namespace lightning;

struct ClassifierOptions : Options<ClassifierOptions> {
  OPTION(double, lr, 5e-3, "The highest learning rate: it rises to this and falls to zero.");
  OPTION(int64_t, width, 16, "Channels of the first block; each further one has twice as many.");
  OPTION(double, dropout, 0.2, "The part of the features that is dropped in training.");
};
struct Classifier : LightningModule {
  explicit Classifier(const ClassifierOptions& o) : LightningModule(o), options(o) {}
  void configure_model() override {
    torch::nn::Sequential layers;
    int64_t in = 1;
    for (int64_t out : {options.width(), options.width() * 2, options.width() * 4}) {
      layers->push_back(torch::nn::Conv2d(torch::nn::Conv2dOptions(in, out, 3).padding(1)));
      layers->push_back(torch::nn::BatchNorm2d(out));
      layers->push_back(torch::nn::ReLU());
      layers->push_back(torch::nn::MaxPool2d(2));
      in = out;
    }
    layers->push_back(torch::nn::Flatten());
    layers->push_back(torch::nn::Dropout(options.dropout()));
    layers->push_back(torch::nn::Linear(in * 3 * 3, 10));
    net = register_module("net", layers);
    example_input_array = Batch::map({{"image", torch::zeros({1, 1, 28, 28})}});
  }
  Batch predict_forward(const Batch& batch) override { return net->forward(batch["image"]); }
  StepOutput training_step(const Batch& batch, int64_t) override {
    auto loss = torch::cross_entropy_loss(net->forward(batch["image"]), batch["label"]);
    log("train_loss", loss, LogOptions().prog_bar(true));
    return loss;
  }
  StepOutput evaluate(const Batch& batch, const std::string& stage) {
    const auto logits = net->forward(batch["image"]);
    accuracy.update(logits, batch["label"]);
    log(stage + "_loss", torch::cross_entropy_loss(logits, batch["label"]));
    log(stage + "_accuracy", accuracy, LogOptions().prog_bar(true));
    return skip;
  }
  StepOutput validation_step(const Batch& b, int64_t) override { return evaluate(b, "val"); }
  StepOutput test_step(const Batch& b, int64_t) override { return evaluate(b, "test"); }
  Optimizers configure_optimizers() override {
    auto adamw = std::make_shared<torch::optim::AdamW>(parameters(), options.lr());
    auto schedule = std::make_shared<OneCycleLR>(
        adamw, OneCycleLROptions(options.lr()).total_steps(trainer().estimated_stepping_batches()));
    return {adamw, LRSchedulerConfig(schedule).set_interval("step")};
  }
  ClassifierOptions options;
  torch::nn::Sequential net{nullptr};
  Accuracy accuracy{AccuracyOptions("multiclass").num_classes(10)};
};
const Registration<LightningModule> kClassifier{
    "Classifier", "A small convolutional network.",
    [](const ClassifierOptions& o) { return std::make_shared<Classifier>(o); }};

struct ClothesOptions : Options<ClothesOptions> {
  OPTION(std::string, root, FashionMNISTOptions().root(), "Folder of the data.");
  OPTION(int64_t, batch_size, 128, "Images in a batch.");
};
struct Clothes : LightningDataModule {
  explicit Clothes(const ClothesOptions& o) : LightningDataModule(o), options(o) {}
  void setup(Stage) override {
    parts = random_split(images(true), std::vector<int64_t>{55000, 5000}, /*seed=*/0);
  }
  Loaders train_dataloader() override { return loader(parts.at(0), /*shuffle=*/true); }
  Loaders val_dataloader() override { return loader(parts.at(1)); }
  Loaders test_dataloader() override { return loader(images(false)); }
  Loaders predict_dataloader() override { return test_dataloader(); }
  std::shared_ptr<Dataset> images(bool train) const {
    return std::make_shared<FashionMNIST>(FashionMNISTOptions().root(options.root()).train(train));
  }
  DataLoader loader(const std::shared_ptr<Dataset>& data, bool shuffle = false) const {
    return {data, DataLoaderOptions(options.batch_size()).shuffle(shuffle).num_workers(1)};
  }
  ClothesOptions options;
  std::vector<std::shared_ptr<Subset>> parts;
};
const Registration<LightningDataModule> kClothes{
    "Clothes", "Fashion-MNIST.",
    [](const ClothesOptions& o) { return std::make_shared<Clothes>(o); }};
struct ClothesCLI : LightningCLI {
  using LightningCLI::LightningCLI;
  void after_fit() override {
    if (trainer().fast_dev_run()) return;
    const auto results = trainer().test(model(), datamodule(), RunArguments().ckpt_path("best"));
    if (!trainer().is_global_zero()) return;
    std::printf("test_accuracy %.4f\n", results.at(0).at("test_accuracy"));
  }
};

int main(int argc, char** argv) {
  return ClothesCLI(LightningCLIOptions().model("Classifier").data("Clothes")).run(argc, argv);
}
