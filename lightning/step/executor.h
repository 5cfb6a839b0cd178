// How a training step is run. `eager` runs it as it is written; others record the work it gives the
// device once and replay that.
#pragma once

#include <c10/core/Device.h>

#include <memory>
#include <string>

#include "lightning/batch.h"
#include "lightning/fwd.h"

namespace lightning {

// What makes two steps on batches of one shape different steps.
struct StepKind {
  bool clears = true;   // first of its window of accumulation: zeroes the gradients
  bool updates = true;  // last of its window: clips and steps the optimizer
  int64_t window = 1;   // batches, by which the loss is divided

  bool operator==(const StepKind& other) const {
    return clears == other.clears && updates == other.updates && window == other.window;
  }
};

// What a recorded step leaves to the host at each replay. Made and read by the step itself.
class StepRecord {
 public:
  virtual ~StepRecord() = default;
};

// One batch's forward, zero-grad, backward, clipping and optimizer step, as the loop hands it down.
class TrainingStep {
 public:
  virtual ~TrainingStep() = default;

  virtual StepKind kind() const = 0;
  // Runs it as it is written.
  virtual StepOutput run(const Batch& batch) = 0;

  // ---- For executors that record ----------------------------------------------------------------

  virtual torch::nn::Module& module() = 0;
  virtual c10::Device device() const = 0;
  virtual int64_t epoch() const = 0;
  // Why no step of this run can be recorded ("MyModule overrides on_after_backward"); empty where
  // one may. Holds until StepExecutor::reset().
  virtual std::string obstacle() const = 0;

  // Runs the step while its work is captured; `inputs` and what is in the record are the tensors
  // that each replay reads and writes. What the step counts on the host is as before when it
  // returns or throws.
  // Errors: CannotRecord for what a replay would leave out, and whatever the step throws.
  virtual std::unique_ptr<StepRecord> record(const Batch& inputs) = 0;
  // Before a recording and before each replay: brings what changed on the host to the device.
  // False where what was recorded does no longer what the step would.
  virtual bool prepare() = 0;
  // After each replay: counts, logs and gives what the step would have.
  virtual StepOutput finish(const StepRecord& record) = 0;
};

class StepExecutor {
 public:
  static constexpr const char* kPartKind = "step executor";

  virtual ~StepExecutor() = default;

  // Told when a run begins, after reset().
  // Errors: MisconfigurationError where it cannot work on this device.
  virtual void start(c10::Device) {}
  virtual StepOutput run(TrainingStep& step, const Batch& batch) = 0;
  // Told instead of run() where the loop does not hand its steps down.
  virtual void stand_aside(const std::string& /*reason*/) {}

  // Forgets what was recorded: the model or its optimizers changed, or a run ends.
  virtual void reset() {}
};

}  // namespace lightning
