// The runs of cases.json on this side: the model, data and callbacks of interop.py.
#pragma once

#include <torch/nn/modules/container/sequential.h>

#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "lightning/datamodule.h"
#include "lightning/module.h"
#include "lightning/options.h"

namespace lightning::testing {

struct NetOptions : Options<NetOptions> {
  OPTION(int64_t, hidden, 16, "Width.");
  OPTION(double, scale, 0.5, "A number to keep.");
  OPTION(std::string, name, "net", "A text to keep.");
  OPTION(std::vector<int64_t>, sizes, (std::vector<int64_t>{1, 2}), "A list to keep.");
  OPTION(bool, flag, true, "A bool to keep.");
  OPTION(std::optional<int64_t>, nothing, std::nullopt, "None to keep.");
};

// Linear, BatchNorm, Tanh, Linear, with the same weights in every run.
class Net : public LightningModule {
 public:
  explicit Net(const NetOptions& options) : Net(options, Json::object()) {}
  Net(const NetOptions& options, const Json& run);

  StepOutput training_step(const Batch& batch, int64_t batch_idx) override;
  StepOutput validation_step(const Batch& batch, int64_t batch_idx) override;
  void on_train_epoch_end() override;
  Optimizers configure_optimizers() override;
  void on_save_checkpoint(State& checkpoint) override;
  void on_load_checkpoint(State& checkpoint) override;

  torch::nn::Sequential net;
  State seen;  // what on_load_checkpoint found of on_save_checkpoint

 private:
  at::Tensor loss(const Batch& batch);

  Json run_;
};

struct DataOptions : Options<DataOptions> {
  OPTION(int64_t, batch_size, 4, "Rows in a batch.");
  OPTION(std::string, folder, "data", "A text to keep.");
};

class Data : public LightningDataModule {
 public:
  explicit Data(const DataOptions& options) : LightningDataModule(options), options_(options) {}

  Loaders train_dataloader() override;
  Loaders val_dataloader() override;
  State state_dict() const override;
  void load_state_dict(const State& state) override { loaded = state; }

  State loaded;

 private:
  DataOptions options_;
};

// Fits 3 epochs of a case, from `ckpt_path` where it is given; checkpoints of every epoch go to
// `folder`.
struct Fitted {
  std::shared_ptr<Net> module;
  std::shared_ptr<Data> data;  // null where the case has none
};
Fitted fit(const Json& run, const std::string& folder, const std::string& ckpt_path = "");

// The checkpoint that a run left in `folder` at the end of an epoch.
std::string saved(const std::string& folder, int64_t epoch);

}  // namespace lightning::testing
