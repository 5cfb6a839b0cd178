// What a callback that writes predictions asks of the prediction loop.
#pragma once

#include "lightning/callback.h"

namespace lightning {

class PredictionWriterBase : public Callback {
 public:
  // Whether trainer.predict_batch_indices() is to be known at on_predict_batch_end.
  virtual bool needs_batch_indices() const = 0;
  // Whether trainer.predictions() and trainer.predict_epoch_batch_indices() are to be kept until
  // on_predict_epoch_end.
  virtual bool needs_epoch_predictions() const = 0;
};

}  // namespace lightning
