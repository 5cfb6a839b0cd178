// Steps recorded as CUDA graphs: after a few ordinary steps forward, backward, clipping and the
// optimizer's update are recorded once and then replayed, without the host's work in between. A
// small model is bound by that work; a large one gains nothing.
//
//   Trainer trainer(TrainerOptions().compile("cuda_graph"));
//
// There is a graph for each shape of a batch (sizes, strides, dtypes, and the values of what is no
// tensor) and each place in the window of accumulation, all in one memory pool. Numbers are those
// of ordinary steps, bit for bit, dropout's too (but for 64-true, where a recorded step reads its
// learning rate in float32).
//
// A replay runs no code of the host. What the loop itself does is done at each replay: it counts,
// uploads the learning rate, and logs the tensors that training_step logged when it was recorded.
// What cannot be replayed leaves the steps as they are written, which is said once, with the
// reason:
//   - a module or callback that overrides a hook between zero_grad and the optimizer's step;
//   - a step that waits for the GPU, logs a number (log a tensor of the device instead), prints, or
//     asks for the epoch, the step or the trainer;
//   - an optimizer without a fused step, manual optimization, several processes.
// Not noticed: batch_idx is always the one at the recording, and so is whatever the step reads from
// members that are no parameters or buffers; a tensor that the step keeps from batch to batch must
// be written in place.
//
// Parameters that somebody else wrote, loading or averaging weights, are trained on in an ordinary
// step first. Parameters that moved, and modules or parameters whose mode changed, are recorded
// anew.
#pragma once

#include <c10/core/Device.h>

#include <cstdint>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "lightning/options.h"
#include "lightning/step/executor.h"
#include "lightning/step/graph_device.h"

namespace lightning {

struct CUDAGraphOptions : Options<CUDAGraphOptions> {
  OPTION(int64_t, warmup_steps, 3,
         "Ordinary steps on batches of a shape before it is recorded; at least 1.");
  OPTION(int64_t, max_graphs, 8,
         "Graphs, at most: one for each shape of a batch and each place in an accumulation window. "
         "Batches beyond are run by ordinary steps. At least 1.");
};

class CUDAGraphExecutor : public StepExecutor {
 public:
  // Errors: MisconfigurationError for options below 1.
  explicit CUDAGraphExecutor(const CUDAGraphOptions& options = {},
                             GraphDeviceFactory make_device = cuda_graph_device());
  ~CUDAGraphExecutor() override;

  // Errors: MisconfigurationError on another device than a GPU and in a build without CUDA.
  void start(c10::Device device) override;
  StepOutput run(TrainingStep& step, const Batch& batch) override;
  void stand_aside(const std::string& reason) override;
  void reset() override;

  // Since start().
  int64_t recorded() const { return recorded_; }
  int64_t replayed() const { return replayed_; }

 private:
  struct Graph;
  struct Model;

  StepOutput run_if_recordable(TrainingStep& step, const Batch& batch);
  Graph* find(const StepKind& kind, const Batch& batch);
  bool record(Graph& graph, const Batch& batch);
  StepOutput replay(Graph& graph, TrainingStep& step, const Batch& batch);
  StepOutput warm_up(TrainingStep& step, const Batch& batch);
  bool forget_recordings();
  bool changes_too_often();
  void say_once(const std::string& line);
  void drop_graphs();

  CUDAGraphOptions options_;
  GraphDeviceFactory make_device_;
  std::unique_ptr<GraphDevice> device_;
  std::vector<std::unique_ptr<Graph>> graphs_;  // also those that are warming up
  std::unique_ptr<Model> model_;
  TrainingStep* step_ = nullptr;  // the one that runs, or ran last
  bool asked_ = false;            // for obstacles
  bool aside_ = false;
  bool said_too_many_ = false;
  int64_t recorded_ = 0, replayed_ = 0, replayed_before_change_ = 0, times_changed_ = 0;
  std::set<std::string> said_;
};

}  // namespace lightning
