#include "lightning/loops/data_setup.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "lightning/errors.h"
#include "lightning/log.h"
#include "lightning/overrides.h"

namespace lightning {
namespace {

using ModuleLoaders = Loaders (LightningModule::*)();
using DataModuleLoaders = Loaders (LightningDataModule::*)();

struct StageHooks {
  Hook hook;
  ModuleLoaders module;
  DataModuleLoaders datamodule;
};

StageHooks hooks_of(LoaderStage stage) {
  switch (stage) {
    case LoaderStage::kTrain:
      return {Hook::train_dataloader, &LightningModule::train_dataloader,
              &LightningDataModule::train_dataloader};
    case LoaderStage::kVal:
      return {Hook::val_dataloader, &LightningModule::val_dataloader,
              &LightningDataModule::val_dataloader};
    case LoaderStage::kTest:
      return {Hook::test_dataloader, &LightningModule::test_dataloader,
              &LightningDataModule::test_dataloader};
    default:
      return {Hook::predict_dataloader, &LightningModule::predict_dataloader,
              &LightningDataModule::predict_dataloader};
  }
}

const Loaders& given(const Run& run, LoaderStage stage) {
  switch (stage) {
    case LoaderStage::kTrain:
      return run.sources.train;
    case LoaderStage::kVal:
      return run.sources.val;
    case LoaderStage::kTest:
      return run.sources.test;
    default:
      return run.sources.predict;
  }
}

void refuse_null(const Loaders& loaders, LoaderStage stage) {
  for (const auto& item : loaders.items()) {
    if (item.second.empty()) {
      throw MisconfigurationError(str("The ", to_string(stage),
                                      " loaders hold one that is null. "
                                      "Leave it out, or make it first."));
    }
    refuse_null(item.second, stage);
  }
}

Loaders request(Run& run, LoaderStage stage) {
  if (!given(run, stage).empty()) return given(run, stage);
  const auto hooks = hooks_of(stage);
  Loaders loaders;
  if (run.datamodule != nullptr) {
    run.call_datamodule(hooks.hook,
                        [&](LightningDataModule& d) { loaders = (d.*hooks.datamodule)(); });
  } else {
    loaders = run.call_module(hooks.hook, [&](LightningModule& m) { return (m.*hooks.module)(); });
  }
  if (loaders.empty()) {
    throw MisconfigurationError(
        str("No ", to_string(stage), " data: ", to_string(hooks.hook),
            run.datamodule ? " of the data module" : " of the module",
            " returned no loader. Return one there, or pass loaders to the Trainer's call."));
  }
  return loaders;
}

std::shared_ptr<Loader> fitted(Run& run, LoaderStage stage, std::shared_ptr<Loader> loader) {
  const bool train = stage == LoaderStage::kTrain;
  const auto replace = [&](std::shared_ptr<Loader> other) {
    if (other != nullptr) loader = std::move(other);
  };
  if (run.settings.overfits && train) {
    if (loader->shuffles()) {
      warn("overfit_batches is on: the training data are read in order instead of shuffled.");
    }
    replace(loader->sequential());
  }
  if (stage == LoaderStage::kPredict) {
    replace(loader->for_predict());
  } else if (!train && loader->shuffles()) {
    warn_once(str("The ", to_string(stage),
                  " loader shuffles its data. Its results do not need "
                  "it, and it is better not to."));
  }
  const auto share = run.strategy_->sampler_arguments();
  if (share && run.settings.use_distributed_sampler) {
    if (!run.fitting() && (stage == LoaderStage::kVal || stage == LoaderStage::kTest)) {
      warn_once(str("The ", to_string(stage),
                    " data are shared out among processes, and the first samples come again where "
                    "they do not divide. For exact numbers use a Trainer with devices=1."));
    }
    replace(loader->distributed(*share, train ? !run.settings.overfits : loader->shuffles()));
    loader->set_epoch(run.fit.epoch.current.processed);  // a test after fit has its order
  }
  return run.strategy_->process_dataloader(std::move(loader));
}

// A rank without data would hold up the others at once, one with less in the end of training: they
// have no batch to reduce gradients with. False where a rank does not know its number.
bool compare_lengths(Run& run, LoaderStage stage, std::optional<int64_t> batches) {
  auto& strategy = *run.strategy_;
  if (strategy.world_size() == 1) return true;
  State::List lengths;
  for (auto& one : strategy.all_gather_states(batches ? State(*batches) : State())) {
    lengths.push_back(std::move(one));
  }
  int64_t least = -1, most = -1;
  for (const auto& one : lengths) {
    if (one.is_none()) return false;
    least = least == -1 ? one.as_int() : std::min(least, one.as_int());
    most = std::max(most, one.as_int());
  }
  if (least == most || (least > 0 && stage != LoaderStage::kTrain)) return true;
  const bool allowed = run.module->allow_zero_length_dataloader_with_multiple_devices;
  if (allowed && stage != LoaderStage::kTrain) return true;
  throw MisconfigurationError(str(
      "The ", to_string(stage), " loaders of the ranks have ", State(lengths).repr(), " batches. ",
      stage == LoaderStage::kTrain
          ? "Training needs as many on each: share the data out evenly, or set "
            "limit_train_batches to the least of them."
          : "Give each rank a batch at least, or set "
            "allow_zero_length_dataloader_with_multiple_devices in the module."));
}

std::string shown(const BatchLimit& limit) {
  return std::visit([](auto value) { return str(value); }, limit);
}

}  // namespace

const char* to_string(LoaderStage stage) {
  static const char* const names[] = {"train", "val", "test", "predict"};
  return names[static_cast<int>(stage)];
}

const BatchLimit& limit_of(const Settings& settings, LoaderStage stage) {
  switch (stage) {
    case LoaderStage::kTrain:
      return settings.limit_train_batches;
    case LoaderStage::kVal:
      return settings.limit_val_batches;
    case LoaderStage::kTest:
      return settings.limit_test_batches;
    default:
      return settings.limit_predict_batches;
  }
}

bool is_zero(const BatchLimit& limit) {
  return std::visit([](auto value) { return value == 0; }, limit);
}

bool has_loaders(const Run& run, LoaderStage stage) {
  if (!given(run, stage).empty()) return true;
  const auto hooks = hooks_of(stage);
  if (run.datamodule != nullptr) return is_overridden(*run.datamodule, hooks.datamodule);
  return is_overridden(*run.module, hooks.module);
}

std::optional<int64_t> limited_batches(std::optional<int64_t> length, const BatchLimit& limit,
                                       LoaderStage stage) {
  if (length && *length == 0) {
    warn(str("The ", to_string(stage), " loader has no batches."));
    return 0;
  }
  if (const auto* count = std::get_if<int64_t>(&limit)) {
    return length ? std::min(*length, *count) : *count;
  }
  const double fraction = std::get<double>(limit);
  if (fraction == 1.0) return length;
  if (fraction == 0.0) return 0;
  if (!length) {
    throw MisconfigurationError(
        str("limit_", to_string(stage), "_batches=", shown(limit),
            " is a fraction, but the loader does not know its length. Give a count, or 1.0."));
  }
  const auto batches = static_cast<int64_t>(std::floor(static_cast<double>(*length) * fraction));
  if (batches == 0) {
    throw MisconfigurationError(str("limit_", to_string(stage), "_batches=", shown(limit), " of ",
                                    *length, " batches leaves none. Give at least ",
                                    1.0 / static_cast<double>(*length), ", or 0."));
  }
  return batches;
}

StageData setup_stage(Run& run, LoaderStage stage) {
  const bool train = stage == LoaderStage::kTrain;
  const auto loaders = request(run, stage);
  refuse_null(loaders, stage);
  run.strategy_->barrier(str(to_string(stage), "_dataloader()"));

  StageData data;
  if (auto own = std::dynamic_pointer_cast<CombinedLoader>(loaders.single())) {
    data.loader = std::move(own);
  } else {
    data.loader =
        std::make_shared<CombinedLoader>(loaders, train ? "max_size_cycle" : "sequential");
  }
  if (train && data.loader->mode() == "sequential") {
    throw MisconfigurationError(
        "fit got a CombinedLoader of mode \"sequential\", whose batches are not of all loaders. "
        "Use min_size, max_size or max_size_cycle for training.");
  }
  if (stage == LoaderStage::kPredict && data.loader->mode() != "sequential") {
    throw MisconfigurationError(str("predict got a CombinedLoader of mode \"", data.loader->mode(),
                                    "\", expected \"sequential\"."));
  }
  auto leaves = data.loader->flattened();
  for (auto& leaf : leaves) leaf = fitted(run, stage, leaf);
  data.loader->set_flattened(leaves);

  bool limited = false;
  std::vector<int64_t> limits;
  for (const auto& leaf : leaves) {
    data.num_batches.push_back(limited_batches(leaf->size(), limit_of(run.settings, stage), stage));
    if (!compare_lengths(run, stage, data.num_batches.back())) data.ranks_may_differ = true;
    limited = limited || data.num_batches.back().has_value();
    limits.push_back(data.num_batches.back().value_or(std::numeric_limits<int64_t>::max()));
  }
  limited ? data.loader->set_limits(limits) : data.loader->clear_limits();
  return data;
}

}  // namespace lightning
