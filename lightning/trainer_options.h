// Every flag of a Trainer, as code, YAML and the command line set it.
// Source: Lightning 2.6, `Trainer.__init__`; defaults are the original's.
#pragma once

#include <map>
#include <memory>
#include <optional>
#include <string>
#include <variant>
#include <vector>

#include "lightning/accelerator.h"
#include "lightning/callback.h"
#include "lightning/checkpoint/checkpoint_io.h"
#include "lightning/distributed/cluster_environment.h"
#include "lightning/duration.h"
#include "lightning/logger.h"
#include "lightning/options.h"
#include "lightning/precision.h"
#include "lightning/profiler.h"
#include "lightning/registry.h"
#include "lightning/step/executor.h"
#include "lightning/strategy.h"

namespace lightning {

// The `logger` flag: true (the default logger), false (none), one, or several.
class LoggerFlag {
 public:
  LoggerFlag(bool on = true) : on_(on) {}
  LoggerFlag(Part<Logger> part) : parts_{std::move(part)} {}
  LoggerFlag(std::vector<Part<Logger>> parts) : parts_(std::move(parts)) {}
  LoggerFlag(const char* name) : parts_{Part<Logger>(name)} {}
  template <class T, std::enable_if_t<std::is_constructible<Part<Logger>, T>::value &&
                                          !std::is_arithmetic<T>::value &&
                                          !std::is_same<std::decay_t<T>, LoggerFlag>::value,
                                      int> = 0>
  LoggerFlag(const T& part) : parts_{Part<Logger>(part)} {}

  bool is_default() const { return on_ && parts_.empty(); }
  bool on() const { return on_ && (parts_.size() > 0 || is_default()); }
  const std::vector<Part<Logger>>& parts() const { return parts_; }

 private:
  bool on_ = true;
  std::vector<Part<Logger>> parts_;
};

template <>
struct Codec<LoggerFlag> {
  static void write(Json& out, const LoggerFlag& value);
  static void read(const Json& in, LoggerFlag& value, const std::string& where);
  static std::string type() { return "bool or logger or list of logger"; }
  static bool fits(const Json&) { return true; }
};

// The `plugins` flag takes precisions, checkpoint IO and cluster environments, by object or by
// name.
class Plugin {
 public:
  Plugin() = default;
  template <class P, std::enable_if_t<std::is_base_of<Precision, P>::value, int> = 0>
  Plugin(std::shared_ptr<P> precision) : precision_(std::move(precision)) {}
  template <class C, std::enable_if_t<std::is_base_of<CheckpointIO, C>::value, int> = 0>
  Plugin(std::shared_ptr<C> io) : checkpoint_io_(std::move(io)) {}
  template <class E, std::enable_if_t<std::is_base_of<ClusterEnvironment, E>::value, int> = 0>
  Plugin(std::shared_ptr<E> environment) : cluster_environment_(std::move(environment)) {}

  const std::shared_ptr<Precision>& precision() const { return precision_; }
  const std::shared_ptr<CheckpointIO>& checkpoint_io() const { return checkpoint_io_; }
  const std::shared_ptr<ClusterEnvironment>& cluster_environment() const {
    return cluster_environment_;
  }

