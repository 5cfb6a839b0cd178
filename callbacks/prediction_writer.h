// Base of callbacks that write predictions somewhere, by batch or at the end.
//
//   struct Writer : lightning::BasePredictionWriter {
//     Writer() : BasePredictionWriter("batch") {}
//     void write_on_batch_end(...) override { torch::save(prediction.tensor(), ...); }
//   };
//   trainer.predict(module, loader, RunArguments().return_predictions(false));
//
// With several processes each writes its own share; the indices say which samples it holds.
// Source: Lightning 2.6, `BasePredictionWriter`.
#pragma once

#include <string>
#include <vector>

#include "lightning/prediction_writer.h"

namespace lightning {

class BasePredictionWriter : public PredictionWriterBase {
 public:
  using Indices = std::vector<int64_t>;

  // "batch", "epoch" or "batch_and_epoch". Errors: MisconfigurationError for anything else.
  explicit BasePredictionWriter(const std::string& write_interval = "batch");

  // Called after each batch.
  //   prediction       what predict_step returned, on the device
  //   batch_indices    places of its samples in the data set; empty where the loader has none
  virtual void write_on_batch_end(Trainer& trainer, LightningModule& module,
                                  const Batch& prediction, const Indices& batch_indices,
                                  const Batch& batch, int64_t batch_idx, int64_t dataloader_idx);
  // Called after the last batch, with all predictions of each loader on the host.
  virtual void write_on_epoch_end(Trainer& trainer, LightningModule& module,
                                  const std::vector<std::vector<Batch>>& predictions,
                                  const std::vector<std::vector<Indices>>& batch_indices);

  bool needs_batch_indices() const override { return true; }
  bool needs_epoch_predictions() const override { return on_epoch_; }
  void on_predict_batch_end(Trainer& trainer, LightningModule& module, const Batch& prediction,
                            const Batch& batch, int64_t batch_idx, int64_t dataloader_idx) override;
  void on_predict_epoch_end(Trainer& trainer, LightningModule& module) override;

 private:
  bool on_batch_;
  bool on_epoch_;
};

}  // namespace lightning
