#include "lightning/loops/checkpoint.h"

#include <algorithm>
#include <nlohmann/json.hpp>

#include "lightning/errors.h"
#include "lightning/log.h"
#include "lightning/version.h"

namespace lightning {
namespace {

State state_of(const Json& json) {
  switch (json.type()) {
    case Json::value_t::boolean:
      return json.get<bool>();
    case Json::value_t::number_integer:
    case Json::value_t::number_unsigned:
      return json.get<int64_t>();
    case Json::value_t::number_float:
      return json.get<double>();
    case Json::value_t::string:
      return json.get<std::string>();
    case Json::value_t::array: {
      State::List items;
      for (const auto& item : json) items.push_back(state_of(item));
      return items;
    }
    case Json::value_t::object: {
      auto dict = State::dict();
      for (const auto& item : json.items()) dict[item.key()] = state_of(item.value());
      return dict;
    }
    default:
      return {};
  }
}

State loop_state(const BatchProgress& progress, bool with_last) {
  auto batches = progress.state_dict();
  if (!with_last) batches.as_dict().erase("is_last_batch");
  return State::dict({{"state_dict", State::dict()}, {"batch_progress", std::move(batches)}});
}

}  // namespace

State dump_checkpoint(Run& run, const FitLoop* fit_loop, const EvaluationProgress& evaluation,
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
    auto& precision = run.strategy_->precision();
    auto scaler = precision.state_dict();
    if (!scaler.empty()) checkpoint[precision.state_key()] = std::move(scaler);
  }
  if (!run.module->hparams().empty()) {
    checkpoint["hparams_name"] = "kwargs";
    checkpoint["hyper_parameters"] = state_of(run.module->hparams());
  }
  if (run.datamodule != nullptr) {
    if (!run.datamodule->hparams().empty()) {
      checkpoint["datamodule_hparams_name"] = "kwargs";
      checkpoint["datamodule_hyper_parameters"] = state_of(run.datamodule->hparams());
    }
    run.call_datamodule(Hook::state_dict, [&](LightningDataModule& d) {
      auto state = d.state_dict();
      if (!state.empty()) checkpoint[class_name(typeid(d))] = std::move(state);
    });
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

void restore_modules_and_callbacks(Run& run, State& checkpoint) {
  run.call_module(Hook::on_load_checkpoint,
                  [&](LightningModule& m) { m.on_load_checkpoint(checkpoint); });
  run.call_module(Hook::load_state_dict, [&](LightningModule& m) {
    run.strategy_->load_model_state(m, checkpoint.at("state_dict"), m.strict_loading());
  });
  if (run.datamodule != nullptr) {
    if (const auto* state = checkpoint.find(class_name(typeid(*run.datamodule)))) {
      run.call_datamodule(Hook::load_state_dict,
                          [&](LightningDataModule& d) { d.load_state_dict(*state); });
    }
  }
  const auto* states = checkpoint.find("callbacks");
  if (states == nullptr) return;
  std::vector<std::string> unknown;
  for (const auto& [key, state] : states->as_dict()) {
    static_cast<void>(state);
    const auto* name = std::get_if<std::string>(&key);
    const bool known =
        name != nullptr && std::any_of(run.callbacks.begin(), run.callbacks.end(),
                                       [&](const auto& c) { return c->state_key() == *name; });
    if (!known && name != nullptr) unknown.push_back(*name);
  }
  if (!unknown.empty()) {
    warn("The checkpoint holds state of callbacks that this Trainer does not have: " +
         join(unknown) + ". Add them to resume them too.");
  }
  run.call_callbacks(Hook::on_load_checkpoint, [&](Callback& callback) {
    callback.on_load_checkpoint(run.trainer_ref(), *run.module, checkpoint);
  });
  run.call_callbacks(Hook::load_state_dict, [&](Callback& callback) {
    if (const auto* state = states->find(callback.state_key())) callback.load_state_dict(*state);
  });
}

void restore_training_state(Run& run, FitLoop& fit_loop, const State& checkpoint) {
  auto& precision = run.strategy_->precision();
  if (const auto* state = checkpoint.find(precision.state_key())) precision.load_state_dict(*state);
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
  if (optimizers == nullptr || schedulers == nullptr) {
    throw CheckpointError(
        "The checkpoint holds the model only, without the state of its optimizers, so fit cannot "
        "resume from it. It was saved with save_weights_only=true; give a full checkpoint, or load "
        "the weights and start a new run.");
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
}

}  // namespace lightning
