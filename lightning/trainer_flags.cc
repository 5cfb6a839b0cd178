#include "lightning/trainer_flags.h"

#include <algorithm>
#include <cctype>
#include <cmath>
#include <cstdlib>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <set>

#include "lightning/callback.h"
#include "lightning/checkpoint/state.h"
#include "lightning/distributed/environments.h"
#include "lightning/duration.h"
#include "lightning/errors.h"
#include "lightning/files.h"
#include "lightning/log.h"
#include "lightning/logger.h"
#include "lightning/overrides.h"
#include "lightning/profiler.h"
#include "lightning/rank_zero_logger.h"
#include "lightning/step/executor.h"
#include "lightning/strategy.h"
#include "lightning/yaml.h"

namespace lightning {

// ---- Codecs of flags ----------------------------------------------------------------------------

void Codec<LoggerFlag>::write(Json& out, const LoggerFlag& value) {
  if (value.parts().empty()) {
    out = value.on();
  } else if (value.parts().size() == 1) {
    value.parts()[0].write(out);
  } else {
    Codec<std::vector<Part<Logger>>>::write(out, value.parts());
  }
}

void Codec<LoggerFlag>::read(const Json& in, LoggerFlag& value, const std::string& where) {
  if (in.is_null()) {
    value = LoggerFlag(true);
  } else if (in.is_boolean()) {
    value = LoggerFlag(in.get<bool>());
  } else {
    std::vector<Part<Logger>> parts;
    Codec<std::vector<Part<Logger>>>::read(in, parts, where);
    value = parts.empty() ? LoggerFlag(false) : LoggerFlag(std::move(parts));
  }
}

void Codec<Plugin>::write(Json& out, const Plugin& value) {
  if (value.precision() != nullptr) {
    out = value.precision()->name();
  } else if (value.cluster_environment() != nullptr) {
    out = value.cluster_environment()->name();
  } else {
    out = value.checkpoint_io() != nullptr ? "<checkpoint_io object>" : "";
  }
}

void Codec<Plugin>::read(const Json& in, Plugin& value, const std::string& where) {
  Part<Precision> part;
  Codec<Part<Precision>>::read(in, part, where);
  if (!part.empty() && registry<CheckpointIO>().has(part.name())) {
    Part<CheckpointIO> io;
    Codec<Part<CheckpointIO>>::read(in, io, where);
    value.checkpoint_io_ = io.make(where);
  } else if (!part.empty() && registry<ClusterEnvironment>().has(part.name())) {
    Part<ClusterEnvironment> environment;
    Codec<Part<ClusterEnvironment>>::read(in, environment, where);
    value.cluster_environment_ = environment.make(where);
  } else if (!part.empty()) {
    value.precision_ = part.make(where);
  }
}

// ---- Environment --------------------------------------------------------------------------------

TrainerOptions with_environment(TrainerOptions options) {
  const TrainerOptions defaults;
  for (const auto& field : TrainerOptions::fields()) {
    std::string variable = "PL_TRAINER_";
    for (const char c : field.name) {
      variable += static_cast<char>(std::toupper(static_cast<unsigned char>(c)));
    }
    const char* text = std::getenv(variable.c_str());
    if (text == nullptr) continue;
    Json given, untouched;
    field.write(&options, given);
    field.write(&defaults, untouched);
    if (given == untouched) field.read(&options, from_yaml(text, variable), variable);
  }
  return options;
}

// ---- Checks -------------------------------------------------------------------------------------

namespace {

[[noreturn]] void refuse(const std::string& flag, const std::string& given,
                         const std::string& expected, const std::string& hint = "") {
  throw MisconfigurationError(
      str("Trainer got ", flag, "=", given, ", expected ", expected, ".", hint));
}

void at_least(const char* flag, int64_t value, int64_t least, const char* expected) {
  if (value < least) refuse(flag, str(value), expected);
}

// A fraction of 0 to 1 or a count; whole fractions above 1 are counts.
BatchLimit check_limit(const std::string& flag, const BatchLimit& limit) {
  static const char* const expected =
      "a count of batches (1: one batch) or a fraction from 0.0 to 1.0 (1.0: all)";
  if (const auto* count = std::get_if<int64_t>(&limit)) {
    if (*count < 0) refuse(flag, str(*count), expected);
    return limit;
  }
  const double fraction = std::get<double>(limit);
  if (fraction > 1 && fraction == std::floor(fraction) && fraction < 1e18) {
    return static_cast<int64_t>(fraction);
  }
  if (!(fraction >= 0 && fraction <= 1)) refuse(flag, str(fraction), expected);
  return limit;
}

void check_barebones(const TrainerOptions& options) {
  if (!options.barebones()) return;
  const auto clash = [](bool given, const char* flag) {
    if (given) {
      throw MisconfigurationError(str("Trainer got barebones=true and ", flag,
                                      ": barebones turns off all that costs time beside training. "
                                      "Leave one of them out."));
    }
  };
  clash(options.enable_checkpointing().value_or(false), "enable_checkpointing=true");
  clash(!options.logger().is_default() && options.logger().on(), "a logger");
  clash(options.enable_progress_bar().value_or(false), "enable_progress_bar=true");
  clash(options.log_every_n_steps().value_or(0) > 0, "log_every_n_steps above 0");
  clash(options.enable_model_summary().value_or(false), "enable_model_summary=true");
  clash(options.num_sanity_val_steps().value_or(0) != 0, "num_sanity_val_steps other than 0");
  clash(options.fast_dev_run() != BoolOrInt(false), "fast_dev_run");
  clash(options.detect_anomaly(), "detect_anomaly=true");
  clash(options.profiler().has_value(), "a profiler");
  info(
      "barebones=true: no checkpoints, loggers, progress bar, model summary, sanity check; log() "
      "has no effect.");
}

void set_val_check_interval(const TrainerOptions& options, Settings& settings) {
  const std::string flag = "val_check_interval";
  const auto& every = options.check_val_every_n_epoch();
  if (every) at_least("check_val_every_n_epoch", *every, 1, "1 or more, or null");
  settings.check_val_every_n_epoch = every.value_or(0);
  const auto interval = options.val_check_interval().value_or(ValCheckInterval(1.0));
  if (const auto* batches = std::get_if<int64_t>(&interval)) {
    at_least("val_check_interval", *batches, 1,
             "a count of batches of at least 1, a fraction, or a time");
    settings.val_check_batches = *batches;
    return;
  }
  const auto* fraction = std::get_if<double>(&interval);
  if (fraction == nullptr) {
    const auto seconds =
        std::holds_alternative<std::string>(interval)
            ? parse_duration(std::get<std::string>(interval), "Trainer.val_check_interval")
            : parse_duration(std::get<std::map<std::string, int64_t>>(interval),
                             "Trainer.val_check_interval");
    settings.val_check_seconds = seconds.count();
    return;
  }
  if (*fraction > 1 && *fraction == std::floor(*fraction)) {
    settings.val_check_batches = static_cast<int64_t>(*fraction);
    return;
  }
  if (!(*fraction > 0 && *fraction <= 1)) {
    refuse(flag, str(*fraction),
           "a fraction above 0.0 and up to 1.0, a count of batches, or a time DD:HH:MM:SS (to turn "
           "validation off: limit_val_batches=0)");
  }
  if (!every && options.val_check_interval()) {
    refuse(flag, str(*fraction),
           "a count of batches, because check_val_every_n_epoch=null counts them over epochs");
  }
  settings.val_check_fraction = *fraction;
}

void set_limits(const TrainerOptions& options, Settings& settings) {
  const auto limit = [](const std::string& flag, const std::optional<IntOrFloat>& value) {
    return check_limit(flag, value.value_or(1.0));
  };
  settings.limit_train_batches = limit("limit_train_batches", options.limit_train_batches());
  settings.limit_val_batches = limit("limit_val_batches", options.limit_val_batches());
  settings.limit_test_batches = limit("limit_test_batches", options.limit_test_batches());
  settings.limit_predict_batches = limit("limit_predict_batches", options.limit_predict_batches());
  const auto overfit = check_limit("overfit_batches", options.overfit_batches());
  settings.overfits = std::visit([](auto value) { return value > 0; }, overfit);
  if (settings.overfits) settings.limit_train_batches = settings.limit_val_batches = overfit;
}

void set_fast_dev_run(const TrainerOptions& options, Settings& settings) {
  const auto& flag = options.fast_dev_run();
  const auto* count = std::get_if<int64_t>(&flag);
  const int64_t batches = count != nullptr ? *count : std::get<bool>(flag) ? 1 : 0;
  at_least("fast_dev_run", batches, 0, "true, false, or a count of batches");
  if (batches == 0) return;
  settings.fast_dev_run = batches;
  if (!settings.overfits) {
    settings.limit_train_batches = settings.limit_val_batches = batches;
    settings.limit_test_batches = settings.limit_predict_batches = batches;
  }
  settings.max_steps = batches;
  settings.max_epochs = 1;
  settings.num_sanity_val_steps = 0;
  settings.val_check_batches.reset();
  settings.val_check_seconds.reset();
  settings.val_check_fraction = 1.0;
  settings.check_val_every_n_epoch = 1;
  info(str("fast_dev_run: fit, validate, test and predict run ", batches,
           " batch(es) each; nothing is logged or saved."));
}

}  // namespace

Settings check_flags(const TrainerOptions& options) {
  Settings settings;
  at_least("num_nodes", options.num_nodes(), 1, "1 or more");
  check_barebones(options);

  if (options.max_epochs()) at_least("max_epochs", *options.max_epochs(), -1, "0 or more, or -1");
  at_least("max_steps", options.max_steps(), -1, "0 or more, or -1");
  if (options.min_epochs()) at_least("min_epochs", *options.min_epochs(), 0, "0 or more");
  if (options.min_steps()) at_least("min_steps", *options.min_steps(), 0, "0 or more");
  const auto not_above = [](const char* low_flag, const std::optional<int64_t>& low,
                            const char* high_flag, int64_t high) {
    if (low && high != -1 && *low > high) {
      throw MisconfigurationError(str("Trainer got ", low_flag, "=", *low, " above ", high_flag,
                                      "=", high, ". Raise ", high_flag, " or lower ", low_flag,
                                      "."));
    }
  };
  not_above("min_epochs", options.min_epochs(), "max_epochs", options.max_epochs().value_or(-1));
  not_above("min_steps", options.min_steps(), "max_steps", options.max_steps());
  settings.max_epochs = options.max_epochs().value_or(-1);
  settings.max_steps = options.max_steps();
  settings.min_steps = options.min_steps();
  settings.min_epochs = options.min_epochs().value_or(options.min_steps() ? 1 : 0);

  set_limits(options, settings);
  set_val_check_interval(options, settings);
  settings.num_sanity_val_steps =
      options.num_sanity_val_steps().value_or(options.barebones() ? 0 : 2);
  at_least("num_sanity_val_steps", settings.num_sanity_val_steps, -1, "0 or more, or -1 for all");
  settings.log_every_n_steps = options.log_every_n_steps().value_or(options.barebones() ? 0 : 50);
  at_least("log_every_n_steps", settings.log_every_n_steps, 0, "1 or more, or 0 for never");
  set_fast_dev_run(options, settings);

  settings.accumulate_grad_batches = options.accumulate_grad_batches();
  at_least("accumulate_grad_batches", settings.accumulate_grad_batches, 1, "1 or more");
  settings.gradient_clip_val = options.gradient_clip_val();
  if (settings.gradient_clip_val && !(*settings.gradient_clip_val >= 0)) {
    refuse("gradient_clip_val", str(*settings.gradient_clip_val), "a limit above 0, or null");
  }
  settings.gradient_clip_algorithm = options.gradient_clip_algorithm();
  const auto& algorithm = settings.gradient_clip_algorithm;
  if (algorithm && *algorithm != "norm" && *algorithm != "value") {
    refuse("gradient_clip_algorithm", '"' + *algorithm + '"', "\"norm\" or \"value\"",
           did_you_mean(*algorithm, {"norm", "value"}));
  }
  if (options.deterministic() && std::holds_alternative<std::string>(*options.deterministic()) &&
      std::get<std::string>(*options.deterministic()) != "warn") {
    refuse("deterministic", '"' + std::get<std::string>(*options.deterministic()) + '"',
           "true, false or \"warn\"");
  }
  if (options.max_time()) parse_duration(*options.max_time(), "Trainer.max_time");
  settings.reload_dataloaders_every_n_epochs = options.reload_dataloaders_every_n_epochs();
  at_least("reload_dataloaders_every_n_epochs", settings.reload_dataloaders_every_n_epochs, 0,
           "0 or more");
  settings.inference_mode = options.inference_mode();
  settings.use_distributed_sampler = options.use_distributed_sampler();
  settings.detect_anomaly = options.detect_anomaly();
  settings.sync_debug_mode = options.sync_debug_mode();
  const std::vector<std::string> sync_modes{"default", "warn", "error"};
  if (std::find(sync_modes.begin(), sync_modes.end(), settings.sync_debug_mode) ==
      sync_modes.end()) {
    refuse("sync_debug_mode", '"' + settings.sync_debug_mode + '"',
           "\"default\", \"warn\" or \"error\"",
           did_you_mean(settings.sync_debug_mode, sync_modes));
  }
  settings.barebones = options.barebones();
  settings.autolog_hparams = options.enable_autolog_hparams();
  settings.default_root_dir = options.default_root_dir() ? expand_path(*options.default_root_dir())
                                                         : std::filesystem::current_path().string();
  return settings;
}

// ---- Callbacks ----------------------------------------------------------------------------------

std::vector<std::shared_ptr<Callback>> in_order(std::vector<std::shared_ptr<Callback>> callbacks) {
  const auto place = [](const std::shared_ptr<Callback>& callback) {
    return callback->role() == CallbackRole::kTuner        ? 0
           : callback->role() == CallbackRole::kCheckpoint ? 2
                                                           : 1;
  };
  std::stable_sort(callbacks.begin(), callbacks.end(),
                   [&](const auto& a, const auto& b) { return place(a) < place(b); });
  std::set<std::string> keys;
  for (const auto& callback : callbacks) {
    if (!is_overridden(*callback, &Callback::state_dict)) continue;
    if (!keys.insert(callback->state_key()).second) {
      throw MisconfigurationError(
          str("Trainer got two callbacks whose state would be saved under one key, ",
              callback->state_key(), ". Leave one out, or give them different arguments."));
    }
  }
  return callbacks;
}

std::vector<std::shared_ptr<Callback>> make_callbacks(const TrainerOptions& options) {
  std::vector<std::shared_ptr<Callback>> callbacks;
  for (size_t i = 0; i < options.callbacks().size(); ++i) {
    callbacks.push_back(options.callbacks()[i].make(str("trainer.callbacks[", i, "]")));
    if (callbacks.back() == nullptr) {
      throw MisconfigurationError(
          str("Trainer got a callback that is null at callbacks[", i, "]."));
    }
  }
  const auto count = [&](CallbackRole role) {
    return std::count_if(callbacks.begin(), callbacks.end(),
                         [&](const auto& callback) { return callback->role() == role; });
  };
  const bool barebones = options.barebones();
  const auto wanted = [&](const std::optional<bool>& flag) { return flag.value_or(!barebones); };
  const auto turned_off = [&](const std::optional<bool>& flag, const char* name,
                              CallbackRole role) {
    if (!wanted(flag) && count(role) > 0) {
      throw MisconfigurationError(str("Trainer got ", name,
                                      "=false and a callback that does just "
                                      "that. Leave one of them out."));
    }
  };
  const auto add = [&](const char* name) {
    if (registry<Callback>().has(name)) callbacks.push_back(registry<Callback>().make(name));
  };

  turned_off(options.enable_checkpointing(), "enable_checkpointing", CallbackRole::kCheckpoint);
  turned_off(options.enable_progress_bar(), "enable_progress_bar", CallbackRole::kProgressBar);
  if (count(CallbackRole::kProgressBar) > 1) {
    throw MisconfigurationError(
        "Trainer got several progress bars; one terminal has room for one.");
  }
  if (count(CallbackRole::kCheckpoint) == 0 && wanted(options.enable_checkpointing())) {
    add("ModelCheckpoint");
  }
  if (options.max_time()) {
    if (count(CallbackRole::kTimer) > 0) {
      info("max_time has no effect: the callbacks hold a Timer already.");
    } else {
      Json duration;
      Codec<Duration>::write(duration, *options.max_time());
      callbacks.push_back(registry<Callback>().make("Timer", Json{{"duration", duration}}));
    }
  }
  if (count(CallbackRole::kProgressBar) == 0 && wanted(options.enable_progress_bar())) {
    add("TQDMProgressBar");
  }
  if (count(CallbackRole::kModelSummary) == 0 && wanted(options.enable_model_summary())) {
    add("ModelSummary");
  }
  return in_order(std::move(callbacks));
}

// ---- Other parts --------------------------------------------------------------------------------

std::vector<std::shared_ptr<Logger>> make_loggers(const TrainerOptions& options,
                                                  const Settings& settings, bool logs) {
  std::vector<std::shared_ptr<Logger>> loggers;
  const auto& flag = options.logger();
  if (settings.fast_dev_run > 0 || !flag.on() || (flag.is_default() && options.barebones())) {
    return loggers;
  }
  if (flag.is_default()) {
    for (const char* name : {"TensorBoardLogger", "CSVLogger"}) {
      if (loggers.empty() && registry<Logger>().has(name)) {
        loggers.push_back(registry<Logger>().make(name));
      }
    }
  }
  for (size_t i = 0; i < flag.parts().size(); ++i) {
    loggers.push_back(flag.parts()[i].make(str("trainer.logger[", i, "]")));
  }
  for (auto& logger : loggers) {
    logger->set_default_root_dir(settings.default_root_dir);
    if (!logs) logger = std::make_shared<RankZeroLogger>(std::move(logger));
  }
  return loggers;
}

namespace {

std::shared_ptr<Accelerator> make_accelerator(const Part<Accelerator>& flag) {
  auto& known = registry<Accelerator>();
  if (flag.object() != nullptr || flag.name() != "auto") {
    auto accelerator = flag.make("trainer.accelerator");
    if (!accelerator->is_available()) {
      throw MisconfigurationError(str("Trainer got accelerator=\"", accelerator->name(),
                                      "\", but this machine has none that LibTorch can use. Give "
                                      "\"cpu\" or \"auto\"."));
    }
    return accelerator;
  }
  std::shared_ptr<Accelerator> best;
  for (const auto& name : known.names()) {
    auto one = known.make(name);
    if (one->is_available() && (best == nullptr || one->auto_rank() < best->auto_rank())) {
      best = std::move(one);
    }
  }
  return best != nullptr ? best : known.make("auto");  // none linked: the registry says what to add
}

// What the plugins give; null for what they leave to the flags.
struct Plugins {
  std::shared_ptr<Precision> precision;
  std::shared_ptr<CheckpointIO> checkpoint_io;
  std::shared_ptr<ClusterEnvironment> cluster_environment;
};

Plugins sort_plugins(const TrainerOptions& options) {
  Plugins sorted;
  for (const auto& plugin : options.plugins()) {
    const auto take = [](auto& slot, const auto& part, const char* kind) {
      if (part == nullptr) return;
      if (slot != nullptr) {
        throw MisconfigurationError(str("Trainer got two plugins of the kind ", kind, "."));
      }
      slot = part;
    };
    take(sorted.precision, plugin.precision(), "precision");
    take(sorted.checkpoint_io, plugin.checkpoint_io(), "checkpoint_io");
    take(sorted.cluster_environment, plugin.cluster_environment(), "cluster_environment");
  }
  return sorted;
}

// The devices of this node. Where the number is left to us: what somebody else started processes
// for, else all that the accelerator gives. A process that SLURM shows one GPU alone takes that.
std::vector<c10::Device> make_devices(const TrainerOptions& options, const Accelerator& accelerator,
                                      const ClusterEnvironment& environment) {
  const auto external = environment.creates_processes_externally();
  const auto per_node = external ? environment.processes_per_node() : std::nullopt;
  const auto* word = std::get_if<std::string>(&options.devices());
  const auto* number = std::get_if<int64_t>(&options.devices());
  const bool any = word != nullptr && *word == "auto";
  const auto wanted = any                 ? per_node
                      : number != nullptr ? std::optional<int64_t>(*number)
                                          : std::nullopt;
  if (external && wanted && *wanted > 1 && accelerator.name() != "cpu") {
    const auto visible = accelerator.parse_devices("auto");
    if (visible.size() == 1) return {static_cast<size_t>(*wanted), visible[0]};
  }
  if (any && per_node) return accelerator.parse_devices(*per_node);
  return accelerator.parse_devices(options.devices());
}

// Processes that were started together and would not know of each other.
void refuse_lone_runs(const ClusterEnvironment& environment) {
  if (!environment.creates_processes_externally()) return;
  const auto processes = environment.processes_per_node().value_or(1);
  if (processes == 1) return;
  throw MisconfigurationError(
      str("Trainer got devices=1, but ", environment.name(), " says that ", processes,
          " processes were started on this node. Give devices=", processes,
          " or \"auto\" to train together, or strategy=\"single_device\" for "
          "runs that know nothing of each other."));
}

}  // namespace

std::shared_ptr<Strategy> make_strategy(const TrainerOptions& options) {
  auto accelerator = make_accelerator(options.accelerator());
  const auto plugins = sort_plugins(options);
  const auto environment = plugins.cluster_environment != nullptr ? plugins.cluster_environment
                                                                  : detect_cluster_environment();
  auto devices = make_devices(options, *accelerator, *environment);
  const auto* word = std::get_if<std::string>(&options.devices());

  const auto& flag = options.strategy();
  const bool automatic = flag.object() == nullptr && flag.name() == "auto";
  const bool several = devices.size() > 1 || options.num_nodes() > 1;
  if (automatic && !several) refuse_lone_runs(*environment);
  auto strategy = automatic ? registry<Strategy>().make(several ? "ddp" : "single_device")
                            : flag.make("trainer.strategy");
  if (word != nullptr && *word == "auto" && !strategy->has_processes())
    devices.erase(devices.begin() + 1, devices.end());
  if (plugins.precision != nullptr && options.precision()) {
    throw MisconfigurationError(
        "Trainer got a precision flag and a precision plugin. Leave one of them out.");
  }
  auto precision = plugins.precision;
  if (precision == nullptr) {
    precision = options.precision().value_or(Part<Precision>("32-true")).make("trainer.precision");
  }
  strategy->connect(
      std::move(accelerator), std::move(precision), std::move(devices),
      plugins.checkpoint_io != nullptr ? plugins.checkpoint_io : default_checkpoint_io());
  strategy->connect_processes(environment, options.num_nodes());
  return strategy;
}

}  // namespace lightning
