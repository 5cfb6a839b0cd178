#include "callbacks/prediction_writer.h"

#include "lightning/batch.h"
#include "lightning/errors.h"
#include "lightning/trainer.h"

namespace lightning {

BasePredictionWriter::BasePredictionWriter(const std::string& write_interval)
    : on_batch_(write_interval == "batch" || write_interval == "batch_and_epoch"),
      on_epoch_(write_interval == "epoch" || write_interval == "batch_and_epoch") {
  if (on_batch_ || on_epoch_) return;
  const std::vector<std::string> known = {"batch", "epoch", "batch_and_epoch"};
  throw MisconfigurationError(str("BasePredictionWriter got write_interval \"", write_interval,
                                  "\", expected ", join(known, " or "), ".",
                                  did_you_mean(write_interval, known)));
}

void BasePredictionWriter::write_on_batch_end(Trainer&, LightningModule&, const Batch&,
                                              const Indices&, const Batch&, int64_t, int64_t) {
  throw MisconfigurationError(str(class_name(typeid(*this)),
                                  " writes by batch but does not override write_on_batch_end. "
                                  "Override it, or choose the write_interval \"epoch\"."));
}

void BasePredictionWriter::write_on_epoch_end(Trainer&, LightningModule&,
                                              const std::vector<std::vector<Batch>>&,
                                              const std::vector<std::vector<Indices>>&) {
  throw MisconfigurationError(str(class_name(typeid(*this)),
                                  " writes by epoch but does not override write_on_epoch_end. "
                                  "Override it, or choose the write_interval \"batch\"."));
}

void BasePredictionWriter::on_predict_batch_end(Trainer& trainer, LightningModule& module,
                                                const Batch& prediction, const Batch& batch,
                                                int64_t batch_idx, int64_t dataloader_idx) {
  if (!on_batch_) return;
  write_on_batch_end(trainer, module, prediction, trainer.predict_batch_indices(), batch, batch_idx,
                     dataloader_idx);
}

void BasePredictionWriter::on_predict_epoch_end(Trainer& trainer, LightningModule& module) {
  if (!on_epoch_) return;
  write_on_epoch_end(trainer, module, trainer.predictions(), trainer.predict_epoch_batch_indices());
}

}  // namespace lightning
