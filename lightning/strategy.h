// Where a model runs and how its copies or shards work together. The loops ask a strategy and never
// a strategy's type; the defaults here are those of a single device.
//
// Owned by the Trainer (or Fabric), called on the thread that called fit(). When a method throws,
// the run ends and on_exception() is called. Source: Lightning 2.6, `Strategy`.
#pragma once

#include <c10/core/Device.h>

#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "lightning/batch.h"
#include "lightning/checkpoint/checkpoint_io.h"
#include "lightning/distributed/collectives.h"
#include "lightning/fwd.h"
#include "lightning/precision.h"
#include "lightning/scope.h"

namespace lightning {

class ClusterEnvironment;
class DeferredInit;
class DeviceMesh;

enum class ClipAlgorithm { kNorm, kValue };

class Strategy : public Collectives {
 public:
  static constexpr const char* kPartKind = "strategy";

  Strategy();
  ~Strategy() override;

  // ---- What it is fitted with, before anything else ---------------------------------------------

  virtual void connect(std::shared_ptr<Accelerator> accelerator,
                       std::shared_ptr<Precision> precision, std::vector<c10::Device> devices,
                       std::shared_ptr<CheckpointIO> checkpoint_io);
  // Where this process stands among those of a run; after connect(). Nothing is started here.
  // Errors: MisconfigurationError for several devices or nodes and a strategy that works on one.
  virtual void connect_processes(std::shared_ptr<ClusterEnvironment> environment,
                                 int64_t num_nodes);
  // Whether one process of its own works on each device.
  virtual bool has_processes() const { return false; }
  Accelerator& accelerator() const { return *accelerator_; }
  Precision& precision() const { return *precision_; }
  CheckpointIO& checkpoint_io() const { return *checkpoint_io_; }

  // ---- Environment ------------------------------------------------------------------------------

  // Starts the other processes where nobody did, sets the device and joins the process group.
  virtual void setup_environment();
  virtual c10::Device root_device() const { return devices_.at(0); }
  // The devices of this node that take part.
  const std::vector<c10::Device>& devices() const { return devices_; }
  virtual int64_t local_rank() const { return 0; }
  virtual int64_t node_rank() const { return 0; }
  // Set before configure_model; null where there is none.
  virtual std::shared_ptr<DeviceMesh> device_mesh() const { return nullptr; }

  // BatchNorm takes its statistics over all processes in training steps.
  void set_sync_batchnorm(bool on) { sync_batchnorm_ = on; }

  // ---- The model and its optimizers -------------------------------------------------------------

  // Around the construction of a model (configure_model, Trainer::init_module): its dtype, and
  // whether it is born empty.
  //   empty_init   true: parameters have no memory until setup() or until a checkpoint is loaded
  //                into them; none: as is best for this strategy
  virtual Scope module_init_context(std::optional<bool> empty_init = std::nullopt);
  virtual Scope tensor_init_context();

  // Converts the module, moves it and, in fit, makes the optimizers, in the order this strategy
  // needs. `configure_optimizers` is empty outside fit; it gives the optimizers it made.
  using ConfigureOptimizers = std::function<std::vector<torch::optim::Optimizer*>()>;
  virtual void setup(torch::nn::Module& module, const ConfigureOptimizers& configure_optimizers);
  // Tensors of a tree that were born empty get their values.
  Batch materialized(Batch tree);
  // True when a checkpoint's weights can only be loaded once setup() has shaped the model.
  virtual bool restore_checkpoint_after_setup() const { return false; }

  // ---- The step ---------------------------------------------------------------------------------

  // Around a training, validation, test or prediction step of the model.
  virtual Scope step_scope() { return nullptr; }
  Scope batch_norm_scope();

  // Runs `run_backward` on the loss, with what the strategy needs before and after it.
  virtual void backward(const at::Tensor& loss,
                        const std::function<void(const at::Tensor&)>& run_backward);
  virtual at::Tensor optimizer_step(const OptimizerStep& step);
  // Blocks the reduction of gradients while alive; empty where there is none.
  virtual Scope no_backward_sync(torch::nn::Module&) { return nullptr; }
  // True when accumulating, or clipping, is done inside the strategy: the loop then does neither.
  virtual bool owns_gradient_accumulation() const { return false; }
  virtual bool owns_gradient_clipping() const { return false; }
  // The 2-norm over all gradients of the optimizer, a scalar on the device, over all shards.
  virtual at::Tensor gradient_norm(torch::optim::Optimizer& optimizer);
  //   limit   the largest norm, or the largest absolute value of an element
  virtual void clip_gradients(torch::optim::Optimizer& optimizer, double limit,
                              ClipAlgorithm algorithm);
  // After every training batch, stepping or not.
  virtual void on_step_end() {}

  virtual void on_train_start() {}
  virtual void on_train_end() {}
  virtual void on_evaluation_start() {}
  virtual void on_evaluation_end() {}

  // ---- Data -------------------------------------------------------------------------------------

  // A chance to wrap each loader before the loop iterates it.
  virtual std::shared_ptr<Loader> process_dataloader(std::shared_ptr<Loader> loader);
  // nullopt when every process reads all the data.
  virtual std::optional<SamplerArguments> sampler_arguments() const { return std::nullopt; }
  // False where torch's inference mode does not work with this strategy (collectives, shards).
  virtual bool supports_inference_mode() const { return true; }

  // ---- Checkpoints ------------------------------------------------------------------------------

  virtual State model_state(const torch::nn::Module& module);
  // Errors: CheckpointError that lists missing, unexpected and mis-shaped keys, before anything is
  // changed. Not strict: missing and unexpected keys are left alone.
  virtual void load_model_state(torch::nn::Module& module, const State& state, bool strict);
  virtual State optimizer_state(torch::optim::Optimizer& optimizer,
                                const torch::nn::Module& module);
  virtual void load_optimizer_state(torch::optim::Optimizer& optimizer,
                                    const torch::nn::Module& module, const State& state);
  // Under which key a checkpoint is written with the precision's state.
  virtual std::string precision_key() const { return precision_->state_key(); }
  // On rank 0; the others wait at the barrier after it.
  virtual void save_checkpoint(const State& checkpoint, const std::string& path);
  virtual State load_checkpoint(const std::string& path);
  virtual void remove_checkpoint(const std::string& path);

  // ---- The end ----------------------------------------------------------------------------------

  // This process's run ends by an error of its own, and the other processes are ended. From here on
  // it works alone: a collective is one of this process, which counts as rank 0 and may save what
  // it has of the run.
  virtual void continue_alone() {}
  virtual void on_exception(const std::exception&) {}
  // Moves the module to the host, so that the device's memory is free between runs.
  virtual void teardown(torch::nn::Module* module,
                        const std::vector<torch::optim::Optimizer*>& optimizers);

 protected:
  // Around the construction of a model that is born empty.
  Scope record_construction();
  // Null where nothing was born empty that has no values yet.
  DeferredInit* deferred_init() const { return deferred_init_.get(); }
  // After values were given.
  void end_construction();
  // Gives what was born empty its values, on the device. No effect on other modules.
  // Errors: MisconfigurationError for a parameter on the meta device that was not.
  void materialize(torch::nn::Module& module);

  std::shared_ptr<Accelerator> accelerator_;
  std::shared_ptr<Precision> precision_;
  std::shared_ptr<CheckpointIO> checkpoint_io_;
  std::vector<c10::Device> devices_;

 private:
  std::unique_ptr<DeferredInit> deferred_init_;
  bool sync_batchnorm_ = false;
};

}  // namespace lightning
