#include "callbacks/model_checkpoint.h"

#include <ATen/ops/scalar_tensor.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <filesystem>
#include <limits>
#include <nlohmann/json.hpp>

#include "lightning/checkpoint/state.h"
#include "lightning/errors.h"
#include "lightning/files.h"
#include "lightning/log.h"
#include "lightning/logger.h"
#include "lightning/module.h"
#include "lightning/python_text.h"
#include "lightning/registry.h"
#include "lightning/strategy.h"
#include "lightning/trainer.h"
#include "lightning/yaml.h"

namespace lightning {
namespace {

namespace fs = std::filesystem;

const Registration<Callback> kModelCheckpoint{
    "ModelCheckpoint", "Saves checkpoints while fit runs, and keeps the best ones.",
    [](const ModelCheckpointOptions& options) {
      return std::make_unique<ModelCheckpoint>(options);
    }};

// The folder with "~" and links resolved, so that a later run recognises it.
std::string resolved(const std::string& dirpath) {
  if (dirpath.find("://") != std::string::npos && dirpath.rfind("file://", 0) != 0) {
    throw MisconfigurationError(str("ModelCheckpoint got dirpath \"", dirpath,
                                    "\", expected a folder of this machine. Mount the remote "
                                    "place, or save here and copy."));
  }
  const std::string path = dirpath.rfind("file://", 0) == 0 ? dirpath.substr(7) : dirpath;
  const auto folder = fs::weakly_canonical(fs::absolute(expand_path(path))).lexically_normal();
  return (folder.has_filename() ? folder : folder.parent_path()).string();
}

fs::path absolute(const std::string& path) { return fs::absolute(path).lexically_normal(); }

// A score as the tensor that Python keeps.
State score_state(std::optional<double> score) {
  if (!score) return {};
  const bool single =
      !std::isfinite(*score) || static_cast<double>(static_cast<float>(*score)) == *score;
  return at::scalar_tensor(*score, single ? at::kFloat : at::kDouble);
}

std::optional<double> score_of(const State& state) {
  if (state.is_none()) return std::nullopt;
  return state.as_double();
}

std::string five(double value) {
  return std::isfinite(value) ? python_format(value, "0.5f") : python_repr(value);
}

int64_t whole(const Number& number) {
  const auto* integer = std::get_if<int64_t>(&number);
  return integer ? *integer : static_cast<int64_t>(std::get<double>(number));
}

double real(const Number& number) {
  const auto* integer = std::get_if<int64_t>(&number);
  return integer ? static_cast<double>(*integer) : std::get<double>(number);
}

void replace_all(std::string& text, const std::string& what, const std::string& with) {
  for (size_t at = text.find(what); at != std::string::npos; at = text.find(what, at)) {
    text.replace(at, what.size(), with);
    at += with.size();
  }
}

// "{name" of every field, the longest first, so that "{epoch" leaves "{epoch_test" alone.
std::vector<std::string> fields_in(const std::string& name) {
  std::vector<std::string> fields;
  for (size_t open = name.find('{'); open != std::string::npos; open = name.find('{', open)) {
    const size_t end = name.find_first_of(":}", open);
    if (end == std::string::npos) break;
    fields.push_back(name.substr(open, end - open));
    open = end + 1;
  }
  std::stable_sort(fields.begin(), fields.end(),
                   [](const auto& a, const auto& b) { return a.size() > b.size(); });
  return fields;
}

}  // namespace

// ---- Set-up -------------------------------------------------------------------------------------

ModelCheckpoint::ModelCheckpoint(ModelCheckpointOptions options)
    : options_(std::move(options)), clock_(monotonic_seconds) {
  const auto& o = options_;
  if (o.dirpath() && !o.dirpath()->empty()) dirpath_ = resolved(*o.dirpath());
  if (o.train_time_interval()) {
    train_time_interval_ =
        parse_duration(*o.train_time_interval(), "ModelCheckpoint.train_time_interval");
  }
  const bool given = o.every_n_train_steps() || o.every_n_epochs() || o.train_time_interval();
  every_n_train_steps_ = o.every_n_train_steps().value_or(0);
  every_n_epochs_ = o.every_n_epochs().value_or(given ? 0 : 1);
  kth_value_ = std::numeric_limits<double>::infinity() * (o.mode() == "min" ? 1 : -1);
  check();
}

void ModelCheckpoint::check() const {
  const auto& o = options_;
  const auto refuse = [](const std::string& what) {
    throw MisconfigurationError("ModelCheckpoint got " + what);
  };
  if (o.mode() != "min" && o.mode() != "max") {
    refuse(str("mode \"", o.mode(), "\", expected \"min\" (less is better) or \"max\".",
               did_you_mean(o.mode(), {"min", "max"})));
  }
  if (links_last() && std::get<std::string>(*o.save_last()) != "link") {
    refuse(str("save_last \"", std::get<std::string>(*o.save_last()),
               "\", expected true, false or \"link\"."));
  }
  if (o.save_top_k() < -1) {
    refuse(str("save_top_k ", o.save_top_k(),
               ", expected a count, 0 to keep none or -1 to keep all."));
  }
  if (every_n_train_steps_ < 0) {
    refuse(str("every_n_train_steps ", every_n_train_steps_, ", expected 0 (never) or more."));
  }
  if (every_n_epochs_ < 0) {
    refuse(str("every_n_epochs ", every_n_epochs_, ", expected 0 (never) or more."));
  }
  if ((every_n_train_steps_ >= 1) + (every_n_epochs_ >= 1) + train_time_interval_.has_value() > 1) {
    refuse(str("every_n_train_steps ", every_n_train_steps_, ", every_n_epochs ", every_n_epochs_,
               " and train_time_interval ",
               train_time_interval_ ? format_duration(*train_time_interval_) : "none",
               ", expected one of them. Add a ModelCheckpoint for each."));
  }
  if (!o.monitor() && o.save_top_k() > 1) {
    refuse(str("save_top_k ", o.save_top_k(),
               " without monitor, so nothing says which are best. Name a logged metric with "
               "monitor(\"val_loss\"), or keep the latest (1), all (-1) or none (0)."));
  }
}

bool ModelCheckpoint::saves_last() const {
  if (!options_.save_last()) return false;
  const auto* on = std::get_if<bool>(&*options_.save_last());
  return on == nullptr || *on;
}

bool ModelCheckpoint::links_last() const {
  return options_.save_last() && std::holds_alternative<std::string>(*options_.save_last());
}

void ModelCheckpoint::setup(Trainer& trainer, LightningModule&, Stage stage) {
  dirpath_ = trainer.strategy().broadcast(resolve_dirpath(trainer)).as_string();
  if (stage != Stage::kFit) return;
  std::error_code ignored;
  if (trainer.is_global_zero() && options_.save_top_k() != 0 &&
      fs::is_directory(*dirpath_, ignored) && !fs::is_empty(*dirpath_, ignored)) {
    warn(str("Checkpoint directory ", *dirpath_, " exists and is not empty."));
  }
}

std::string ModelCheckpoint::resolve_dirpath(const Trainer& trainer) const {
  if (dirpath_) return *dirpath_;
  fs::path root = trainer.default_root_dir();
  if (!trainer.loggers().empty()) {
    const Logger& logger = *trainer.loggers().front();
    if (!logger.save_dir().empty()) root = logger.save_dir();
    root = root / logger.name() / logger.version();
  }
  return (root / "checkpoints").string();
}

// ---- When to save -------------------------------------------------------------------------------

void ModelCheckpoint::on_train_start(Trainer&, LightningModule&) {
  last_time_checked_ = clock_();
  validated_ = false;
}

void ModelCheckpoint::on_train_batch_end(Trainer& trainer, LightningModule& module,
                                         const StepOutput&, const Batch&, int64_t) {
  if (!due(trainer)) return;
  const Metrics metrics = monitor_candidates(trainer);
  if (options_.monitor()) {
    // A metric of validation is not there yet, or is that of the validation before.
    const bool missing = metrics.count(*options_.monitor()) == 0;
    const bool stale = module.automatic_optimization() && !saves_on_train_epoch_end(trainer) &&
                       trainer.is_last_batch() && validation_follows(trainer);
    if (missing || stale) {
      save_after_validation_ = true;
      return;
    }
  }
  if (skips(trainer)) return;
  save_top_k(trainer, metrics);
  save_last(trainer, metrics);
}

bool ModelCheckpoint::due(Trainer& trainer) {
  if (every_n_train_steps_ >= 1 && trainer.global_step() % every_n_train_steps_ == 0) return true;
  if (!train_time_interval_) return false;
  const double now = clock_();
  bool passed = last_time_checked_ && now - *last_time_checked_ >= train_time_interval_->count();
  // The clocks of ranks differ, and a save by some of them alone would wait for the others forever.
  if (trainer.world_size() > 1) passed = trainer.strategy().broadcast(passed).as_bool();
  if (passed) last_time_checked_ = now;
  return passed;
}

bool ModelCheckpoint::validation_follows(const Trainer& trainer) const {
  if (!trainer.enable_validation()) return false;
  bool any = false;
  for (const auto& count : trainer.num_val_batches()) any = any || !count || *count > 0;
  const int64_t every = trainer.check_val_every_n_epoch();
  return any && (every == 0 || (trainer.current_epoch() + 1) % every == 0);
}

bool ModelCheckpoint::saves_on_train_epoch_end(const Trainer& trainer) const {
  if (options_.save_on_train_epoch_end()) return *options_.save_on_train_epoch_end();
  const auto& interval = trainer.options().val_check_interval();
  const bool by_time =
      interval && (std::holds_alternative<std::string>(*interval) ||
                   std::holds_alternative<std::map<std::string, int64_t>>(*interval));
  if (by_time || trainer.check_val_every_n_epoch() != 1) return false;
  bool any = false;
  for (const auto& count : trainer.num_val_batches()) any = any || !count || *count > 0;
  return !any || trainer.val_check_interval_is_epoch();
}

bool ModelCheckpoint::skips(const Trainer& trainer) const {
  return trainer.fast_dev_run() || trainer.state_fn() != Stage::kFit || trainer.sanity_checking() ||
         last_global_step_saved_ == trainer.global_step();
}

void ModelCheckpoint::on_train_epoch_end(Trainer& trainer, LightningModule&) {
  if (!skips(trainer) && saves_on_train_epoch_end(trainer)) save_after_epoch(trainer);
}

void ModelCheckpoint::on_validation_end(Trainer& trainer, LightningModule&) {
  if (!trainer.sanity_checking()) validated_ = true;
  if (skips(trainer) || saves_on_train_epoch_end(trainer)) return;
  if (save_after_validation_) {
    const Metrics metrics = monitor_candidates(trainer);
    save_top_k(trainer, metrics);
    save_last(trainer, metrics);
    save_after_validation_ = false;
    return;
  }
  save_after_epoch(trainer);
}

void ModelCheckpoint::save_after_epoch(Trainer& trainer) {
  const Metrics metrics = monitor_candidates(trainer);
  if (every_n_epochs_ >= 1 && (trainer.current_epoch() + 1) % every_n_epochs_ == 0) {
    save_top_k(trainer, metrics);
  }
  if (last_global_step_saved_ == trainer.global_step() ||
      (links_last() && !last_checkpoint_saved_.empty())) {
    save_last(trainer, metrics);
  }
}

void ModelCheckpoint::on_train_end(Trainer& trainer, LightningModule&) {
  if (saves_last() && last_checkpoint_saved_.empty() && !trainer.fast_dev_run()) {
    save_last(trainer, monitor_candidates(trainer));
  }
}

void ModelCheckpoint::on_exception(Trainer& trainer, LightningModule&,
                                   const std::exception& exception) {
  if (!options_.save_on_exception() || trainer.fast_dev_run() || trainer.sanity_checking() ||
      last_global_step_saved_ == trainer.global_step()) {
    return;
  }
  const Metrics metrics = monitor_candidates(trainer);
  const std::string path = format_checkpoint_name(metrics);
  save(trainer, path);
  save_last(trainer, metrics);
  info(str("Saved the checkpoint ", path, " because of ", class_name(typeid(exception)), ": ",
           exception.what()));
}

// ---- Names --------------------------------------------------------------------------------------

ModelCheckpoint::Metrics ModelCheckpoint::monitor_candidates(const Trainer& trainer) const {
  Metrics metrics;
  for (const auto& [name, value] : trainer.callback_metrics()) {
    if (value.numel() != 1) continue;
    if (at::isIntegralType(value.scalar_type(), /*includeBool=*/true)) {
      metrics[name] = value.item<int64_t>();
    } else {
      metrics[name] = value.item<double>();
    }
  }
  const auto set_count = [&metrics](const char* name, int64_t count) {
    const auto logged = metrics.find(name);
    metrics[name] = logged == metrics.end() ? count : whole(logged->second);
  };
  set_count("epoch", trainer.current_epoch());
  set_count("step", trainer.global_step());
  return metrics;
}

std::string ModelCheckpoint::formatted(std::string name, Metrics metrics) const {
  if (name.empty()) name = "{epoch}" + options_.checkpoint_join_char() + "{step}";
  for (const auto& field : fields_in(name)) {
    const std::string key = field.substr(1);
    if (options_.auto_insert_metric_name()) {
      replace_all(name, field, key + options_.checkpoint_equals_char() + "{" + key);
    }
    replace_all(name, field, "{0[" + key + "]");
    metrics.emplace(key, int64_t{0});
  }
  return python_format_fields(name, metrics);
}

std::string ModelCheckpoint::format_checkpoint_name(const Metrics& metrics,
                                                    const std::optional<std::string>& filename,
                                                    std::optional<int64_t> version) const {
  std::string name = formatted(
      filename && !filename->empty() ? *filename : options_.filename().value_or(""), metrics);
  if (version) name += str(options_.checkpoint_join_char(), "v", *version);
  name += kFileExtension;
  return dirpath_ ? (fs::path(*dirpath_) / name).string() : name;
}

std::string ModelCheckpoint::free_path(Trainer& trainer, const Metrics& metrics,
                                       const std::optional<std::string>& filename,
                                       const std::string& own) const {
  std::string path = format_checkpoint_name(metrics, filename);
  if (!options_.enable_version_counter()) return path;
  for (int64_t version = kStartingVersion; exists(trainer, path) && path != own; ++version) {
    path = format_checkpoint_name(metrics, filename, version);
  }
  return path;
}

bool ModelCheckpoint::exists(Trainer& trainer, const std::string& path) const {
  std::error_code ignored;
  return trainer.strategy().reduce_any(trainer.is_global_zero() && fs::exists(path, ignored));
}

std::set<std::string> ModelCheckpoint::last_checkpoints(Trainer& trainer) const {
  std::set<std::string> found;
  std::error_code ignored;
  for (const auto& entry : fs::directory_iterator(resolve_dirpath(trainer), ignored)) {
    const auto& path = entry.path();
    if (path.extension() == kFileExtension &&
        path.stem().string().rfind(options_.checkpoint_name_last(), 0) == 0) {
      found.insert(path.lexically_normal().string());
    }
  }
  return found;
}

// ---- Saving -------------------------------------------------------------------------------------

void ModelCheckpoint::save(Trainer& trainer, const std::string& path) {
  trainer.save_checkpoint(path, options_.save_weights_only());
  last_global_step_saved_ = trainer.global_step();
  last_checkpoint_saved_ = path;
  if (!trainer.is_global_zero()) return;
  for (const auto& logger : trainer.loggers()) logger->after_save_checkpoint(*this);
}

void ModelCheckpoint::save_top_k(Trainer& trainer, const Metrics& metrics) {
  if (options_.save_top_k() == 0) return;
  options_.monitor() ? save_monitored(trainer, metrics) : save_latest(trainer, metrics);
}

void ModelCheckpoint::save_latest(Trainer& trainer, const Metrics& metrics) {
  // The state in the file names the file itself as the best.
  const std::string previous =
      std::exchange(best_model_path_, free_path(trainer, metrics, std::nullopt, best_model_path_));
  save(trainer, best_model_path_);
  if (options_.save_top_k() == 1) remove(trainer, previous, best_model_path_);
}

void ModelCheckpoint::save_monitored(Trainer& trainer, const Metrics& metrics) {
  const std::string& monitor = *options_.monitor();
  const auto metric = metrics.find(monitor);
  if (metric == metrics.end()) {
    std::vector<std::string> names;
    for (const auto& one : metrics) names.push_back(one.first);
    const std::string message = str("ModelCheckpoint got no metric \"", monitor, "\" to monitor.",
                                    did_you_mean(monitor, names), " Logged so far: ", join(names),
                                    ". Log it with log(\"", monitor, "\", value) in the module.");
    if (validated_) throw MisconfigurationError(message);
    warn_once(message);
    return;
  }
  const double current = real(metric->second);
  if (check_monitor_top_k(trainer, current)) return save_best(trainer, metrics, current);
  if (options_.verbose()) {
    info(str("Epoch ", whole(metrics.at("epoch")), ", global step ", whole(metrics.at("step")),
             ": '", monitor, "' was not in top ", options_.save_top_k()));
  }
}

bool ModelCheckpoint::check_monitor_top_k(Trainer& trainer, std::optional<double> current) const {
  if (!current) return false;
  if (options_.save_top_k() == -1) return true;
  if (static_cast<int64_t>(best_k_models_.size()) < options_.save_top_k()) return true;
  const auto kth = std::find_if(best_k_models_.begin(), best_k_models_.end(),
                                [this](const auto& m) { return m.first == kth_best_model_path_; });
  const double limit = kth == best_k_models_.end() ? kth_value_ : kth->second;
  const bool better = options_.mode() == "min" ? *current < limit : *current > limit;
  return trainer.strategy().reduce_all(better);
}

void ModelCheckpoint::save_best(Trainer& trainer, const Metrics& metrics, double current) {
  const size_t k = options_.save_top_k() == -1 ? best_k_models_.size() + 1
                                               : static_cast<size_t>(options_.save_top_k());
  std::string replaced;
  const auto entry = [this](const std::string& path) {
    return std::find_if(best_k_models_.begin(), best_k_models_.end(),
                        [&path](const auto& model) { return model.first == path; });
  };
  if (best_k_models_.size() == k) {
    replaced = kth_best_model_path_;
    if (entry(replaced) != best_k_models_.end()) best_k_models_.erase(entry(replaced));
  }
  if (std::isnan(current)) {  // counts as the worst there is, so that a number replaces it
    current = std::numeric_limits<double>::infinity() * (options_.mode() == "min" ? 1 : -1);
  }
  const std::string path = free_path(trainer, metrics, std::nullopt, replaced);
  current_score_ = current;
  if (entry(path) != best_k_models_.end()) {
    entry(path)->second = current;
  } else {
    best_k_models_.emplace_back(path, current);
  }
  rank(k);
  if (options_.verbose()) {
    info(str("Epoch ", whole(metrics.at("epoch")), ", global step ", whole(metrics.at("step")),
             ": '", *options_.monitor(), "' reached ", five(current), " (best ",
             five(*best_model_score_), "), saving model to '", path, "' as top ", k));
  }
  save(trainer, path);
  remove(trainer, replaced, path);
}

// The first of equals is the worst, and the best.
void ModelCheckpoint::rank(size_t k) {
  const auto less = [](const auto& a, const auto& b) { return a.second < b.second; };
  const auto greater = [](const auto& a, const auto& b) { return a.second > b.second; };
  const bool min = options_.mode() == "min";
  const auto first = best_k_models_.begin(), end = best_k_models_.end();
  if (best_k_models_.size() == k) {
    const auto worst =
        min ? std::min_element(first, end, greater) : std::min_element(first, end, less);
    std::tie(kth_best_model_path_, kth_value_) = *worst;
  }
  const auto best =
      min ? std::min_element(first, end, less) : std::min_element(first, end, greater);
  best_model_path_ = best->first;
  best_model_score_ = best->second;
}

void ModelCheckpoint::save_last(Trainer& trainer, const Metrics& metrics) {
  if (!saves_last()) return;
  const std::string path =
      free_path(trainer, metrics, options_.checkpoint_name_last(), last_model_path_);
  // The state in the file names the file itself as the last.
  const std::string previous = std::exchange(last_model_path_, path);
  if (links_last() && !last_checkpoint_saved_.empty() && options_.save_top_k() != 0) {
    link(trainer, last_checkpoint_saved_, path);
  } else {
    save(trainer, path);
  }
  remove(trainer, previous, path);
}

void ModelCheckpoint::link(Trainer& trainer, const std::string& path,
                           const std::string& link) const {
  const fs::path target = absolute(path), place = absolute(link);
  if (trainer.is_global_zero() && target != place) {
    std::error_code refused;
    fs::is_symlink(fs::symlink_status(place, refused))
        ? static_cast<void>(fs::remove(place))
        : trainer.strategy().checkpoint_io().remove(place.string());
    fs::create_symlink(target.lexically_relative(place.parent_path()), place, refused);
    // Some file systems have no links.
    if (refused) fs::copy(target, place, fs::copy_options::recursive);
  }
  trainer.strategy().barrier("ModelCheckpoint.link");
}

// Deletes a checkpoint that another took the place of, unless it is that one, lies elsewhere, or is
// what this run resumed from.
void ModelCheckpoint::remove(Trainer& trainer, const std::string& previous,
                             const std::string& current) const {
  if (previous.empty() || previous == current) return;
  const fs::path file = absolute(previous);
  if (!trainer.ckpt_path().empty() && file == absolute(trainer.ckpt_path())) return;
  const fs::path within = file.lexically_relative(absolute(*dirpath_));
  if (within.empty() || within == "." || *within.begin() == "..") return;
  trainer.strategy().remove_checkpoint(previous);
}

void ModelCheckpoint::to_yaml(const std::optional<std::string>& path) const {
  if (!path && !dirpath_) {
    throw MisconfigurationError(
        "ModelCheckpoint::to_yaml got no path, and no folder is known before fit. Give a path.");
  }
  Json scores = Json::object();
  for (const auto& [model, score] : best_k_models_) {
    if (std::isfinite(score)) {
      scores[model] = score;
    } else {  // JSON has no word for these
      scores[model] = std::isnan(score) ? ".nan" : score > 0 ? ".inf" : "-.inf";
    }
  }
  write_file(path ? *path : (fs::path(*dirpath_) / "best_k_models.yaml").string(),
             lightning::to_yaml(scores));
}

// ---- State --------------------------------------------------------------------------------------

State ModelCheckpoint::state_dict() const {
  State scores = State::dict();
  for (const auto& [path, score] : best_k_models_) scores[path] = score_state(score);
  const auto text = [](const std::optional<std::string>& word) {
    return word ? State(*word) : State();
  };
  return State::dict({{"monitor", text(options_.monitor())},
                      {"best_model_score", score_state(best_model_score_)},
                      {"best_model_path", best_model_path_},
                      {"current_score", score_state(current_score_)},
                      {"dirpath", text(dirpath_)},
                      {"best_k_models", scores},
                      {"kth_best_model_path", kth_best_model_path_},
                      {"kth_value", score_state(kth_value_)},
                      {"last_model_path", last_model_path_}});
}

void ModelCheckpoint::load_state_dict(const State& state) {
  const State* dirpath = state.find("dirpath");
  const bool same =
      dirpath == nullptr ||
      (dirpath->is_none() ? !dirpath_ : dirpath_ && dirpath->as_string() == *dirpath_);
  best_model_path_ = state.at("best_model_path").as_string();
  if (!same) {
    warn(str("The dirpath has changed from ",
             dirpath->is_none() ? "none" : "\"" + dirpath->as_string() + "\"", " to \"",
             dirpath_.value_or("none"),
             "\", therefore best_model_score, kth_best_model_path, kth_value, last_model_path and "
             "best_k_models won't be reloaded. Only best_model_path will be reloaded."));
    return;
  }
  best_model_score_ = score_of(state.at("best_model_score"));
  if (const auto* path = state.find("kth_best_model_path")) {
    kth_best_model_path_ = path->as_string();
  }
  if (const auto* value = state.find("kth_value")) kth_value_ = value->as_double();
  if (const auto* path = state.find("last_model_path")) last_model_path_ = path->as_string();
  if (const auto* scores = state.find("best_k_models")) {
    best_k_models_.clear();
    for (const auto& [path, score] : scores->as_dict()) {
      best_k_models_.emplace_back(std::get<std::string>(path), score.as_double());
    }
  }
}

std::string ModelCheckpoint::state_key() const {
  const Json monitor = options_.monitor() ? Json(*options_.monitor()) : Json();
  return str(class_name(typeid(*this)), "{'monitor': ", python_repr(monitor), ", 'mode': '",
             options_.mode(), "', 'every_n_train_steps': ", every_n_train_steps_,
             ", 'every_n_epochs': ", every_n_epochs_, ", 'train_time_interval': ",
             train_time_interval_ ? python_timedelta(*train_time_interval_) : "None", "}");
}

}  // namespace lightning
