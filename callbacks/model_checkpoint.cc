#include "callbacks/model_checkpoint.h"

#include <ATen/ops/scalar_tensor.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <filesystem>
#include <limits>
#include <nlohmann/json.hpp>

#include "lightning/checkpoint/async_io.h"
#include "lightning/checkpoint/atomic_file.h"
#include "lightning/checkpoint/state.h"
#include "lightning/checkpoint/unfinished_folder.h"
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
  books_.kth_value = std::numeric_limits<double>::infinity() * (o.mode() == "min" ? 1 : -1);
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
  if (trainer.is_global_zero()) {
    AtomicFile::remove_unfinished(*dirpath_);
    remove_unfinished_folders(*dirpath_);
  }
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
  if (options_.monitor()) {
    // A metric of validation is not there yet, or is that of the validation before.
    const bool missing = monitor_candidates(trainer).count(*options_.monitor()) == 0;
    const bool stale = options_.wait_for_validation()
                           ? validation_follows(trainer)
                           : module.automatic_optimization() &&
                                 !saves_on_train_epoch_end(trainer) && trainer.is_last_batch() &&
                                 validates_in_epoch(trainer);
    if (missing || stale) {
      save_after_validation_ = true;
      return;
    }
  }
  if (!skips(trainer)) save_all(trainer);
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

bool ModelCheckpoint::validates_in_epoch(const Trainer& trainer) const {
  if (!trainer.enable_validation()) return false;
  bool any = false;
  for (const auto& count : trainer.num_val_batches()) any = any || !count || *count > 0;
  const int64_t every = trainer.check_val_every_n_epoch();
  return any && (every == 0 || (trainer.current_epoch() + 1) % every == 0);
}

// After the batch that ends. A validation that goes by the clock is not foreseen.
bool ModelCheckpoint::validation_follows(const Trainer& trainer) const {
  if (!validates_in_epoch(trainer)) return false;
  const auto every = trainer.val_check_batch();
  if (!every) return trainer.is_last_batch() && trainer.val_check_interval_is_epoch();
  int64_t batches = trainer.batch_idx() + 1;
  if (trainer.check_val_every_n_epoch() == 0) {  // counted over all epochs
    batches += trainer.current_epoch() * trainer.num_training_batches().value_or(0);
  }
  return batches % *every == 0;
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
  if (skips(trainer)) return;
  const bool at_epoch_end = saves_on_train_epoch_end(trainer);
  if (save_after_validation_ && (options_.wait_for_validation() || !at_epoch_end)) {
    save_all(trainer);
    save_after_validation_ = false;
  } else if (!at_epoch_end) {
    save_after_epoch(trainer);
  }
}

void ModelCheckpoint::save_all(Trainer& trainer) {
  const Metrics metrics = monitor_candidates(trainer);
  save_top_k(trainer, metrics);
  save_last(trainer, metrics);
  remove_replaced(trainer);
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
  remove_replaced(trainer);
}

void ModelCheckpoint::on_train_end(Trainer& trainer, LightningModule&) {
  if (saves_last() && last_checkpoint_saved_.empty() && !trainer.fast_dev_run()) {
    save_last(trainer, monitor_candidates(trainer));
    remove_replaced(trainer);
  }
}

// SIGTERM is the end of a run that did nothing wrong: who stops it, or the scheduler that takes the
// machine away, means it to go on some time.
bool ModelCheckpoint::saves_on_sigterm(Trainer& trainer) const {
  if (trainer.state_fn() != Stage::kFit || (options_.save_top_k() == 0 && !saves_last())) {
    return false;
  }
  // One of several saves the state for all.
  for (const auto* other : trainer.callbacks_of<ModelCheckpoint>()) {
    if (other == this) break;
    if (other->last_global_step_saved_ == trainer.global_step() &&
        other->options_.save_weights_only() <= options_.save_weights_only()) {
      return false;
    }
  }
  return true;
}

void ModelCheckpoint::on_exception(Trainer& trainer, LightningModule&,
                                   const std::exception& exception) {
  settle(trainer);
  const bool sigterm = dynamic_cast<const SIGTERMException*>(&exception) != nullptr;
  if (trainer.fast_dev_run() || trainer.sanity_checking() ||
      last_global_step_saved_ == trainer.global_step() ||
      !(options_.save_on_exception() || (sigterm && saves_on_sigterm(trainer)))) {
    return;
  }
  const Metrics metrics = monitor_candidates(trainer);
  std::string path;
  if (options_.save_on_exception() || (options_.monitor() && options_.save_top_k() != 0)) {
    path = format_checkpoint_name(metrics);
    save(trainer, path, books_);
  } else {
    save_top_k(trainer, metrics);
  }
  save_last(trainer, metrics);
  remove_replaced(trainer);
  info(str("Saved the checkpoint ", path.empty() ? last_checkpoint_saved_ : path, " because of ",
           class_name(typeid(exception)), ": ", exception.what()));
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
  bool here = false;
  if (trainer.is_global_zero()) {
    auto* background = dynamic_cast<AsyncCheckpointIO*>(&trainer.strategy().checkpoint_io());
    const auto coming = background != nullptr ? background->will_exist(path) : std::nullopt;
    std::error_code ignored;
    here = coming.value_or(fs::exists(path, ignored));
  }
  return trainer.strategy().reduce_any(here);
}

