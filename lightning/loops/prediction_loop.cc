#include "lightning/loops/prediction_loop.h"

#include <ATen/core/grad_mode.h>
#include <c10/core/InferenceMode.h>

#include <algorithm>

#include "lightning/errors.h"
#include "lightning/log.h"
#include "lightning/loops/evaluation_loop.h"
#include "lightning/loops/interrupt.h"
#include "lightning/prediction_writer.h"
#include "lightning/step/entry.h"

namespace lightning {

bool PredictionLoop::writers_want_indices() const {
  return std::any_of(run_.callbacks.begin(), run_.callbacks.end(), [](const auto& callback) {
    const auto* writer = dynamic_cast<const PredictionWriterBase*>(callback.get());
    return writer != nullptr &&
           (writer->needs_batch_indices() || writer->needs_epoch_predictions());
  });
}

bool PredictionLoop::writers_want_epoch() const {
  return std::any_of(run_.callbacks.begin(), run_.callbacks.end(), [](const auto& callback) {
    const auto* writer = dynamic_cast<const PredictionWriterBase*>(callback.get());
    return writer != nullptr && writer->needs_epoch_predictions();
  });
}

std::vector<std::vector<Batch>> PredictionLoop::run() {
  const c10::InferenceMode mode(run_.settings.inference_mode &&
                                run_.strategy_->supports_inference_mode());
  const at::NoGradGuard no_grad;
  if (is_zero(run_.settings.limit_predict_batches)) return {};
  const auto data = setup_stage(run_, LoaderStage::kPredict);
  run_.num_predict_batches = data.num_batches;
  if (std::all_of(data.num_batches.begin(), data.num_batches.end(),
                  [](const auto& n) { return n && *n == 0; })) {
    return {};
  }
  run_.predictions.assign(data.num_batches.size(), {});
  run_.predict_epoch_batch_indices.assign(data.num_batches.size(), {});
  const auto iterator = data.loader->iterate_items();

  const ModuleMode before(*run_.module);
  run_.call_module(Hook::on_predict_model_eval,
                   [](LightningModule& m) { m.on_predict_model_eval(); });
  run_.call(Hook::on_predict_start, &Callback::on_predict_start,
            &LightningModule::on_predict_start);
  run_.strategy_->on_evaluation_start();
  run_.call(Hook::on_predict_epoch_start, &Callback::on_predict_epoch_start,
            &LightningModule::on_predict_epoch_start);

  while (auto item = run_.profile([] { return std::string("[_PredictionLoop].predict_next"); },
                                  [&] { return iterator->next(); })) {
    progress_.is_last_batch = iterator->done();
    step(*iterator, std::move(*item));
  }

  run_.call(Hook::on_predict_epoch_end, &Callback::on_predict_epoch_end,
            &LightningModule::on_predict_epoch_end);
  auto predictions = return_predictions_ ? run_.predictions : std::vector<std::vector<Batch>>();
  run_.call(Hook::on_predict_end, &Callback::on_predict_end, &LightningModule::on_predict_end);
  run_.strategy_->on_evaluation_end();
  before.restore();
  run_.predictions.clear();
  run_.predict_epoch_batch_indices.clear();
  run_.predict_batch_indices.clear();
  return predictions;
}

void PredictionLoop::step(CombinedIterator& iterator, CombinedIterator::Item item) {
  const int64_t loader = item.dataloader_idx;
  if (writers_want_indices()) {
    run_.predict_batch_indices = iterator.last_indices();
    if (run_.predict_batch_indices.empty()) {
      warn_once(
          "The prediction loader does not tell which samples its batches hold, so "
          "prediction writers get no indices. Use a lightning::DataLoader for them.");
    } else if (writers_want_epoch()) {
      run_.predict_epoch_batch_indices[static_cast<size_t>(loader)].push_back(
          run_.predict_batch_indices);
    }
  }
  const Batch batch = run_.to_device(std::move(item.batch), loader);
  progress_.ready();
  run_.call(Hook::on_predict_batch_start, &Callback::on_predict_batch_start,
            &LightningModule::on_predict_batch_start, batch, item.batch_idx, loader);
  progress_.started();
  const Batch prediction = run_.call_module(Hook::predict_step, [&](LightningModule& m) {
    return enter_method(*run_.strategy_,
                        [&] { return m.predict_step(batch, item.batch_idx, loader); });
  });
  if (prediction.is_none()) {
    warn_once("predict_step returned nothing. If that is on purpose, ignore this warning.");
  }
  progress_.processed();
  run_.call(Hook::on_predict_batch_end, &Callback::on_predict_batch_end,
            &LightningModule::on_predict_batch_end, prediction, batch, item.batch_idx, loader);
  progress_.completed();
  if (return_predictions_ || writers_want_epoch()) {
    run_.predictions[static_cast<size_t>(loader)].push_back(prediction.to(at::kCPU));
  }
  if (!progress_.is_last_batch) raise_if_interrupted();
}

}  // namespace lightning