 private:
  friend struct Codec<Plugin>;
  std::shared_ptr<Precision> precision_;
  std::shared_ptr<CheckpointIO> checkpoint_io_;
  std::shared_ptr<ClusterEnvironment> cluster_environment_;
};

template <>
struct Codec<Plugin> {
  static void write(Json& out, const Plugin& value);
  static void read(const Json& in, Plugin& value, const std::string& where);
  static std::string type() { return "precision or checkpoint_io or cluster_environment"; }
  static bool fits(const Json&) { return true; }
};

using IntOrFloat = std::variant<int64_t, double>;
using ValCheckInterval = std::variant<int64_t, double, std::string, std::map<std::string, int64_t>>;
using BoolOrInt = std::variant<bool, int64_t>;
using BoolOrWord = std::variant<bool, std::string>;

struct TrainerOptions : Options<TrainerOptions> {
  OPTION(Part<Accelerator>, accelerator, "auto",
         "Kind of device: cpu, cuda (gpu), or auto for the best there is.");
  OPTION(Part<Strategy>, strategy, "auto",
         "How devices work together: single_device, ddp, fsdp, or auto: ddp for more than one "
         "device.");
  OPTION(DevicesFlag, devices, std::string("auto"),
         "Devices to use: a count, a list of indices, \"0,1\", -1 for all, or auto.");
  OPTION(int64_t, num_nodes, 1, "Machines that take part.");
  OPTION(std::optional<Part<Precision>>, precision, std::nullopt,
         "Dtypes of parameters and computation: 32-true, 64-true, 16-true, bf16-true, 16-mixed, "
         "bf16-mixed, or 64, 32, 16, bf16.");
  OPTION(LoggerFlag, logger, true,
         "true for TensorBoard in default_root_dir, false for none, a logger or a list of them.");
  OPTION(std::vector<Part<Callback>>, callbacks, {}, "Callbacks, in the order they are called.");
  OPTION(BoolOrInt, fast_dev_run, false,
         "Runs n batches (true: 1) of each stage, without logging or saving, to find errors.");
  OPTION(std::optional<int64_t>, max_epochs, std::nullopt,
         "Epochs after which fit ends; -1 for no end. 1000 where nothing else ends it.");
  OPTION(std::optional<int64_t>, min_epochs, std::nullopt, "Epochs before fit may stop early.");
  OPTION(int64_t, max_steps, -1, "Optimizer steps after which fit ends; -1 for no end.");
  OPTION(std::optional<int64_t>, min_steps, std::nullopt,
         "Optimizer steps before fit may stop early.");
  OPTION(std::optional<Duration>, max_time, std::nullopt,
         "Time after which fit ends: DD:HH:MM:SS, or a map of days, hours, minutes, seconds.");
  OPTION(std::optional<IntOrFloat>, limit_train_batches, std::nullopt,
         "Batches of an epoch: a count, or a fraction of them (1.0: all).");
  OPTION(std::optional<IntOrFloat>, limit_val_batches, std::nullopt,
         "Batches of a validation: a count, or a fraction of them.");
  OPTION(std::optional<IntOrFloat>, limit_test_batches, std::nullopt,
         "Batches of a test: a count, or a fraction of them.");
  OPTION(std::optional<IntOrFloat>, limit_predict_batches, std::nullopt,
         "Batches of a prediction: a count, or a fraction of them.");
  OPTION(IntOrFloat, overfit_batches, 0.0,
         "Trains and validates on these few batches only, in the same order each epoch.");
  OPTION(std::optional<ValCheckInterval>, val_check_interval, std::nullopt,
         "Validates every n batches, after this fraction of an epoch, or after this time "
         "(DD:HH:MM:SS).");
  OPTION(std::optional<int64_t>, check_val_every_n_epoch, 1,
         "Validates in every n-th epoch; null counts val_check_interval over all epochs.");
  OPTION(std::optional<int64_t>, num_sanity_val_steps, std::nullopt,
         "Validation batches to try before training; -1 for all. 2 where not given.");
  OPTION(std::optional<int64_t>, log_every_n_steps, std::nullopt,
         "Steps between two rows of the loggers. 50 where not given.");
  OPTION(std::optional<bool>, enable_checkpointing, std::nullopt,
         "Whether a ModelCheckpoint is added where none is given. True where not given.");
  OPTION(std::optional<bool>, enable_progress_bar, std::nullopt,
         "Whether a progress bar is shown. True where not given.");
  OPTION(std::optional<bool>, enable_model_summary, std::nullopt,
         "Whether a ModelSummary is printed. True where not given.");
  OPTION(int64_t, accumulate_grad_batches, 1, "Batches whose gradients one optimizer step sums.");
  OPTION(std::optional<double>, gradient_clip_val, std::nullopt,
         "Limit of the gradients' norm, or of their absolute values; null for none.");
  OPTION(std::optional<std::string>, gradient_clip_algorithm, std::nullopt,
         "\"norm\" or \"value\". norm where not given.");
  OPTION(std::optional<BoolOrWord>, deterministic, std::nullopt,
         "Whether operators must be deterministic; \"warn\" to be told of those that are not.");
  OPTION(
      std::optional<bool>, benchmark, std::nullopt,
      "Whether cuDNN, and cuBLASLt for the layers of lightning/nn, may measure which algorithm is "
      "the fastest. LibTorch's own setting where not given.");
  OPTION(bool, inference_mode, true,
         "Whether validate, test and predict run in inference mode rather than without gradients.");
  OPTION(bool, use_distributed_sampler, true, "Whether each process reads its own share of data.");
  OPTION(std::optional<Part<Profiler>>, profiler, std::nullopt,
         "Times the parts of a run: simple.");
  OPTION(bool, detect_anomaly, false, "Finds the operator whose backward gave NaN. Slow.");
  OPTION(
      std::string, sync_debug_mode, "default",
      "What becomes of an operator in a training step that waits for the GPU: nothing (default), "
      "a warning (warn) or an error (error).");
  OPTION(bool, barebones, false, "Turns off all that costs time beside training.");
  OPTION(std::vector<Plugin>, plugins, {},
         "Precision, checkpoint IO (AsyncCheckpointIO) or cluster environment (SLURMEnvironment, "
         "TorchElasticEnvironment, MPIEnvironment, KubeflowEnvironment, LightningEnvironment).");
  OPTION(bool, sync_batchnorm, false,
         "Whether BatchNorm takes its statistics over all processes in training.");
  OPTION(int64_t, reload_dataloaders_every_n_epochs, 0,
         "Asks for new data loaders every n epochs; 0 for never.");
  OPTION(std::optional<std::string>, default_root_dir, std::nullopt,
         "Folder for logs and checkpoints. The working directory where not given.");
  OPTION(std::optional<Part<StepExecutor>>, compile, std::nullopt,
         "How a step is run: eager, or cuda_graph, which records steps and replays them.");
  OPTION(bool, enable_autolog_hparams, true,
         "Whether hyper-parameters are sent to the loggers at the start.");
};

}  // namespace lightning
