#include "tests/support/boring.h"

#include <ATen/CPUGeneratorImpl.h>
#include <torch/optim/sgd.h>

#include <algorithm>

#include "lightning/data/data_loader.h"
#include "lightning/trainer.h"

namespace lightning::testing {

TrainerOptions quiet(const TempDir& dir) {
  return TrainerOptions()
      .accelerator("cpu")
      .logger(false)
      .enable_progress_bar(false)
      .enable_model_summary(false)
      .enable_checkpointing(false)
      .default_root_dir(dir.path());
}

Loaders random_loader(int64_t rows, int64_t batch_size, int64_t columns) {
  auto generator = at::make_generator<at::CPUGeneratorImpl>(1);
  return DataLoader(TensorDataset(Batch(at::randn({rows, columns}, generator))),
                    DataLoaderOptions(batch_size));
}

BoringModule::BoringModule() : layer(register_module("layer", torch::nn::Linear(32, 2))) {}

at::Tensor BoringModule::loss(const Batch& batch) {
  const auto output = forward(batch.tensor());
  return at::mse_loss(output, at::ones_like(output));
}

StepOutput BoringModule::training_step(const Batch& batch, int64_t batch_idx) {
  if (before_training_step) before_training_step(*this, batch_idx);
  const auto value = loss(batch);
  log("train_loss", value);
  return value;
}

StepOutput BoringModule::validation_step(const Batch& batch, int64_t) {
  const auto value = loss(batch);
  if (val_losses.empty()) log("val_loss", value);
  return value;
}

void BoringModule::on_validation_epoch_end() {
  if (val_losses.empty() || trainer().sanity_checking()) return;
  log("val_loss", val_losses[std::min(validations_, val_losses.size() - 1)]);
  ++validations_;
}

StepOutput BoringModule::test_step(const Batch& batch, int64_t) {
  const auto value = loss(batch);
  log("test_loss", value);
  return value;
}

Batch BoringModule::predict_step(const Batch& batch, int64_t) { return forward(batch.tensor()); }

Optimizers BoringModule::configure_optimizers() { return torch::optim::SGD(parameters(), 0.1); }

}  // namespace lightning::testing
