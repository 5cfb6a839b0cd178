// Prediction over all batches of all loaders. Source: Lightning 2.6, `_PredictionLoop`.
#pragma once

#include <vector>

#include "lightning/loops/data_setup.h"
#include "lightning/loops/run.h"

namespace lightning {

class PredictionLoop {
 public:
  PredictionLoop(Run& run, bool return_predictions)
      : run_(run), return_predictions_(return_predictions) {}

  // Predictions of each loader, on the host; empty when they are not to be returned.
  std::vector<std::vector<Batch>> run();

  const BatchProgress& progress() const { return progress_; }

 private:
  void step(CombinedIterator& iterator, CombinedIterator::Item item);
  bool writers_want_indices() const;
  bool writers_want_epoch() const;

  Run& run_;
  bool return_predictions_;
  BatchProgress progress_;
};

}  // namespace lightning
