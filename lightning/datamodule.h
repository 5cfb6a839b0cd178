// Data sets and loaders of all stages, apart from the model. Source: Lightning 2.6,
// `LightningDataModule`.
#pragma once

#include <exception>
#include <memory>

#include "lightning/batch.h"
#include "lightning/callback.h"
#include "lightning/checkpoint/state.h"
#include "lightning/data/loader.h"
#include "lightning/hyperparameters.h"
#include "lightning/registry.h"

namespace lightning {

class LightningDataModule : public Hyperparameters {
 public:
  static constexpr const char* kPartKind = "data module";

  LightningDataModule() = default;
  // Keeps the options as hyper-parameters.
  template <class O, std::enable_if_t<is_options<O>::value, int> = 0>
  explicit LightningDataModule(const O& options) {
    save_hyperparameters(options);
  }
  virtual ~LightningDataModule() = default;

  // On one process of each node, before setup: download, unpack. Keep no state here.
  virtual void prepare_data() {}
  virtual void setup(Stage) {}
  virtual void teardown(Stage) {}

  virtual Loaders train_dataloader() { return {}; }
  virtual Loaders val_dataloader() { return {}; }
  virtual Loaders test_dataloader() { return {}; }
  virtual Loaders predict_dataloader() { return {}; }

  // An override here is used instead of the module's.
  virtual Batch on_before_batch_transfer(Batch batch, int64_t /*dataloader_idx*/) { return batch; }
  virtual Batch transfer_batch_to_device(Batch batch, at::Device device,
                                         int64_t /*dataloader_idx*/) {
    return batch.to(device);
  }
  virtual Batch on_after_batch_transfer(Batch batch, int64_t /*dataloader_idx*/) { return batch; }

  virtual State state_dict() const { return {}; }
  virtual void load_state_dict(const State&) {}
  virtual void on_exception(const std::exception&) {}

  bool prepare_data_per_node = true;

  // Set while a trainer runs it. Errors: std::runtime_error otherwise.
  Trainer& trainer() const;
  void attach(Trainer* trainer) { trainer_ = trainer; }

 private:
  Trainer* trainer_ = nullptr;
};

}  // namespace lightning
