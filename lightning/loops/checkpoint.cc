#include "lightning/loops/checkpoint.h"

#include <algorithm>
#include <nlohmann/json.hpp>

#include "lightning/errors.h"
#include "lightning/escaped.h"
#include "lightning/hparams_state.h"
#include "lightning/log.h"
#include "lightning/version.h"

namespace lightning {
namespace {

// Beside Python's keys, which Python ignores.
constexpr const char* kExactResume = "exact_resume";

// The gradient scaler's, in files of Lightning before 1.6.
constexpr const char* kScalerBefore16 = "native_amp_scaling_state";

State loop_state(const BatchProgress& progress, bool with_last) {
  auto batches = progress.state_dict();
  if (!with_last) batches.as_dict().erase("is_last_batch");
  return State::dict({{"state_dict", State::dict()}, {"batch_progress", std::move(batches)}});
}

}  // namespace

State dump_checkpoint(Run& run, FitLoop* fit_loop, const EvaluationProgress& evaluation,
                      bool weights_only) {
  auto checkpoint = State::dict();
  checkpoint["epoch"] = run.current_epoch();
  checkpoint["global_step"] = run.global_step();
  checkpoint["pytorch-lightning_version"] = kPythonLightningVersion;
  checkpoint["state_dict"] = run.call_module(
      Hook::state_dict, [&](LightningModule& m) { return run.strategy_->model_state(m); });
  checkpoint["loops"] = State::dict(
      {{"fit_loop", fit_loop != nullptr ? fit_loop->state_dict() : FitLoop(run).state_dict()},
       {"validate_loop", loop_state(evaluation.validate, true)},
       {"test_loop", loop_state(evaluation.test, true)},
       {"predict_loop", loop_state(evaluation.predict, false)}});
  if (!weights_only) {
    auto callbacks = State::dict();
    run.call_callbacks(Hook::state_dict, [&](Callback& callback) {
      auto state = callback.state_dict();
      if (!state.empty()) callbacks[callback.state_key()] = std::move(state);
    });
    checkpoint["callbacks"] = std::move(callbacks);
    State::List optimizers, schedulers;
    for (const auto& optimizer : run.optimizers_) {
      optimizers.push_back(run.strategy_->optimizer_state(optimizer->optimizer(), *run.module));
    }
    for (const auto& config : run.schedulers) schedulers.push_back(config.scheduler->state_dict());
    checkpoint["optimizer_states"] = std::move(optimizers);
    checkpoint["lr_schedulers"] = std::move(schedulers);
    auto scaler = run.strategy_->precision().state_dict();
    if (!scaler.empty()) checkpoint[run.strategy_->precision_key()] = std::move(scaler);
  }
  if (!run.module->hparams().empty()) {
    checkpoint["hparams_name"] = "kwargs";
    checkpoint["hyper_parameters"] = state_from_hparams(run.module->hparams());
  }
  if (run.datamodule != nullptr) {
    if (!run.datamodule->hparams().empty()) {
      checkpoint["datamodule_hparams_name"] = "kwargs";
      checkpoint["datamodule_hyper_parameters"] = state_from_hparams(run.datamodule->hparams());
    }
    run.call_datamodule(Hook::state_dict, [&](LightningDataModule& d) {
      auto state = d.state_dict();
      if (!state.empty()) checkpoint[class_name(typeid(d))] = std::move(state);
    });
  }
  if (!weights_only && fit_loop != nullptr) {
    auto exact = fit_loop->exact_state();
    if (!exact.is_none()) checkpoint[kExactResume] = std::move(exact);
  }
  if (!weights_only) {
    run.call_callbacks(Hook::on_save_checkpoint, [&](Callback& callback) {
      callback.on_save_checkpoint(run.trainer_ref(), *run.module, checkpoint);
    });
  }
  run.call_module(Hook::on_save_checkpoint,
                  [&](LightningModule& m) { m.on_save_checkpoint(checkpoint); });
  return checkpoint;
}

namespace {

// Files of Lightning before 1.5 name a callback's state by its class alone.
const State* state_of(const Callback& callback, const State& states) {
  const auto* state = states.find(callback.state_key());
  return state != nullptr ? state : states.find(class_name(typeid(callback)));
}

}  // namespace

void restore_modules_and_callbacks(Run& run, State& checkpoint) {
  run.call_module(Hook::on_load_checkpoint,
                  [&](LightningModule& m) { m.on_load_checkpoint(checkpoint); });
  if (!checkpoint.contains("state_dict")) {
    throw CheckpointError(str("The checkpoint ", run.ckpt_path,
                              " holds no \"state_dict\", so it is not one of a Trainer. `lightning "
                              "checkpoint show` tells what is in it."));
  }
  run.call_module(Hook::load_state_dict, [&](LightningModule& m) {
    run.strategy_->load_model_state(m, checkpoint.at("state_dict"), m.strict_loading());
  });
  if (run.datamodule != nullptr) {
    const auto& datamodule = *run.datamodule;
    if (const auto* state = checkpoint.find(class_name(typeid(datamodule)))) {
      run.call_datamodule(Hook::load_state_dict,
                          [&](LightningDataModule& d) { d.load_state_dict(*state); });
    }
  }
  const auto* states = checkpoint.find("callbacks");
  if (states == nullptr) return;
  std::vector<std::string> unknown;
  for (const auto& item : states->as_dict()) {
    const bool known = std::any_of(run.callbacks.begin(), run.callbacks.end(), [&](const auto& c) {
      return state_of(*c, *states) == &item.second;
    });
    if (!known) unknown.push_back(to_string(item.first));
  }
  if (!unknown.empty()) {
    warn("The checkpoint holds state of callbacks that this Trainer does not have: " +
         escaped(join(unknown)) + ". Add them to resume them too.");
  }
  run.call_callbacks(Hook::on_load_checkpoint, [&](Callback& callback) {
    callback.on_load_checkpoint(run.trainer_ref(), *run.module, checkpoint);
  });
  run.call_callbacks(Hook::load_state_dict, [&](Callback& callback) {
    if (const auto* state = state_of(callback, *states)) callback.load_state_dict(*state);
  });
}

void restore_training_state(Run& run, FitLoop& fit_loop, const State& checkpoint) {
  auto& precision = run.strategy_->precision();
  for (const auto& key :
       {precision.state_key(), std::string(kFSDPPrecisionKey), std::string(kScalerBefore16)}) {
    if (const auto* state = checkpoint.find(key)) precision.load_state_dict(*state);
  }
  if (const auto* loops = checkpoint.find("loops")) {
    if (const auto* state = loops->find("fit_loop")) fit_loop.load_state_dict(*state);
  }
  if (run.settings.max_epochs != -1 && run.current_epoch() > run.settings.max_epochs) {
    throw MisconfigurationError(str("The checkpoint was saved in epoch ", run.current_epoch(),
                                    ", but the Trainer was given max_epochs=",
                                    run.settings.max_epochs, ". Raise max_epochs to go on."));
  }
  const auto* optimizers = checkpoint.find("optimizer_states");
  const auto* schedulers = checkpoint.find("lr_schedulers");
  if (optimizers == nullptr) {
    throw CheckpointError(
        "The checkpoint holds the model only, without the state of its optimizers, so fit cannot "
        "resume from it. It was saved with save_weights_only=true; give a full checkpoint, or load "
        "the weights and start a new run.");
  }
  if (schedulers == nullptr) {
    throw CheckpointError(
        "The checkpoint holds the model and the state of its optimizers, but not how far the run "
        "was, so fit cannot resume from it. Of a sharded checkpoint that is in the file meta.pt, "
        "which is missing: copy it too, or load the weights and start a new run.");
  }
  const auto pairs = [](size_t saved, size_t now, const char* what) {
    if (saved != now) {
      throw CheckpointError(str("The checkpoint holds ", saved, " ", what,
                                "(s), but the module's "
                                "configure_optimizers returned ",
                                now, "."));
    }
  };
  pairs(optimizers->as_list().size(), run.optimizers_.size(), "optimizer");
  pairs(schedulers->as_list().size(), run.schedulers.size(), "learning-rate schedule");
  for (size_t i = 0; i < run.optimizers_.size(); ++i) {
    run.strategy_->load_optimizer_state(run.optimizers_[i]->optimizer(), *run.module,
                                        optimizers->as_list()[i]);
  }
  for (size_t i = 0; i < run.schedulers.size(); ++i) {
    run.schedulers[i].scheduler->load_state_dict(schedulers->as_list()[i]);
  }
  if (const auto* exact = checkpoint.find(kExactResume)) fit_loop.load_exact_state(*exact);
}

}  // namespace lightning