std::set<std::string> ModelCheckpoint::files(Trainer& trainer, bool last) const {
  std::set<std::string> found;
  std::error_code ignored;
  for (const auto& entry : fs::directory_iterator(resolve_dirpath(trainer), ignored)) {
    const auto& path = entry.path();
    if (path.extension() == kFileExtension &&
        (path.stem().string().rfind(options_.checkpoint_name_last(), 0) == 0) == last) {
      found.insert(path.lexically_normal().string());
    }
  }
  return found;
}

std::set<std::string> ModelCheckpoint::last_checkpoints(Trainer& trainer) const {
  return files(trainer, true);
}

std::set<std::string> ModelCheckpoint::other_checkpoints(Trainer& trainer) const {
  return files(trainer, false);
}

// ---- Saving -------------------------------------------------------------------------------------

void ModelCheckpoint::save(Trainer& trainer, const std::string& path, const Books& before) {
  try {
    trainer.save_checkpoint(path, options_.save_weights_only());
  } catch (...) {
    books_ = before;
    replaced_.clear();
    throw;
  }
  before_last_save_ = Before{before, last_global_step_saved_, last_checkpoint_saved_};
  last_global_step_saved_ = trainer.global_step();
  last_checkpoint_saved_ = path;
  if (!trainer.is_global_zero()) return;
  for (const auto& logger : trainer.loggers()) logger->after_save_checkpoint(*this);
}

// A save in the background may have failed after it was noted.
void ModelCheckpoint::settle(Trainer& trainer) {
  auto* background = dynamic_cast<AsyncCheckpointIO*>(&trainer.strategy().checkpoint_io());
  if (background == nullptr || !before_last_save_) return;
  try {
    background->teardown();
  } catch (const std::exception& error) {
    warn(str("A checkpoint was not saved: ", error.what()));
  }
  std::error_code ignored;
  if (fs::exists(last_checkpoint_saved_, ignored)) return;
  books_ = before_last_save_->books;
  last_global_step_saved_ = before_last_save_->global_step;
  last_checkpoint_saved_ = before_last_save_->path;
  before_last_save_.reset();
}

void ModelCheckpoint::save_top_k(Trainer& trainer, const Metrics& metrics) {
  if (options_.save_top_k() == 0) return;
  options_.monitor() ? save_monitored(trainer, metrics) : save_latest(trainer, metrics);
}

void ModelCheckpoint::save_latest(Trainer& trainer, const Metrics& metrics) {
  const Books before = books_;
  books_.best_model_path = free_path(trainer, metrics, std::nullopt, before.best_model_path);
  save(trainer, books_.best_model_path, before);
  if (options_.save_top_k() == 1) {
    replaced_.emplace_back(before.best_model_path, books_.best_model_path);
  }
  if (!links_last()) remove_replaced(trainer);
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
  if (static_cast<int64_t>(books_.best_k_models.size()) < options_.save_top_k()) return true;
  const auto kth =
      std::find_if(books_.best_k_models.begin(), books_.best_k_models.end(),
                   [this](const auto& m) { return m.first == books_.kth_best_model_path; });
  const double limit = kth == books_.best_k_models.end() ? books_.kth_value : kth->second;
  const bool better = options_.mode() == "min" ? *current < limit : *current > limit;
  return trainer.strategy().reduce_all(better);
}

void ModelCheckpoint::save_best(Trainer& trainer, const Metrics& metrics, double current) {
  const size_t k = options_.save_top_k() == -1 ? books_.best_k_models.size() + 1
                                               : static_cast<size_t>(options_.save_top_k());
  const Books before = books_;
  std::string replaced;
  const auto entry = [this](const std::string& path) {
    return std::find_if(books_.best_k_models.begin(), books_.best_k_models.end(),
                        [&path](const auto& model) { return model.first == path; });
  };
  if (books_.best_k_models.size() == k) {
    replaced = books_.kth_best_model_path;
    if (entry(replaced) != books_.best_k_models.end()) books_.best_k_models.erase(entry(replaced));
  }
  if (std::isnan(current)) {  // counts as the worst there is, so that a number replaces it
    current = std::numeric_limits<double>::infinity() * (options_.mode() == "min" ? 1 : -1);
  }
  const std::string path = free_path(trainer, metrics, std::nullopt, replaced);
  books_.current_score = current;
  if (entry(path) != books_.best_k_models.end()) {
    entry(path)->second = current;
  } else {
    books_.best_k_models.emplace_back(path, current);
  }
  rank(k);
  if (options_.verbose()) {
    info(str("Epoch ", whole(metrics.at("epoch")), ", global step ", whole(metrics.at("step")),
             ": '", *options_.monitor(), "' reached ", five(current), " (best ",
             five(*books_.best_model_score), "), saving model to '", path, "' as top ", k));
  }
  save(trainer, path, before);
  replaced_.emplace_back(replaced, path);
  if (!links_last()) remove_replaced(trainer);
}

