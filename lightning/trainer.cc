#include "lightning/trainer.h"

#include <ATen/Context.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/anomaly_mode.h>
#include <torch/nn/module.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <csignal>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <set>

#include "lightning/accelerator.h"
#include "lightning/checkpoint/checkpoint_search.h"
#include "lightning/checkpoint/mapped_file.h"
#include "lightning/checkpoint_callback.h"
#include "lightning/cuda/gemm.h"
#include "lightning/distributed/slurm.h"
#include "lightning/distributed/watch.h"
#include "lightning/distributed/whereabouts.h"
#include "lightning/errors.h"
#include "lightning/hparams.h"
#include "lightning/log.h"
#include "lightning/loops/checkpoint.h"
#include "lightning/loops/evaluation_loop.h"
#include "lightning/loops/fit_loop.h"
#include "lightning/loops/interrupt.h"
#include "lightning/loops/prediction_loop.h"
#include "lightning/loops/run.h"
#include "lightning/overrides.h"
#include "lightning/param/deferred_init.h"
#include "lightning/rank_zero_logger.h"
#include "lightning/results_table.h"
#include "lightning/seed.h"
#include "lightning/step/has_step.h"
#include "lightning/terminal.h"
#include "lightning/trainer_flags.h"

namespace lightning {

struct Trainer::Engine {
  explicit Engine(Trainer& trainer) : run(trainer) {}

  using Results = std::vector<EvaluationResult>;
  using Predictions = std::vector<std::vector<Batch>>;

  // What a call of fit, validate, test or predict is given.
  struct Call {
    Stage fn;
    std::shared_ptr<LightningModule> module;  // null: the last one
    DataSources sources;
    std::shared_ptr<LightningDataModule> datamodule;
    RunArguments arguments;
  };

  // Runs the stage between everything that comes before and after it.
  template <class RunStage>
  auto run_call(Call call, RunStage&& run_stage) -> decltype(run_stage());

  // A call of validate, test or predict. Without loaders or a data module of its own it takes the
  // data module that was used with this module before.
  Call evaluation_call(Stage fn, std::shared_ptr<LightningModule> module,
                       std::shared_ptr<LightningDataModule> datamodule, bool has_loaders,
                       const RunArguments& arguments) const;

  void refuse_nested(Stage fn) const;
  void attach(const Call& call);
  void merge_module_callbacks();
  void verify(Stage fn);
  std::string select_checkpoint(const Call& call, bool module_given);
  std::string best_checkpoint(Stage fn);
  std::string newest_last_checkpoint(Stage fn);
  std::string newest_hpc_checkpoint();
  std::shared_ptr<SLURMEnvironment> slurm() const;
  std::optional<PreemptionSignal> requeue_on_signal();
  void save_for_requeue();
  Scope join_run();
  void prepare_data();
  void setup(Stage fn);
  void log_hyperparams();
  void run_teardown();
  void on_exception(const std::exception& exception);
  void fit(Call call);
  Results validate(Call call) {
    const bool verbose = call.arguments.verbose();
    return run_call(std::move(call),
                    [&] { return evaluate(LoaderStage::kVal, evaluation.validate, verbose); });
  }
  Results test(Call call) {
    const bool verbose = call.arguments.verbose();
    return run_call(std::move(call),
                    [&] { return evaluate(LoaderStage::kTest, evaluation.test, verbose); });
  }
  Predictions predict(Call call) {
    const bool keep = call.arguments.return_predictions();
    return run_call(std::move(call), [&] {
      PredictionLoop loop(run, keep);
      auto predictions = loop.run();
      evaluation.predict = loop.progress();
      return predictions;
    });
  }
  Results evaluate(LoaderStage stage, BatchProgress& progress, bool verbose);
  Checkpoint* checkpoint_callback() const;

