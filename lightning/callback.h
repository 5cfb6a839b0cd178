// Watches a run and may steer it without being part of the model.
//
// The trainer owns its callbacks and calls them on the thread that called fit(), in the order they
// were added; checkpoint callbacks come last, so they save what the others left behind. When a hook
// throws, every callback sees on_exception() and fit() rethrows. All hooks have empty bodies.
// Source: Lightning 2.6, `Callback`.
#pragma once

#include <cstdint>
#include <exception>
#include <string>
#include <typeinfo>

#include "lightning/fwd.h"

namespace lightning {

// Which entry point a run is in. Source: Lightning's `stage` argument of `setup`.
enum class Stage { kFit, kValidate, kTest, kPredict };
const char* to_string(Stage stage);  // "fit", "validate", "test", "predict"

// What a callback is to the Trainer, which adds defaults of some kinds and orders others.
enum class CallbackRole {
  kOther,
  kTuner,        // called first
  kMonitor,      // decides by a metric: at an epoch's end it is called after the module
  kCheckpoint,   // as kMonitor, and called last, to save what the others left behind
  kProgressBar,  // at most one
  kModelSummary,
  kTimer,  // ends fit by itself
};

class Callback {
 public:
  static constexpr const char* kPartKind = "callback";

  virtual ~Callback() = default;

  // After the data module's and before the module's setup; the model may not be configured yet.
  virtual void setup(Trainer&, LightningModule&, Stage) {}
  // After a run that ended well.
  virtual void teardown(Trainer&, LightningModule&, Stage) {}

  virtual void on_fit_start(Trainer&, LightningModule&) {}
  virtual void on_fit_end(Trainer&, LightningModule&) {}
  virtual void on_sanity_check_start(Trainer&, LightningModule&) {}
  virtual void on_sanity_check_end(Trainer&, LightningModule&) {}

  virtual void on_train_start(Trainer&, LightningModule&) {}
  virtual void on_train_end(Trainer&, LightningModule&) {}
  virtual void on_train_epoch_start(Trainer&, LightningModule&) {}
  // Callbacks that monitor a metric are called after the module's hook, the others before it.
  virtual void on_train_epoch_end(Trainer&, LightningModule&) {}
  virtual void on_train_batch_start(Trainer&, LightningModule&, const Batch&,
                                    int64_t /*batch_idx*/) {}

  // Called once per training batch, after the optimizer stepped or, while gradients accumulate,
  // after backward.
  //
  //   output.loss()  scalar, detached, on the strategy's device; already divided by
  //                  accumulate_grad_batches
  //   batch          what the dataloader gave, on the device; the first dim is the batch
  //   batch_idx      counts batches (not optimizer steps) from 0 within the epoch
  //
  // Reading output.loss() on the host waits for the GPU; module.log() does not.
  virtual void on_train_batch_end(Trainer&, LightningModule&, const StepOutput& /*output*/,
                                  const Batch&, int64_t /*batch_idx*/) {}

  virtual void on_validation_start(Trainer&, LightningModule&) {}
  virtual void on_validation_end(Trainer&, LightningModule&) {}
  virtual void on_validation_epoch_start(Trainer&, LightningModule&) {}
  virtual void on_validation_epoch_end(Trainer&, LightningModule&) {}
  virtual void on_validation_batch_start(Trainer&, LightningModule&, const Batch&,
                                         int64_t /*batch_idx*/, int64_t /*dataloader_idx*/) {}
  virtual void on_validation_batch_end(Trainer&, LightningModule&, const StepOutput&, const Batch&,
                                       int64_t /*batch_idx*/, int64_t /*dataloader_idx*/) {}

  virtual void on_test_start(Trainer&, LightningModule&) {}
  virtual void on_test_end(Trainer&, LightningModule&) {}
  virtual void on_test_epoch_start(Trainer&, LightningModule&) {}
  virtual void on_test_epoch_end(Trainer&, LightningModule&) {}
  virtual void on_test_batch_start(Trainer&, LightningModule&, const Batch&, int64_t /*batch_idx*/,
                                   int64_t /*dataloader_idx*/) {}
  virtual void on_test_batch_end(Trainer&, LightningModule&, const StepOutput&, const Batch&,
                                 int64_t /*batch_idx*/, int64_t /*dataloader_idx*/) {}

  virtual void on_predict_start(Trainer&, LightningModule&) {}
  virtual void on_predict_end(Trainer&, LightningModule&) {}
  virtual void on_predict_epoch_start(Trainer&, LightningModule&) {}
  virtual void on_predict_epoch_end(Trainer&, LightningModule&) {}
  virtual void on_predict_batch_start(Trainer&, LightningModule&, const Batch&,
                                      int64_t /*batch_idx*/, int64_t /*dataloader_idx*/) {}
  // `prediction` is what predict_step returned.
  virtual void on_predict_batch_end(Trainer&, LightningModule&, const Batch& /*prediction*/,
                                    const Batch&, int64_t /*batch_idx*/,
                                    int64_t /*dataloader_idx*/) {}

  // Around backward and the optimizer. The loss is what backward is about to run on: already
  // divided by accumulate_grad_batches, and scaled under a gradient scaler. At
  // on_before_optimizer_step gradients are unscaled and not yet clipped.
  virtual void on_before_zero_grad(Trainer&, LightningModule&, torch::optim::Optimizer&) {}
  virtual void on_before_backward(Trainer&, LightningModule&, const at::Tensor& /*loss*/) {}
  virtual void on_after_backward(Trainer&, LightningModule&) {}
  virtual void on_before_optimizer_step(Trainer&, LightningModule&, torch::optim::Optimizer&) {}

  // Any exception that leaves the run, Ctrl-C and SIGTERM too. teardown() is not called after it.
  virtual void on_exception(Trainer&, LightningModule&, const std::exception&) {}

  // The whole checkpoint, to add to or to read; after every state_dict(), before the module's hook.
  virtual void on_save_checkpoint(Trainer&, LightningModule&, State& /*checkpoint*/) {}
  virtual void on_load_checkpoint(Trainer&, LightningModule&, const State& /*checkpoint*/) {}

  // What this callback keeps across a restart; None for a stateless one.
  virtual State state_dict() const;
  virtual void load_state_dict(const State&) {}

  // The key of this callback's state in a checkpoint: the class's name, with the arguments that
  // tell two of a class apart as Python prints them, `EarlyStopping{'monitor': 'val_loss', ...}`.
  // Default: the class's name without its namespace.
  virtual std::string state_key() const;

  virtual CallbackRole role() const { return CallbackRole::kOther; }
  bool is_monitoring() const {
    return role() == CallbackRole::kMonitor || role() == CallbackRole::kCheckpoint;
  }
};

// The name of an object's class without its namespaces: "EarlyStopping".
std::string class_name(const std::type_info& type);

}  // namespace lightning
