// What users subclass: a torch::nn::Module that also says how it is trained.
//
// Held by std::shared_ptr; hooks are called on the thread that called Trainer::fit() (or validate,
// test, predict), in the order README's table gives. Nothing here is called from other threads, but
// data loaders run their data sets on theirs.
// Source: Lightning 2.6, `LightningModule`.
#pragma once

#include <torch/nn/module.h>

#include <exception>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <unordered_map>
#include <utility>
#include <variant>
#include <vector>

#include "lightning/batch.h"
#include "lightning/callback.h"
#include "lightning/checkpoint/state.h"
#include "lightning/data/loader.h"
#include "lightning/fwd.h"
#include "lightning/hyperparameters.h"
#include "lightning/metrics/metric.h"
#include "lightning/optim/lightning_optimizer.h"
#include "lightning/optim/optimizers.h"
#include "lightning/options.h"
#include "lightning/registry.h"
#include "lightning/strategy.h"

namespace lightning {

// In the order they were registered.
using NamedMetrics = std::vector<std::pair<std::string, Metric*>>;

// How an epoch's values of a metric become one.
using ReduceFx = std::variant<std::string, std::function<at::Tensor(const at::Tensor& values)>>;

// Where and how a value is logged; what is not set depends on the hook that logs.
struct LogOptions {
  TORCH_ARG(bool, prog_bar) = false;
  TORCH_ARG(bool, logger) = true;
  TORCH_ARG(std::optional<bool>, on_step) = std::nullopt;   // at each batch
  TORCH_ARG(std::optional<bool>, on_epoch) = std::nullopt;  // reduced over the epoch
  // "mean" (weighted by batch size), "min", "max", "sum", or a function of all values [n].
  TORCH_ARG(ReduceFx, reduce_fx) = std::string("mean");
  TORCH_ARG(bool, enable_graph) = false;       // keeps the autograd graph of the value
  TORCH_ARG(bool, sync_dist) = false;          // reduces over processes
  TORCH_ARG(bool, add_dataloader_idx) = true;  // "/dataloader_idx_1" after the name
  // Rows in the batch, the weight of a mean; found in the batch where it is not given.
  TORCH_ARG(std::optional<int64_t>, batch_size) = std::nullopt;
  TORCH_ARG(bool, rank_zero_only) = false;
};

// A number, a one-element tensor, or a Metric that outlives the epoch.
class LogValue {
 public:
  template <class T, std::enable_if_t<std::is_arithmetic<T>::value, int> = 0>
  LogValue(T value) : value_(static_cast<double>(value)) {}
  LogValue(at::Tensor value) : value_(std::move(value)) {}
  LogValue(Metric& metric) : value_(&metric) {}
  template <class M, std::enable_if_t<std::is_base_of<Metric, M>::value, int> = 0>
  LogValue(const std::shared_ptr<M>& metric) : value_(static_cast<Metric*>(metric.get())) {}

  const double* number() const { return std::get_if<double>(&value_); }
  const at::Tensor* tensor() const { return std::get_if<at::Tensor>(&value_); }
  Metric* metric() const {
    const auto* metric = std::get_if<Metric*>(&value_);
    return metric == nullptr ? nullptr : *metric;
  }

 private:
  std::variant<double, at::Tensor, Metric*> value_;
};

// What a module may ask of whatever runs it: a Trainer's run, or Fabric.
class ModuleHost {
 public:
  virtual ~ModuleHost() = default;

  virtual Trainer* trainer() = 0;  // null under Fabric
  virtual Strategy& strategy() = 0;
  virtual int64_t current_epoch() const = 0;
  virtual int64_t global_step() const = 0;
  virtual void log(const std::string& name, const LogValue& value, const LogOptions& options) = 0;
  virtual void print(const std::string& line) = 0;
  virtual void manual_backward(const at::Tensor& loss) = 0;
  virtual void clip_gradients(torch::optim::Optimizer& optimizer, std::optional<double> limit,
                              const std::optional<std::string>& algorithm) = 0;
  virtual std::vector<std::shared_ptr<LightningOptimizer>> optimizers() = 0;
  virtual std::vector<std::shared_ptr<LRScheduler>> lr_schedulers() = 0;
  virtual std::vector<std::shared_ptr<Logger>> loggers() = 0;
};

class LightningModule : public torch::nn::Module, public Hyperparameters {
 public:
  static constexpr const char* kPartKind = "model";

  LightningModule() = default;
  // Keeps the options as the module's hyper-parameters: saved, logged, restored, set from YAML.
  template <class O, std::enable_if_t<is_options<O>::value, int> = 0>
  explicit LightningModule(const O& options) {
    save_hyperparameters(options);
  }
  ~LightningModule() override = default;

  // ---- The steps --------------------------------------------------------------------------------