  Run run;
  std::unique_ptr<FitLoop> fit_loop;
  EvaluationProgress evaluation;
  // Where nothing else ends fit.
  static constexpr int64_t kDefaultMaxEpochs = 1000;
  bool max_epochs_given = true;
  std::vector<std::shared_ptr<Callback>> own_callbacks;  // without those of the module
  std::string hpc_checkpoint;                            // saved by this Trainer last
};

// ---- Making one ---------------------------------------------------------------------------------

namespace {

// Choices that hold for the whole program.
void set_global_flags(const TrainerOptions& options) {
  auto& context = at::globalContext();
  const auto& deterministic = options.deterministic();
  bool on = false;
  if (deterministic) {
    const bool warn_only = std::holds_alternative<std::string>(*deterministic);
    on = warn_only || std::get<bool>(*deterministic);
    context.setDeterministicAlgorithms(on, warn_only);
    // cuBLAS is deterministic only with a workspace of fixed size.
    if (on) setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8", /*overwrite=*/0);
  }
  if (options.benchmark()) {
    context.setBenchmarkCuDNN(*options.benchmark());
    cuda::choose_gemm_mode(*options.benchmark());
  } else if (on) {
    context.setBenchmarkCuDNN(false);
  }
}

}  // namespace

Trainer::Trainer(TrainerOptions options)
    : options_(with_environment(std::move(options))), engine_(std::make_unique<Engine>(*this)) {
  auto& run = engine_->run;
  run.settings = check_flags(options_);
  run.strategy_ = make_strategy(options_);
  run.strategy_->set_sync_batchnorm(options_.sync_batchnorm());
  engine_->own_callbacks = run.callbacks = make_callbacks(options_);
  run.loggers_ = make_loggers(options_, run.settings, run.strategy_->is_global_zero());
  if (options_.profiler() && !options_.profiler()->empty()) {
    run.profiler = options_.profiler()->make("trainer.profiler");
  }
  run.executor = options_.compile().value_or(Part<StepExecutor>("eager")).make("trainer.compile");
  set_global_flags(options_);
  const bool timed = std::any_of(run.callbacks.begin(), run.callbacks.end(),
                                 [](const auto& c) { return c->role() == CallbackRole::kTimer; });
  engine_->max_epochs_given =
      options_.max_epochs() || options_.max_steps() != -1 || timed || run.settings.fast_dev_run > 0;
}

Trainer::~Trainer() = default;

// ---- Before and after a run ---------------------------------------------------------------------

void Trainer::Engine::refuse_nested(Stage fn) const {
  if (run.status != TrainerStatus::kRunning) return;
  throw MisconfigurationError(
      str("Trainer.", to_string(fn),
          " was called while this Trainer runs already. Use another Trainer "
          "for a run inside a run."));
}

void Trainer::Engine::attach(const Call& call) {
  run.detach();
  if (call.module != nullptr) run.module = call.module;
  if (run.module == nullptr) {
    throw MisconfigurationError(str("Trainer.", to_string(call.fn),
                                    " was called without a module, "
                                    "and none was used before. Pass one."));
  }
  run.module->attach(&run);
  run.datamodule = call.datamodule;
  if (run.datamodule != nullptr) run.datamodule->attach(&run.trainer_ref());
  run.sources = call.sources;
}

void Trainer::Engine::merge_module_callbacks() {
  run.callbacks = own_callbacks;
  const auto added = run.call_module(Hook::configure_callbacks,
                                     [](LightningModule& m) { return m.configure_callbacks(); });
  if (added.empty()) return;
  if (std::count(added.begin(), added.end(), nullptr) > 0) {
    throw MisconfigurationError("configure_callbacks returned a callback that is null.");
  }
  std::vector<std::string> replaced;
  auto& all = run.callbacks;
  all.erase(std::remove_if(all.begin(), all.end(),
                           [&](const auto& own) {
                             const bool same = std::any_of(
                                 added.begin(), added.end(),
                                 [&](const auto& one) { return typeid(*one) == typeid(*own); });
                             if (same) replaced.push_back(class_name(typeid(*own)));
                             return same;
                           }),
            all.end());
  if (!replaced.empty()) {
    info("These callbacks of the Trainer are replaced by those of configure_callbacks: " +
         join(replaced) + ".");
  }
  all.insert(all.end(), added.begin(), added.end());
  all = in_order(std::move(all));
}

void Trainer::Engine::verify(Stage fn) {
  const auto& module = *run.module;
  const auto name = class_name(typeid(module));
  if (!has_step(module, fn)) {
    static const char* const steps[] = {"training_step", "validation_step", "test_step",
                                        "predict_step or predict_forward"};
    throw MisconfigurationError(str(name, " overrides no ", steps[static_cast<int>(fn)],
                                    ", so Trainer.", to_string(fn), " has nothing to run."));
  }
  if (fn != Stage::kFit) return;
  if (!module.has_optimizer_factory() &&
      !is_overridden(module, &LightningModule::configure_optimizers)) {
    throw MisconfigurationError(str(name,
                                    " overrides no configure_optimizers, so fit cannot "
                                    "train it. Return an optimizer there."));
  }
  if (!has_loaders(run, LoaderStage::kTrain)) {
    throw MisconfigurationError(
        str("fit got no training data: pass a loader or a data module, or "
            "override train_dataloader in ",
            name, "."));
  }
  const bool val_step = has_step(module, Stage::kValidate);
  const bool val_loader = has_loaders(run, LoaderStage::kVal);
  if (val_loader && !val_step) {
    warn(str("There is validation data, but ", name,
             " overrides no validation_step. Validation is skipped."));
  }
  if (val_step && !val_loader) {
    warn(str(name,
             " overrides validation_step, but there is no validation data. Validation is "
             "skipped."));
  }
  if (module.automatic_optimization()) return;
  const auto refuse = [](const std::string& flag) {
    throw MisconfigurationError(
        str("Trainer got ", flag,
            ", which has no effect in manual optimization. Leave it out and do "
            "it in training_step (clip_gradients(...), stepping every n-th batch)."));
  };
  if (run.settings.gradient_clip_val.value_or(0) > 0) {
    refuse(str("gradient_clip_val=", *run.settings.gradient_clip_val));
  }
  if (run.settings.accumulate_grad_batches != 1) {
    refuse(str("accumulate_grad_batches=", run.settings.accumulate_grad_batches));
  }
}

// What rank 0 chose holds for all: the others may have looked at files a moment later.
Scope Trainer::Engine::join_run() {
  auto* watch = Watch::current();
  if (watch == nullptr || run.strategy_->world_size() == 1) return nullptr;
  const Scope in_run = watch->in_run(run.fitting());
  run.ckpt_path = run.strategy_->broadcast(run.ckpt_path).as_string();
  State::List places;
  for (const auto& logger : run.loggers_) {
    places.emplace_back(State::List{logger->version(), logger->save_dir(), logger->log_dir()});
  }
  const auto first = run.strategy_->broadcast(places);
  for (size_t i = 0; i < run.loggers_.size() && !run.strategy_->is_global_zero(); ++i) {
    auto* quiet = dynamic_cast<RankZeroLogger*>(run.loggers_[i].get());
    const auto& place = first.as_list().at(i).as_list();
    if (quiet == nullptr) continue;
    quiet->set_place({place[0].as_string(), place[1].as_string(), place[2].as_string()});
  }
  return in_run;
}

// Where the data live in the module or data module, on one process of the node.
void Trainer::Engine::prepare_data() {
  const Scope call = in_call("prepare_data");
  const auto here = [&](bool per_node) {
    return per_node ? run.strategy_->local_rank() == 0 : run.strategy_->is_global_zero();
  };
  if (run.datamodule != nullptr && here(run.datamodule->prepare_data_per_node) &&
      is_overridden(*run.datamodule, &LightningDataModule::prepare_data)) {
    run.call_datamodule(Hook::prepare_data, [](LightningDataModule& d) { d.prepare_data(); });
  }
  if (here(run.module->prepare_data_per_node) &&
      is_overridden(*run.module, &LightningModule::prepare_data)) {
    run.call_module(Hook::prepare_data, [](LightningModule& m) { m.prepare_data(); });
  }
  run.strategy_->wait_for_all("prepare_data");
}

void Trainer::Engine::setup(Stage fn) {
  run.strategy_->barrier("pre_setup");
  run.call_datamodule(Hook::setup, [&](LightningDataModule& d) { d.setup(fn); });
  run.call_callbacks(Hook::setup,
                     [&](Callback& c) { c.setup(run.trainer_ref(), *run.module, fn); });
  run.call_module(Hook::setup, [&](LightningModule& m) { m.setup(fn); });
  run.strategy_->barrier("post_setup");
  if (!run.module->configured()) {
    const Scope tensors = run.strategy_->tensor_init_context();
    const Scope modules = run.strategy_->module_init_context();
    run.call_module(Hook::configure_model, [](LightningModule& m) { m.ensure_configured(); });
  }
}

void Trainer::Engine::log_hyperparams() {
  if (!run.settings.autolog_hparams || run.loggers_.empty()) return;
  const auto& of_module = run.module->logs_hparams() ? run.module->hparams() : empty_config();
  const auto& of_data = run.datamodule != nullptr && run.datamodule->logs_hparams()
                            ? run.datamodule->hparams()
                            : empty_config();
  const auto merged = merge_hparams(of_module, of_data);
  for (const auto& logger : run.loggers_) {
    if (!merged.empty()) logger->log_hyperparams(merged);
    logger->log_graph(*run.module);
    logger->save();
  }
}

void Trainer::Engine::run_teardown() {
  std::vector<torch::optim::Optimizer*> optimizers;
  for (const auto& optimizer : run.optimizers_) optimizers.push_back(&optimizer->optimizer());
  if (fit_loop != nullptr) fit_loop->teardown();
  run.strategy_->teardown(run.module.get(), optimizers);
}

// Each part hears of the exception and lets go, whatever the others make of it: the exception that
// ended the run is the one that leaves it.
void Trainer::Engine::on_exception(const std::exception& exception) {
  run.status = TrainerStatus::kInterrupted;
  if (run.strategy_->world_size() > 1 && !report_failure(exception.what())) {
    run.strategy_->continue_alone();
  }
  const Scope call = in_call("the end after an exception");
  const auto attempt = [](auto&& f) {
    try {
      f();
    } catch (const std::exception& second) {
      warn(str("While an exception was handled, another came: ", second.what()));
    }
  };
  for (const auto& callback : run.callbacks) {
    attempt([&] { callback->on_exception(run.trainer_ref(), *run.module, exception); });
  }
  attempt([&] {
    run.call_datamodule(Hook::on_exception,
                        [&](LightningDataModule& d) { d.on_exception(exception); });
  });
  attempt([&] { run.strategy_->on_exception(exception); });
  for (const auto& logger : run.loggers_) {
    attempt([&] { logger->finalize("failed"); });
  }
  attempt([&] { run_teardown(); });
}

template <class RunStage>
auto Trainer::Engine::run_call(Call call, RunStage&& run_stage) -> decltype(run_stage()) {
  refuse_nested(call.fn);
  const bool module_given = call.module != nullptr;
  run.fn = call.fn;
  static const RunningStage stages[] = {RunningStage::kTraining, RunningStage::kValidating,
                                        RunningStage::kTesting, RunningStage::kPredicting};
  attach(call);
  run.status = TrainerStatus::kRunning;
  run.stage = stages[static_cast<int>(call.fn)];
  const SignalScope signals(requeue_on_signal());
  try {
    run.ckpt_path = select_checkpoint(call, module_given);
    merge_module_callbacks();
    verify(call.fn);
    if (run.settings.barebones) {
      info("barebones=true: the run has started; there is no progress bar.");
    }
    run.strategy_->setup_environment();
    Scope in_run = join_run();
    if (run.profiler != nullptr) {
      run.profiler->setup(call.fn, run.strategy_->global_rank(), run.trainer_ref().log_dir());
    }
    prepare_data();
    setup(call.fn);

    std::optional<State> checkpoint;
    const auto restore_modules = [&] {
      if (run.ckpt_path.empty()) return;
      info("Restoring states from the checkpoint at " + run.ckpt_path);
      checkpoint = run.strategy_->load_checkpoint(run.ckpt_path);
      restore_modules_and_callbacks(run, *checkpoint);
    };
    if (!run.strategy_->restore_checkpoint_after_setup()) restore_modules();
    run.reset_results();
    run.reset_metrics();
    Strategy::ConfigureOptimizers configure;
    if (run.fitting()) configure = [this] { return run.configure_optimizers(); };
    run.strategy_->setup(*run.module, configure);
    auto& inputs = run.module->example_input_array;
    inputs = run.strategy_->materialized(std::move(inputs));
    if (run.fitting()) {
      run.call(Hook::on_fit_start, &Callback::on_fit_start, &LightningModule::on_fit_start);
    }
    log_hyperparams();
    if (run.strategy_->restore_checkpoint_after_setup()) restore_modules();
    if (checkpoint && run.fitting()) restore_training_state(run, *fit_loop, *checkpoint);
    if (checkpoint) {
      info(str(run.fitting() ? "Restored all states" : "Loaded model weights",
               " from the checkpoint at ", run.ckpt_path));
    }
    if (checkpoint) check_mapped_files();  // what was copied out of them was there
    checkpoint.reset();
    run.strategy_->barrier("run-stage");
    run.module->zero_grad();
    run.executor->reset();
    if (run.fitting()) run.executor->start(run.strategy_->root_device());

    auto results = run_stage();

    const Scope ending = in_call("the end of the run");
    run_teardown();
    if (run.fitting()) {
      run.call(Hook::on_fit_end, &Callback::on_fit_end, &LightningModule::on_fit_end);
    }
    run.call_datamodule(Hook::teardown, [&](LightningDataModule& d) { d.teardown(call.fn); });
    run.call_callbacks(Hook::teardown,
                       [&](Callback& c) { c.teardown(run.trainer_ref(), *run.module, call.fn); });
    run.call_module(Hook::teardown, [&](LightningModule& m) { m.teardown(call.fn); });
    for (const auto& logger : run.loggers_) logger->finalize("success");
    if (run.profiler != nullptr) run.profiler->describe();
    in_run.reset();  // who goes on first does not leave the others in a run
    run.strategy_->wait_for_all("the end of the run");
    run.status = TrainerStatus::kFinished;
    run.stage = RunningStage::kNone;
    return results;
  } catch (const KeyboardInterrupt& interrupt) {
    info("\nDetected KeyboardInterrupt, attempting graceful shutdown ...");
    on_exception(interrupt);
    std::exit(1);
  } catch (const std::exception& exception) {
    on_exception(exception);
    run.stage = RunningStage::kNone;
    throw;
  } catch (...) {
    on_exception(std::runtime_error("something that is no std::exception was thrown"));
    run.stage = RunningStage::kNone;
    throw;
  }
}

// ---- Checkpoints --------------------------------------------------------------------------------

Checkpoint* Trainer::Engine::checkpoint_callback() const {
  for (const auto& callback : run.callbacks) {
    if (auto* found = dynamic_cast<Checkpoint*>(callback.get())) return found;
  }
  return nullptr;
}

std::string Trainer::Engine::best_checkpoint(Stage fn) {
  const auto* callback = checkpoint_callback();
  if (callback == nullptr) {
    throw MisconfigurationError(str("Trainer.", to_string(fn),
                                    " was asked for ckpt_path=\"best\", "
                                    "but this Trainer has no checkpoint callback. Give a path."));
  }
  const auto path = callback->best_model_path();
  if (path.empty()) {
    throw MisconfigurationError(
        str("Trainer.", to_string(fn), " was asked for ckpt_path=\"best\", but nothing was saved",
            run.settings.fast_dev_run > 0 ? " under fast_dev_run" : " yet", ". Give a path."));
  }
  return path;
}

// The newest of the files that were saved as the last. A run that was killed between a checkpoint
// and its last.ckpt, or that keeps no last.ckpt, left another one that stands at a later step.
std::string Trainer::Engine::newest_last_checkpoint(Stage fn) {
  std::set<std::string> lasts, others;
  for (const auto& callback : run.callbacks) {
    const auto* saver = dynamic_cast<Checkpoint*>(callback.get());
    if (saver == nullptr) continue;
    lasts.merge(saver->last_checkpoints(run.trainer_ref()));
    others.merge(saver->other_checkpoints(run.trainer_ref()));
  }
  const bool look = can_look_into(run.strategy_->checkpoint_io());
  const auto last = newest_checkpoint(lasts, look);
  if (last && !look) return last->path;
  const auto other = newest_checkpoint(others, look, fn == Stage::kFit, last ? &*last : nullptr);
  if (other && (!last || (other->step && last->step && *other->step > *last->step))) {
    info(str("ckpt_path=\"last\" takes ", other->path,
             last ? ", which stands at a later step than " + last->path
                  : ", the newest: there is no last.ckpt",
             "."));
    return other->path;
  }
  if (last) return last->path;
  warn(str("Trainer.", to_string(fn),
           " was asked for ckpt_path=\"last\", but there is none. "
           "Nothing is loaded. The folder of a ModelCheckpoint without dirpath is that of the "
           "logger's new version: give it a dirpath, or the path of the file as ckpt_path."));
  return "";
}

std::string Trainer::Engine::select_checkpoint(const Call& call, bool module_given) {
  auto path = call.arguments.ckpt_path();
  if (path.empty() && call.fn == Stage::kFit) {
    if (slurm() != nullptr) {  // a job that was requeued
      const auto saved = newest_hpc_checkpoint();
      if (!saved.empty()) return saved;
    }
    const bool resumes =
        std::any_of(run.callbacks.begin(), run.callbacks.end(), [](const auto& callback) {
          const auto* saver = dynamic_cast<Checkpoint*>(callback.get());
          return saver != nullptr && saver->resumes_fit();
        });
    if (resumes) path = "last";
  }
  if (path.empty()) {
    if (module_given || call.fn == Stage::kFit) return "";
    warn(str("Trainer.", to_string(call.fn),
             " was called without a module: the best checkpoint of "
             "the last fit is used. Say ckpt_path=\"best\" or \"last\" to be asked no more."));
    path = "best";
  }
  if (path == "best") return best_checkpoint(call.fn);
  if (path == "last") return newest_last_checkpoint(call.fn);
  if (path == "hpc") {
    const auto saved = newest_hpc_checkpoint();
    if (!saved.empty()) return saved;
    throw MisconfigurationError(str("Trainer.", to_string(call.fn),
                                    " was asked for ckpt_path=\"hpc\", but there is no "
                                    "hpc_ckpt_N.ckpt in ",
                                    run.settings.default_root_dir, ". Give a path."));
  }
  if (!std::filesystem::exists(path)) {
    throw CheckpointError(str("Trainer.", to_string(call.fn), " got ckpt_path=\"", path,
                              "\", which does not exist."));
  }
  return path;
}

std::string Trainer::Engine::newest_hpc_checkpoint() {
  return lightning::newest_hpc_checkpoint(run.settings.default_root_dir,
                                          can_look_into(run.strategy_->checkpoint_io()));
}

std::shared_ptr<SLURMEnvironment> Trainer::Engine::slurm() const {
  for (const auto& plugin : run.trainer_ref().options().plugins()) {
    auto given = std::dynamic_pointer_cast<SLURMEnvironment>(plugin.cluster_environment());
    if (given != nullptr) return given;
  }
  return SLURMEnvironment::detect() ? std::make_shared<SLURMEnvironment>() : nullptr;
}

// SIGTERM comes before the end too: of the time, of a job that another one displaces. It does not
// end the run, which goes on until it is killed, but its state is worth keeping.
std::optional<PreemptionSignal> Trainer::Engine::requeue_on_signal() {
  const auto environment = run.fitting() ? slurm() : nullptr;
  if (environment == nullptr || !environment->auto_requeue()) return std::nullopt;
  info(str("SLURM: SIG", sigabbrev_np(environment->requeue_signal()),
           " will save the run and requeue the job."));
  return PreemptionSignal{
      environment->requeue_signal(), [this, environment](bool requeue, bool terminate) {
        if (terminate) info("Bypassing SIGTERM: under SLURM the run goes on until it is killed.");
        if (requeue) info("SLURM asked for the job to be requeued.");
        save_for_requeue();
        if (!requeue || !run.strategy_->is_global_zero()) return;
        try {
          environment->requeue();
          info("Requeued SLURM job: " + SLURMEnvironment::job_id().value_or(""));
        } catch (const std::runtime_error& error) {
          warn(str("The SLURM job was not requeued: ", error.what()));
        }
      }};
}

// A job is better requeued without a new checkpoint than not at all.
void Trainer::Engine::save_for_requeue() {
  auto& strategy = *run.strategy_;
  for (const auto& logger : run.loggers_) logger->finalize("finished");
  const auto path = next_hpc_checkpoint(run.settings.default_root_dir);
  const auto attempt = [](auto&& work) {
    try {
      work();
      return true;
    } catch (const std::exception& error) {
      warn(str("The run could not be saved before its job ends: ", error.what()));
      return false;
    }
  };
  const bool saved = attempt([&] { run.trainer_ref().save_checkpoint(path); });
  // On the disk, before the job may be killed; an error of a save before does not stop this one.
  const bool written = attempt([&] { strategy.checkpoint_io().teardown(); });
  if (!saved || !written) return;
  // The file that a run resumed from stays, and those of other jobs.
  if (!hpc_checkpoint.empty()) strategy.remove_checkpoint(hpc_checkpoint);
  hpc_checkpoint = path;
  info("Saved the run as " + path);
}

void Trainer::save_checkpoint(const std::string& path, bool weights_only) {
  auto& run = engine_->run;
  if (run.module == nullptr) {
    throw std::runtime_error(
        "save_checkpoint was called before the Trainer was given a module. Call fit, validate, "
        "test or predict first.");
  }
  const Scope call = in_call("Trainer.save_checkpoint");
  const auto checkpoint =
      dump_checkpoint(run, engine_->fit_loop.get(), engine_->evaluation, weights_only);
  run.strategy_->save_checkpoint(checkpoint, path);
  run.strategy_->barrier("Trainer.save_checkpoint");
}

// ---- Runs ---------------------------------------------------------------------------------------

void Trainer::Engine::fit(Call call) {
  if (call.module == nullptr) {
    throw MisconfigurationError("Trainer.fit got a module that is null.");
  }
  refuse_nested(Stage::kFit);
  if (!max_epochs_given) {
    warn(str("max_epochs was not set: fit runs ", kDefaultMaxEpochs,
             " epochs. Set max_epochs=-1 for no end."));
    run.settings.max_epochs = kDefaultMaxEpochs;
    max_epochs_given = true;
  }
  run.forget_stop();
  run.settings.accumulate_grad_batches = run.trainer_ref().options().accumulate_grad_batches();
  run.settings.accumulation_changed = false;
  run.fit.place = FitPlace::kOutside;
  run.num_val_batches.clear();
  run.fit.max_batches.reset();
  run.fit.val_check_batch.reset();
  fit_loop = std::make_unique<FitLoop>(run);
  run_call(std::move(call), [&] {
    {
      const Scope random = isolate_rng();
      fit_loop->run_sanity_check();
    }
    std::optional<torch::autograd::DetectAnomalyGuard> anomaly;
    if (run.settings.detect_anomaly) anomaly.emplace();
    fit_loop->run();
    return true;
  });
}

void Trainer::fit(std::shared_ptr<LightningModule> module, Loaders train_dataloaders,
                  Loaders val_dataloaders, const RunArguments& arguments) {
  Engine::Call call{Stage::kFit, std::move(module), {}, nullptr, arguments};
  call.sources.train = std::move(train_dataloaders);
  call.sources.val = std::move(val_dataloaders);
  engine_->fit(std::move(call));
}

void Trainer::fit(std::shared_ptr<LightningModule> module,
                  std::shared_ptr<LightningDataModule> datamodule, const RunArguments& arguments) {
  engine_->fit({Stage::kFit, std::move(module), {}, std::move(datamodule), arguments});
}

Trainer::Engine::Call Trainer::Engine::evaluation_call(
    Stage fn, std::shared_ptr<LightningModule> module,
    std::shared_ptr<LightningDataModule> datamodule, bool has_loaders,
    const RunArguments& arguments) const {
  Call call{fn, std::move(module), {}, std::move(datamodule), arguments};
  const bool same_module = call.module == nullptr || call.module == run.module;
  if (same_module && !has_loaders && call.datamodule == nullptr) call.datamodule = run.datamodule;
  return call;
}

std::vector<EvaluationResult> Trainer::Engine::evaluate(LoaderStage stage, BatchProgress& progress,
                                                        bool verbose) {
  EvaluationLoop loop(run, stage, progress, run.settings.inference_mode);
  const auto outputs = loop.run();
  Results results;
  for (const auto& output : outputs) {
    auto& result = results.emplace_back();
    for (const auto& [name, value] : output) result[name] = value.item();
  }
  if (verbose && run.strategy_->is_global_zero()) {
    const auto table = format_results_table(
        results, stage == LoaderStage::kTest ? "test" : "validate", standard_output()->columns());
    if (!table.empty()) run.print(table.substr(0, table.find_last_not_of('\n') + 1));
  }
  return results;
}

std::vector<EvaluationResult> Trainer::validate(std::shared_ptr<LightningModule> module,
                                                Loaders dataloaders,
                                                const RunArguments& arguments) {
  auto call = engine_->evaluation_call(Stage::kValidate, std::move(module), nullptr,
                                       !dataloaders.empty(), arguments);
  call.sources.val = std::move(dataloaders);
  return engine_->validate(std::move(call));
}

std::vector<EvaluationResult> Trainer::validate(std::shared_ptr<LightningModule> module,
                                                std::shared_ptr<LightningDataModule> datamodule,
                                                const RunArguments& arguments) {
  return engine_->validate(engine_->evaluation_call(Stage::kValidate, std::move(module),
                                                    std::move(datamodule), false, arguments));
}

std::vector<EvaluationResult> Trainer::test(std::shared_ptr<LightningModule> module,
                                            Loaders dataloaders, const RunArguments& arguments) {
  auto call = engine_->evaluation_call(Stage::kTest, std::move(module), nullptr,
                                       !dataloaders.empty(), arguments);
  call.sources.test = std::move(dataloaders);
  return engine_->test(std::move(call));
}

std::vector<EvaluationResult> Trainer::test(std::shared_ptr<LightningModule> module,
                                            std::shared_ptr<LightningDataModule> datamodule,
                                            const RunArguments& arguments) {
  return engine_->test(engine_->evaluation_call(Stage::kTest, std::move(module),
                                                std::move(datamodule), false, arguments));
}

std::vector<std::vector<Batch>> Trainer::predict(std::shared_ptr<LightningModule> module,
                                                 Loaders dataloaders,
                                                 const RunArguments& arguments) {
  auto call = engine_->evaluation_call(Stage::kPredict, std::move(module), nullptr,
                                       !dataloaders.empty(), arguments);
  call.sources.predict = std::move(dataloaders);
  return engine_->predict(std::move(call));
}

std::vector<std::vector<Batch>> Trainer::predict(std::shared_ptr<LightningModule> module,
                                                 std::shared_ptr<LightningDataModule> datamodule,
                                                 const RunArguments& arguments) {
  return engine_->predict(engine_->evaluation_call(Stage::kPredict, std::move(module),
                                                   std::move(datamodule), false, arguments));
}

Scope Trainer::init_module(std::optional<bool> empty_init) {
  auto tensors = init_tensor();
  return both(strategy().module_init_context(empty_init), std::move(tensors));
}

Scope Trainer::init_tensor() {
  auto device = default_device_scope(strategy().root_device());
  return both(strategy().tensor_init_context(), std::move(device));
}

void Trainer::set_should_stop(bool stop) { engine_->run.should_stop = stop; }
bool Trainer::should_stop() const { return engine_->run.should_stop; }

// ---- What it is made of -------------------------------------------------------------------------

Strategy& Trainer::strategy() const { return *engine_->run.strategy_; }
Precision& Trainer::precision() const { return strategy().precision(); }
Accelerator& Trainer::accelerator() const { return strategy().accelerator(); }

LightningModule& Trainer::lightning_module() const {
  if (engine_->run.module == nullptr) {
    throw std::runtime_error("The Trainer has no module yet. Pass one to fit first.");
  }
  return *engine_->run.module;
}

LightningDataModule* Trainer::datamodule() const { return engine_->run.datamodule.get(); }
const std::vector<std::shared_ptr<Callback>>& Trainer::callbacks() const {
  return engine_->run.callbacks;
}
const std::vector<std::shared_ptr<Logger>>& Trainer::loggers() const {
  return engine_->run.loggers_;
}
Profiler* Trainer::profiler() const { return engine_->run.profiler.get(); }

std::vector<std::shared_ptr<torch::optim::Optimizer>> Trainer::optimizers() const {
  std::vector<std::shared_ptr<torch::optim::Optimizer>> all;
  for (const auto& optimizer : engine_->run.optimizers_) all.push_back(optimizer->shared());
  return all;
}

const std::vector<LRSchedulerConfig>& Trainer::lr_scheduler_configs() const {
  return engine_->run.schedulers;
}

namespace {

Callback* first_of(const std::vector<std::shared_ptr<Callback>>& callbacks, CallbackRole role) {
  for (const auto& callback : callbacks) {
    if (callback->role() == role) return callback.get();
  }
  return nullptr;
}

}  // namespace

Callback* Trainer::checkpoint_callback() const {
  return first_of(callbacks(), CallbackRole::kCheckpoint);
}
Callback* Trainer::early_stopping_callback() const {
  return first_of(callbacks(), CallbackRole::kMonitor);
}
Callback* Trainer::progress_bar_callback() const {
  return first_of(callbacks(), CallbackRole::kProgressBar);
}

// ---- Where it stands ----------------------------------------------------------------------------

int64_t Trainer::current_epoch() const { return engine_->run.current_epoch(); }
int64_t Trainer::global_step() const { return engine_->run.global_step(); }
int64_t Trainer::batches_that_stepped() const { return engine_->run.fit.batches_that_stepped; }
int64_t Trainer::batch_idx() const { return engine_->run.fit.batch.current.ready - 1; }
bool Trainer::is_last_batch() const { return engine_->run.fit.batch.is_last_batch; }
RunningStage Trainer::stage() const { return engine_->run.stage; }
TrainerStatus Trainer::status() const { return engine_->run.status; }
Stage Trainer::state_fn() const { return engine_->run.fn; }
int64_t Trainer::global_rank() const { return strategy().global_rank(); }
int64_t Trainer::local_rank() const { return strategy().local_rank(); }
int64_t Trainer::world_size() const { return strategy().world_size(); }

// ---- Limits -------------------------------------------------------------------------------------

int64_t Trainer::max_epochs() const { return engine_->run.settings.max_epochs; }
int64_t Trainer::min_epochs() const { return engine_->run.settings.min_epochs; }
int64_t Trainer::max_steps() const { return engine_->run.settings.max_steps; }
std::optional<int64_t> Trainer::min_steps() const { return engine_->run.settings.min_steps; }
int64_t Trainer::log_every_n_steps() const { return engine_->run.settings.log_every_n_steps; }
int64_t Trainer::accumulate_grad_batches() const {
  return engine_->run.settings.accumulate_grad_batches;
}

void Trainer::set_accumulate_grad_batches(int64_t batches) {
  if (batches < 1) {
    throw MisconfigurationError(
        str("accumulate_grad_batches got ", batches, ", expected 1 or more."));
  }
  engine_->run.settings.accumulate_grad_batches = batches;
  engine_->run.settings.accumulation_changed = true;
}

bool Trainer::fast_dev_run() const { return engine_->run.settings.fast_dev_run > 0; }
bool Trainer::barebones() const { return engine_->run.settings.barebones; }

bool Trainer::enable_validation() const {
  const auto& run = engine_->run;
  if (!run.fitting() || engine_->fit_loop == nullptr || run.module == nullptr) {
    return run.fn == Stage::kValidate;
  }
  return engine_->fit_loop->enable_validation();
}

int64_t Trainer::check_val_every_n_epoch() const {
  return engine_->run.settings.check_val_every_n_epoch;
}
bool Trainer::val_check_interval_is_epoch() const {
  const auto& settings = engine_->run.settings;
  return !settings.val_check_batches && !settings.val_check_seconds &&
         settings.val_check_fraction == 1.0;
}
std::optional<int64_t> Trainer::val_check_batch() const { return engine_->run.fit.val_check_batch; }
std::optional<int64_t> Trainer::num_training_batches() const {
  return engine_->run.fit.max_batches;
}

std::vector<std::optional<int64_t>> Trainer::num_val_batches() const {
  return engine_->run.num_val_batches;
}
std::vector<std::optional<int64_t>> Trainer::num_sanity_val_batches() const {
  return engine_->fit_loop == nullptr ? std::vector<std::optional<int64_t>>()
                                      : engine_->fit_loop->val_loop().sanity_batches();
}
std::vector<std::optional<int64_t>> Trainer::num_test_batches() const {
  return engine_->run.num_test_batches;
}
std::vector<std::optional<int64_t>> Trainer::num_predict_batches() const {
  return engine_->run.num_predict_batches;
}

std::optional<int64_t> Trainer::estimated_stepping_batches() {
  auto& engine = *engine_;
  auto& run = engine.run;
  const auto& settings = run.settings;
  if (settings.max_epochs == -1 && settings.max_steps == -1) return std::nullopt;
  if (engine.fit_loop != nullptr && engine.fit_loop->loader() == nullptr) {
    engine.fit_loop->setup_data();
  }
  const auto steps = settings.max_steps == -1 ? std::optional<int64_t>() : settings.max_steps;
  if (!run.fit.max_batches || settings.max_epochs == -1) return steps;
  const int64_t windows = (*run.fit.max_batches + settings.accumulate_grad_batches - 1) /
                          settings.accumulate_grad_batches;
  const int64_t all = windows * std::max<int64_t>(settings.max_epochs, 1);
  return steps ? std::min(*steps, all) : all;
}

Loaders Trainer::train_dataloader() const {
  const auto& engine = *engine_;
  if (engine.fit_loop == nullptr || engine.fit_loop->loader() == nullptr) return {};
  return engine.fit_loop->loader()->loaders();
}

// ---- What was predicted -------------------------------------------------------------------------

const std::vector<int64_t>& Trainer::predict_batch_indices() const {
  return engine_->run.predict_batch_indices;
}
const std::vector<std::vector<std::vector<int64_t>>>& Trainer::predict_epoch_batch_indices() const {
  return engine_->run.predict_epoch_batch_indices;
}
const std::vector<std::vector<Batch>>& Trainer::predictions() const {
  return engine_->run.predictions;
}

// ---- What was logged ----------------------------------------------------------------------------

const MetricMap& Trainer::callback_metrics() const { return engine_->run.callback_metrics(); }
const MetricMap& Trainer::logged_metrics() const { return engine_->run.logged_metrics(); }
const MetricMap& Trainer::progress_bar_metrics() const {
  return engine_->run.progress_bar_metrics();
}

std::optional<double> Trainer::metric(const std::string& name) const {
  const auto& metrics = callback_metrics();
  const auto found = metrics.find(name);
  if (found == metrics.end()) return std::nullopt;
  return found->second.item().toDouble();
}

void Trainer::log_metrics(const std::vector<std::pair<std::string, double>>& metrics,
                          int64_t step) {
  for (const auto& logger : loggers()) logger->log_metrics(metrics, step);
}

void Trainer::add_callback_metric(const std::string& name, double value) {
  engine_->run.add_callback_metric(name, value);
}

const std::string& Trainer::default_root_dir() const {
  return engine_->run.settings.default_root_dir;
}

std::string Trainer::log_dir() const {
  for (const auto& logger : loggers()) {
    const auto dir = logger->log_dir();
    if (!dir.empty()) return dir;
  }
  return default_root_dir();
}

void Trainer::print(const std::string& line) const { engine_->run.print(line); }
const std::string& Trainer::ckpt_path() const { return engine_->run.ckpt_path; }

}  // namespace lightning
