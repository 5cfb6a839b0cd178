// Validation and test: over all batches of all loaders, without gradients.
// Source: Lightning 2.6, `_EvaluationLoop`; the reference's section 1.7.
#pragma once

#include <map>
#include <memory>
#include <optional>
#include <string>
#include <unordered_map>
#include <vector>

#include "lightning/loops/data_setup.h"
#include "lightning/loops/run.h"

namespace lightning {

class EvaluationLoop {
 public:
  // `kVal` or `kTest`; `progress` outlives the loop. `inference_mode` is off inside fit, where the
  // tensors made must be usable in training.
  EvaluationLoop(Run& run, LoaderStage stage, BatchProgress& progress, bool inference_mode);

  ~EvaluationLoop() { run_.drop_results(&results_); }
  EvaluationLoop(const EvaluationLoop&) = delete;
  EvaluationLoop& operator=(const EvaluationLoop&) = delete;

  // One result for each loader that gave a batch; empty when there was nothing to do.
  std::vector<ResultCollection::Values> run();

  // Asks for the loaders, once in fit or as often as they are to be reloaded.
  void setup_data();
  bool has_data() const { return data_.has_value(); }
  const std::vector<std::optional<int64_t>>& num_batches() const;
  std::vector<std::optional<int64_t>> sanity_batches() const;

  // Counts a validation that a resumed run need not do again.
  void count_as_done();
  bool has_run() const { return has_run_; }
  void reset_progress() { progress_ = BatchProgress(); }
  // What a run that goes on in another process needs beside the progress.
  State state_dict() const;
  void load_state_dict(const State& state);
  void set_restarting(bool restarting) { restarting_ = restarting; }
  void teardown();

 private:
  struct Hooks;
  const Hooks& hooks() const;
  bool enabled() const;
  std::vector<std::optional<int64_t>> batches_now() const;
  void begin();
  void step(CombinedIterator::Item item);
  std::vector<ResultCollection::Values> end();
  void store_outputs();
  bool indexed() const;  // hooks get a dataloader_idx

  Run& run_;
  LoaderStage stage_;
  BatchProgress& progress_;
  bool inference_mode_;
  bool restarting_ = false;
  bool has_run_ = false;
  ResultCollection results_{false};
  std::optional<StageData> data_;
  std::optional<int64_t> loaded_in_epoch_;
  std::unordered_map<int64_t, int64_t> seen_;  // batches of each loader, for the loggers' x-axis
  std::vector<ResultCollection::Values> outputs_;
  State restored_;  // to load once the loaders are there
};

// The train or eval mode of every submodule, to come back to.
class ModuleMode {
 public:
  explicit ModuleMode(torch::nn::Module& module);
  void restore() const;

 private:
  std::vector<std::pair<std::shared_ptr<torch::nn::Module>, bool>> modes_;
  torch::nn::Module& root_;
  bool root_training_;
};

}  // namespace lightning