  // A loss, a map with "loss" in it, or `lightning::skip`.
  //   batch       on the device; its first dim is the batch
  //   batch_idx   counts batches from 0 within the epoch
  virtual StepOutput training_step(const Batch& batch, int64_t batch_idx);
  // Override the first form; with several data loaders, the second.
  virtual StepOutput validation_step(const Batch& batch, int64_t batch_idx);
  virtual StepOutput validation_step(const Batch& batch, int64_t batch_idx, int64_t dataloader_idx);
  virtual StepOutput test_step(const Batch& batch, int64_t batch_idx);
  virtual StepOutput test_step(const Batch& batch, int64_t batch_idx, int64_t dataloader_idx);
  // What predict() collects. Default: predict_forward of the batch.
  virtual Batch predict_step(const Batch& batch, int64_t batch_idx);
  virtual Batch predict_step(const Batch& batch, int64_t batch_idx, int64_t dataloader_idx);
  virtual Batch predict_forward(const Batch& batch);

  // ---- Set-up -----------------------------------------------------------------------------------

  // Builds the layers, on the device and in the dtype they will live in. Called once in the life of
  // a module, before the first run that needs it.
  virtual void configure_model() {}
  virtual Optimizers configure_optimizers() { return {}; }
  // Added to the trainer's for a run; one of a type the trainer has replaces it.
  virtual std::vector<std::shared_ptr<Callback>> configure_callbacks() { return {}; }
  virtual void prepare_data() {}
  virtual void setup(Stage) {}
  virtual void teardown(Stage) {}
  virtual Loaders train_dataloader() { return {}; }
  virtual Loaders val_dataloader() { return {}; }
  virtual Loaders test_dataloader() { return {}; }
  virtual Loaders predict_dataloader() { return {}; }

  // ---- Around the steps -------------------------------------------------------------------------

  virtual void on_fit_start() {}
  virtual void on_fit_end() {}
  virtual void on_train_start() {}
  virtual void on_train_end() {}
  virtual void on_train_epoch_start() {}
  virtual void on_train_epoch_end() {}
  // Returning -1 ends the epoch before this batch.
  virtual int64_t on_train_batch_start(const Batch&, int64_t /*batch_idx*/) { return 0; }
  virtual void on_train_batch_end(const StepOutput&, const Batch&, int64_t /*batch_idx*/) {}
  virtual void on_validation_start() {}
  virtual void on_validation_end() {}
  virtual void on_validation_epoch_start() {}
  virtual void on_validation_epoch_end() {}
  virtual void on_validation_batch_start(const Batch&, int64_t /*batch_idx*/,
                                         int64_t /*dataloader_idx*/) {}
  virtual void on_validation_batch_end(const StepOutput&, const Batch&, int64_t /*batch_idx*/,
                                       int64_t /*dataloader_idx*/) {}
  virtual void on_test_start() {}
  virtual void on_test_end() {}
  virtual void on_test_epoch_start() {}
  virtual void on_test_epoch_end() {}
  virtual void on_test_batch_start(const Batch&, int64_t /*batch_idx*/,
                                   int64_t /*dataloader_idx*/) {}
  virtual void on_test_batch_end(const StepOutput&, const Batch&, int64_t /*batch_idx*/,
                                 int64_t /*dataloader_idx*/) {}
  virtual void on_predict_start() {}
  virtual void on_predict_end() {}
  virtual void on_predict_epoch_start() {}
  virtual void on_predict_epoch_end() {}
  virtual void on_predict_batch_start(const Batch&, int64_t /*batch_idx*/,
                                      int64_t /*dataloader_idx*/) {}
  virtual void on_predict_batch_end(const Batch& /*prediction*/, const Batch&,
                                    int64_t /*batch_idx*/, int64_t /*dataloader_idx*/) {}

  // Modes around evaluation. The default of the `_train` hooks is not called: the mode of each
  // submodule before evaluation comes back instead.
  virtual void on_validation_model_zero_grad();
  virtual void on_validation_model_eval() { eval(); }
  virtual void on_validation_model_train() { train(); }
  virtual void on_test_model_eval() { eval(); }
  virtual void on_test_model_train() { train(); }
  virtual void on_predict_model_eval() { eval(); }

  // ---- Data on its way to the device ------------------------------------------------------------

  virtual Batch on_before_batch_transfer(Batch batch, int64_t /*dataloader_idx*/) { return batch; }
  virtual Batch transfer_batch_to_device(Batch batch, at::Device device,
                                         int64_t /*dataloader_idx*/) {
    return batch.to(device);
  }
  virtual Batch on_after_batch_transfer(Batch batch, int64_t /*dataloader_idx*/) { return batch; }

  // ---- Backward and the optimizer ---------------------------------------------------------------

  virtual void on_before_zero_grad(torch::optim::Optimizer&) {}
  virtual void optimizer_zero_grad(int64_t epoch, int64_t batch_idx,
                                   torch::optim::Optimizer& optimizer);
  virtual void on_before_backward(const at::Tensor& /*loss*/) {}
  virtual void backward(const at::Tensor& loss);
  virtual void on_after_backward() {}
  virtual void on_before_optimizer_step(torch::optim::Optimizer&) {}
  virtual void configure_gradient_clipping(torch::optim::Optimizer& optimizer,
                                           std::optional<double> gradient_clip_val,
                                           const std::optional<std::string>& algorithm);
  // Must run the closure: it holds training_step, zero-grad and backward.
  virtual void optimizer_step(int64_t epoch, int64_t batch_idx, LightningOptimizer& optimizer,
                              const LightningOptimizer::Closure& closure);
  virtual void lr_scheduler_step(LRScheduler& scheduler, std::optional<double> metric);

