#include "lightning/checkpoint/migration.h"

#include <algorithm>
#include <array>
#include <cctype>
#include <cstring>
#include <vector>

#include "lightning/errors.h"
#include "lightning/log.h"
#include "lightning/version.h"

namespace lightning {
namespace {

constexpr const char* kVersionKey = "pytorch-lightning_version";
constexpr const char* kLegacyVersionKey = "legacy_pytorch-lightning_version";
constexpr const char* kStep = "epoch_loop.automatic_optimization.optim_progress";
constexpr const char* kManualStep = "epoch_loop.manual_optimization.optim_step_progress";

using Version = std::array<int64_t, 3>;

// "1.8.3.post1" and "2.0.0rc1" count as 1.8.3 and 2.0.0: no migration lies between.
Version version_of(const std::string& text) {
  Version version{};
  size_t at = 0;
  for (auto& part : version) {
    while (at < text.size() && std::isdigit(static_cast<unsigned char>(text[at])) != 0) {
      part = std::min<int64_t>(part * 10 + (text[at++] - '0'), 1'000'000);
    }
    if (at >= text.size() || text[at] != '.') break;
    ++at;
  }
  return version;
}

// The value at the key where that is a dict, which is made where it is missing.
State& dict_at(State& state, const State::Key& key) {
  State& value = state[key];
  if (!value.is_dict()) value = State::dict();
  return value;
}

bool is_dict_at(const State& state, const char* key) {
  const auto* value = state.find(key);
  return value != nullptr && value->is_dict();
}

void set_default(State& state, const State::Key& key, State value) {
  if (!state.contains(key)) state[key] = std::move(value);
}

void rename(State& state, const char* from, const char* to) {
  const auto* value = state.find(from);
  if (value == nullptr) return;
  State moved = *value;
  state.as_dict().erase(from);
  state[to] = std::move(moved);
}

// A class under which callbacks were saved; empty for other keys.
std::string class_name(const State::Key& key) {
  const auto* other = std::get_if<State::OtherKey>(&key);
  if (other == nullptr || other->value == nullptr || !other->value->is_object()) return "";
  return other->value->as_object().name;
}

// ---- Before 0.10: the callbacks' values stood beside everything else ----------------------------

void collect_callbacks(State& checkpoint) {
  static constexpr struct {
    const char* key;
    const char* callback;
    const char* name;
  } kMoved[] = {
      {"checkpoint_callback_best_model_score", "ModelCheckpoint", "best_model_score"},
      {"checkpoint_callback_best_model_path", "ModelCheckpoint", "best_model_path"},
      {"checkpoint_callback_best", "ModelCheckpoint", "best_model_score"},
      {"early_stop_callback_wait", "EarlyStopping", "wait_count"},
      {"early_stop_callback_patience", "EarlyStopping", "patience"},
  };
  dict_at(checkpoint, "callbacks");
  for (const auto& moved : kMoved) {
    const auto* found = checkpoint.find(moved.key);
    if (found == nullptr) continue;
    State value = *found;
    checkpoint.as_dict().erase(moved.key);
    dict_at(dict_at(checkpoint, "callbacks"), moved.callback)[moved.name] = std::move(value);
  }
}

// ---- Before 1.6: counters beside the loops, or no loops -----------------------------------------

State counts(bool whole, bool started) {
  State value = State::dict({{"completed", 0}});
  if (whole) value["processed"] = 0;
  value["ready"] = 0;
  if (started) value["started"] = 0;
  return value;
}

State progress(bool whole, bool started) {
  return State::dict({{"current", counts(whole, started)}, {"total", counts(whole, started)}});
}

State batch_progress() {
  State value = progress(true, true);
  value["is_last_batch"] = false;
  return value;
}

// The state of a fit loop that has not begun, in today's names.
State fresh_fit_loop() {
  return State::dict(
      {{"state_dict", State::dict()},
       {"epoch_loop.state_dict", State::dict({{"_batches_that_stepped", 0}})},
       {"epoch_loop.batch_progress", batch_progress()},
       {"epoch_loop.scheduler_progress", progress(false, false)},
       {"epoch_loop.automatic_optimization.state_dict", State::dict()},
       {kStep, State::dict({{"optimizer", State::dict({{"step", progress(false, false)},
                                                       {"zero_grad", progress(false, true)}})}})},
       {"epoch_loop.manual_optimization.state_dict", State::dict()},
       {kManualStep, progress(false, false)},
       {"epoch_loop.val_loop.dataloader_progress", progress(false, false)},
       {"epoch_loop.val_loop.epoch_loop.batch_progress", batch_progress()},
       {"epoch_loop.val_loop.epoch_loop.state_dict", State::dict()},
       {"epoch_loop.val_loop.state_dict", State::dict()},
       {"epoch_progress", progress(true, true)}});
}

State number_at(const State& checkpoint, const char* key) {
  const auto* value = checkpoint.find(key);
  return value != nullptr && value->is<int64_t>() ? *value : State(0);
}

void count_in_loops(State& checkpoint) {
  State& loops = dict_at(checkpoint, "loops");
  if (!is_dict_at(loops, "fit_loop")) loops["fit_loop"] = fresh_fit_loop();
  State& fit_loop = loops["fit_loop"];
  const State step = number_at(checkpoint, "global_step");
  State& optimizer = dict_at(dict_at(fit_loop, kStep), "optimizer");
  dict_at(dict_at(optimizer, "step"), "total")["completed"] = step;
  dict_at(dict_at(fit_loop, kManualStep), "total")["completed"] = step;
  dict_at(dict_at(fit_loop, "epoch_progress"), "current")["completed"] =
      number_at(checkpoint, "epoch");
}

void count_batches_that_stepped(State& checkpoint) {
  if (!is_dict_at(checkpoint, "loops")) return;
  State& fit_loop = dict_at(checkpoint["loops"], "fit_loop");
  set_default(dict_at(fit_loop, "epoch_loop.state_dict"), "_batches_that_stepped",
              number_at(checkpoint, "global_step"));
}

// ---- Before 1.9: a key of ModelCheckpoint with one argument more --------------------------------

std::string shortened(std::string key) {
  static constexpr const char* kArgument = ", 'save_on_train_epoch_end': ";
  if (key.compare(0, std::strlen("ModelCheckpoint"), "ModelCheckpoint") != 0) return key;
  for (const std::string value : {"None", "True", "False"}) {
    const auto argument = kArgument + value;
    for (auto at = key.find(argument); at != std::string::npos; at = key.find(argument)) {
      key.erase(at, argument.size());
    }
  }
  return key;
}

void shorten_callback_keys(State& checkpoint) {
  if (!is_dict_at(checkpoint, "callbacks")) return;
  const State old = checkpoint["callbacks"];
  State::Dict renamed;
  for (const auto& [key, value] : old.as_dict()) {
    const auto* text = std::get_if<std::string>(&key);
    renamed[text != nullptr ? State::Key(shortened(*text)) : key] = value;
  }
  if (renamed.size() == old.as_dict().size()) {
    checkpoint["callbacks"] = std::move(renamed);
    return;
  }
  warn(
      "The checkpoint holds states of several ModelCheckpoints that today's version cannot tell "
      "apart, so at least one of them starts without its state.");
}

// ---- Before 2.0: loops in loops -----------------------------------------------------------------

void rename_loops(State& checkpoint) {
  if (!is_dict_at(checkpoint, "loops")) return;
  State& loops = checkpoint["loops"];
  if (is_dict_at(loops, "fit_loop")) {
    static constexpr struct {
      const char* before;  // below epoch_loop or, before 1.6, epoch_loop.batch_loop
      const char* now;
    } kNames[] = {
        {"manual_loop.optim_step_progress", "epoch_loop.manual_optimization.optim_step_progress"},
        {"manual_loop.state_dict", "epoch_loop.manual_optimization.state_dict"},
        {"optimizer_loop.optim_progress", "epoch_loop.automatic_optimization.optim_progress"},
        {"optimizer_loop.state_dict", "epoch_loop.automatic_optimization.state_dict"},
    };
    State& fit_loop = loops["fit_loop"];
    for (const auto& name : kNames) {
      rename(fit_loop, str("epoch_loop.batch_loop.", name.before).c_str(), name.now);
      rename(fit_loop, str("epoch_loop.", name.before).c_str(), name.now);
    }
    if (is_dict_at(fit_loop, kStep)) fit_loop[kStep].as_dict().erase("optimizer_position");
    constexpr const char* kBatchLoop = "epoch_loop.batch_loop.state_dict";
    if (const auto* state = fit_loop.find(kBatchLoop)) {
      const State kept = *state;
      if (!kept.empty()) {
        dict_at(fit_loop, "epoch_loop.state_dict")["old_batch_loop_state_dict"] = kept;
      }
      fit_loop.as_dict().erase(kBatchLoop);
    }
  }
  for (const char* name : {"predict_loop", "validate_loop", "test_loop"}) {
    if (!is_dict_at(loops, name)) continue;
    const State old = loops[name];
    State::Dict flat;
    static const std::string kBelow = "epoch_loop.";
    for (const auto& [key, value] : old.as_dict()) {
      const auto* text = std::get_if<std::string>(&key);
      const bool is_below = text != nullptr && text->compare(0, kBelow.size(), kBelow) == 0;
      if (!is_below && to_string(key) != "dataloader_progress") flat[key] = value;
    }
    for (const auto& [key, value] : old.as_dict()) {
      const auto* text = std::get_if<std::string>(&key);
      if (text != nullptr && text->compare(0, kBelow.size(), kBelow) == 0) {
        flat[text->substr(kBelow.size())] = value;
      }
    }
    loops[name] = std::move(flat);
  }
}

void drop_apex(State& checkpoint) {
  if (!checkpoint.contains("amp_scaling_state")) return;
  warn("The checkpoint holds state of Apex, which nothing here uses; it is left out.");
  checkpoint.as_dict().erase("amp_scaling_state");
}

void name_callback_classes(State& checkpoint) {
  if (!is_dict_at(checkpoint, "callbacks")) return;
  const State old = checkpoint["callbacks"];
  State::Dict named;
  for (const auto& [key, value] : old.as_dict()) {
    const auto name = class_name(key);
    State::Key now = name.empty() ? key : State::Key(name);
    if (!name.empty() && old.contains(now)) continue;
    named[now] = value;
  }
  checkpoint["callbacks"] = std::move(named);
}

void warn_of_missing(const State& checkpoint, const std::string& name) {
  std::vector<std::string> missing;
  for (const char* key : {"global_step", "epoch", "state_dict"}) {
    if (!checkpoint.contains(key)) missing.push_back(str('"', key, '"'));
  }
  if (missing.empty()) return;
  warn(str("The checkpoint ", name, " lacks ", join(missing),
           ", which a Trainer's checkpoint has. Counters that are missing begin at 0."));
}

}  // namespace

void migrate_checkpoint(State& checkpoint, const std::string& name) {
  if (!checkpoint.is_dict()) return;
  const auto* found = checkpoint.find(kVersionKey);
  const bool has_version = found != nullptr && found->is<std::string>();
  if (!has_version && !checkpoint.contains("global_step") &&
      !checkpoint.contains("optimizer_states")) {
    return;
  }
  const std::string written_by = has_version ? found->as_string() : "";
  const auto version = version_of(written_by);
  const auto ours = version_of(kPythonLightningVersion);
  if (version > ours) {
    warn(str("The checkpoint ", name, " was written by Lightning ", written_by,
             ", which is newer than the ", kPythonLightningVersion,
             " whose checkpoints this program knows. What it holds under new keys is not used."));
    return;
  }
  warn_of_missing(checkpoint, name);

  if (version < Version{0, 10, 0}) collect_callbacks(checkpoint);
  // Names first: what follows is then written once, in today's.
  if (version < Version{2, 0, 0}) rename_loops(checkpoint);
  if (version < Version{1, 6, 0} || !checkpoint.contains("loops")) count_in_loops(checkpoint);
  if (version < Version{1, 6, 5}) count_batches_that_stepped(checkpoint);
  if (version < Version{1, 9, 0}) shorten_callback_keys(checkpoint);
  if (version < Version{2, 0, 0}) {
    drop_apex(checkpoint);
    name_callback_classes(checkpoint);
    info(str("Brought the checkpoint ", name, " of Lightning ",
             has_version ? written_by : "before 0.10", " to the keys of ", kPythonLightningVersion,
             "; the file stays as it is."));
  }
  if (has_version && written_by != kPythonLightningVersion) {
    set_default(checkpoint, kLegacyVersionKey, written_by);
  }
  checkpoint[kVersionKey] = kPythonLightningVersion;
}

}  // namespace lightning