// The first of equals is the worst, and the best.
void ModelCheckpoint::rank(size_t k) {
  const auto less = [](const auto& a, const auto& b) { return a.second < b.second; };
  const auto greater = [](const auto& a, const auto& b) { return a.second > b.second; };
  const bool min = options_.mode() == "min";
  const auto first = books_.best_k_models.begin(), end = books_.best_k_models.end();
  if (books_.best_k_models.size() == k) {
    const auto worst =
        min ? std::min_element(first, end, greater) : std::min_element(first, end, less);
    std::tie(books_.kth_best_model_path, books_.kth_value) = *worst;
  }
  const auto best =
      min ? std::min_element(first, end, less) : std::min_element(first, end, greater);
  books_.best_model_path = best->first;
  books_.best_model_score = best->second;
}

void ModelCheckpoint::save_last(Trainer& trainer, const Metrics& metrics) {
  if (!saves_last()) return;
  const Books before = books_;
  const std::string path =
      free_path(trainer, metrics, options_.checkpoint_name_last(), before.last_model_path);
  books_.last_model_path = path;
  if (links_last() && !last_checkpoint_saved_.empty() && options_.save_top_k() != 0) {
    try {
      link(trainer, last_checkpoint_saved_, path);
    } catch (...) {
      books_ = before;
      replaced_.clear();
      throw;
    }
  } else {
    save(trainer, path, before);
  }
  replaced_.emplace_back(before.last_model_path, path);
}

void ModelCheckpoint::link(Trainer& trainer, const std::string& path,
                           const std::string& link) const {
  const fs::path target = absolute(path), place = absolute(link);
  if (trainer.is_global_zero() && target != place) {
    trainer.strategy().checkpoint_io().link(target.string(), place.string());
  }
  trainer.strategy().barrier("ModelCheckpoint.link");
}

void ModelCheckpoint::remove_replaced(Trainer& trainer) {
  for (const auto& [previous, current] : std::exchange(replaced_, {})) {
    remove(trainer, previous, current);
  }
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
  for (const auto& [model, score] : books_.best_k_models) {
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
  for (const auto& [path, score] : books_.best_k_models) scores[path] = score_state(score);
  const auto text = [](const std::optional<std::string>& word) {
    return word ? State(*word) : State();
  };
  return State::dict({{"monitor", text(options_.monitor())},
                      {"best_model_score", score_state(books_.best_model_score)},
                      {"best_model_path", books_.best_model_path},
                      {"current_score", score_state(books_.current_score)},
                      {"dirpath", text(dirpath_)},
                      {"best_k_models", scores},
                      {"kth_best_model_path", books_.kth_best_model_path},
                      {"kth_value", score_state(books_.kth_value)},
                      {"last_model_path", books_.last_model_path}});
}

void ModelCheckpoint::load_state_dict(const State& state) {
  const State* dirpath = state.find("dirpath");
  const bool same =
      dirpath == nullptr ||
      (dirpath->is_none() ? !dirpath_ : dirpath_ && dirpath->as_string() == *dirpath_);
  books_.best_model_path = state.at("best_model_path").as_string();
  if (!same) {
    warn(str("The dirpath has changed from ",
             dirpath->is_none() ? "none" : "\"" + dirpath->as_string() + "\"", " to \"",
             dirpath_.value_or("none"),
             "\", therefore best_model_score, kth_best_model_path, kth_value, last_model_path and "
             "best_k_models won't be reloaded. Only best_model_path will be reloaded."));
    return;
  }
  books_.best_model_score = score_of(state.at("best_model_score"));
  if (const auto* path = state.find("kth_best_model_path")) {
    books_.kth_best_model_path = path->as_string();
  }
  if (const auto* value = state.find("kth_value")) books_.kth_value = value->as_double();
  if (const auto* path = state.find("last_model_path")) books_.last_model_path = path->as_string();
  if (const auto* scores = state.find("best_k_models")) {
    books_.best_k_models.clear();
    for (const auto& [path, score] : scores->as_dict()) {
      books_.best_k_models.emplace_back(to_string(path), score.as_double());
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