  // ---- Checkpoints ------------------------------------------------------------------------------

  virtual void on_save_checkpoint(State& /*checkpoint*/) {}
  // Before the weights are loaded.
  virtual void on_load_checkpoint(State& /*checkpoint*/) {}
  // False: keys that are missing or unexpected in a checkpoint are left alone.
  bool strict_loading() const { return strict_loading_.value_or(true); }
  bool strict_loading_is_set() const { return strict_loading_.has_value(); }
  void set_strict_loading(bool strict) { strict_loading_ = strict; }

  // ---- What a module may do ---------------------------------------------------------------------

  // Records a value under a name, for loggers, progress bar and callbacks.
  // Errors: MisconfigurationError in a hook that cannot log, for a name with "/dataloader_idx_",
  // for flags that differ from an earlier call of the same hook, for a tensor of more than one
  // element.
  void log(const std::string& name, const LogValue& value, const LogOptions& options = {});
  void log_dict(const std::vector<std::pair<std::string, LogValue>>& values,
                const LogOptions& options = {});
  // Makes checkpoints hold the states of a metric, a member that lives as long as the module: a run
  // that resumes in the middle of an epoch then ends it with the value of one that was not stopped.
  // A metric that is logged in every step is kept without; one that is updated in the steps and
  // logged at the end needs this.
  // Errors: MisconfigurationError for a name that another metric has.
  void register_metric(const std::string& name, Metric& metric);
  // On rank 0, without tearing the progress bar.
  template <class... Args>
  void print(const Args&... args) {
    print_line(str(args...));
  }
  at::Tensor all_gather(const at::Tensor& tensor);

  // False: training_step calls manual_backward and steps the optimizers itself.
  bool automatic_optimization() const { return automatic_optimization_; }
  void set_automatic_optimization(bool automatic) { automatic_optimization_ = automatic; }
  void manual_backward(const at::Tensor& loss);
  // The only optimizer, or all of them.
  LightningOptimizer& optimizer();
  std::vector<std::shared_ptr<LightningOptimizer>> optimizers();
  std::vector<std::shared_ptr<LRScheduler>> lr_schedulers();
  // Only parameters of this optimizer require gradients until untoggle_optimizer.
  void toggle_optimizer(LightningOptimizer& optimizer);
  void untoggle_optimizer(LightningOptimizer& optimizer);
  // Clips now; for manual optimization and for overrides of configure_gradient_clipping.
  void clip_gradients(torch::optim::Optimizer& optimizer,
                      std::optional<double> gradient_clip_val = std::nullopt,
                      const std::optional<std::string>& algorithm = std::nullopt);
  void freeze();    // no parameter requires gradients; eval mode
  void unfreeze();  // every parameter does; train mode

  // ---- What a module knows ----------------------------------------------------------------------

  // Errors: std::runtime_error for a module that no trainer runs.
  Trainer& trainer() const;
  bool attached() const { return host_ != nullptr; }
  int64_t current_epoch() const;
  int64_t global_step() const;
  int64_t global_rank() const;
  int64_t local_rank() const;
  at::Device device() const;
  at::ScalarType dtype() const;  // of the first floating parameter
  std::vector<std::shared_ptr<Logger>> loggers() const;
  std::shared_ptr<DeviceMesh> device_mesh() const;  // null where the strategy has none

  // Whether prepare_data runs on one process of each node, or of all.
  bool prepare_data_per_node = true;
  // Whether a rank's loader may have no batch while others' have some; never in training.
  bool allow_zero_length_dataloader_with_multiple_devices = false;
  // An input for the summary's sizes and for graphs of loggers.
  Batch example_input_array;
  // Floating-point operations of one batch, for ThroughputMonitor; 0 when not known.
  int64_t flops_per_batch = 0;

  // Makes the optimizers instead of configure_optimizers; the command line sets it for
  // `--optimizer`.
  void set_optimizer_factory(std::function<Optimizers(LightningModule&)> factory) {
    optimizer_factory_ = std::move(factory);
  }

  // ---- For the engine ---------------------------------------------------------------------------

  bool has_optimizer_factory() const { return optimizer_factory_ != nullptr; }
  Optimizers make_optimizers();
  void attach(ModuleHost* host) { host_ = host; }
  // Runs configure_model the first time it is asked.
  void ensure_configured();
  bool configured() const { return configured_; }
  const NamedMetrics& registered_metrics() const { return metrics_; }

 private:
  void print_line(const std::string& line);
  ModuleHost& host(const char* wanted) const;

  ModuleHost* host_ = nullptr;
  bool configured_ = false;
  std::optional<bool> strict_loading_;
  bool automatic_optimization_ = true;
  NamedMetrics metrics_;
  std::function<Optimizers(LightningModule&)> optimizer_factory_;
  // requires_grad of parameters before toggle_optimizer.
  std::unordered_map<const void*, bool> toggled_;
};

}  // namespace lightning
