// Saves checkpoints while fit runs, and keeps the best ones.
//
// Registered as "ModelCheckpoint". Rank 0 looks at the folder and tells the others; a checkpoint
// replaces another only where all ranks agree.
//
// Whenever the process is killed, the newest complete checkpoint is there, and ckpt_path="last"
// finds it. Files change in this order:
//   1. the new checkpoint appears, whole, by renaming; until then the one before is the newest
//   2. last.ckpt is replaced, by renaming: by a copy of its own, or by a link to 1
//   3. what 1 and 2 took the place of is deleted
// Between 1 and 2 last.ckpt is a step behind; "last" looks at the other files too. With the full
// copy (save_last=true) the deletion for 1 comes before 2, so that the disk need not hold four.
//
// A save that fails ends the run; the files before it stay and are still known, so a fit() after it
// goes on with them. Beyond the original: a run that SIGTERM ends saves the state it has, also
// without save_on_exception; saves wait for the validation that follows them. With
// save_on_exception a rank that alone has an error saves by itself, for the others are ended; a
// model that is in shards then cannot be saved.
// Source: Lightning 2.6, `ModelCheckpoint`.
#pragma once

#include <functional>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "lightning/checkpoint_callback.h"
#include "lightning/duration.h"
#include "lightning/options.h"
#include "lightning/python_format.h"

namespace lightning {

using SaveLast = std::variant<bool, std::string>;

struct ModelCheckpointOptions : Options<ModelCheckpointOptions> {
  OPTION(std::optional<std::string>, dirpath, std::nullopt,
         "Folder of the checkpoints. Where not given: checkpoints, in the first logger's folder or "
         "else in default_root_dir.");
  OPTION(std::optional<std::string>, filename, std::nullopt,
         "Name without extension, with metrics as {name}: \"{epoch:02d}-{val_loss:.2f}\". "
         "{epoch}-{step} where not given.");
  OPTION(std::optional<std::string>, monitor, std::nullopt,
         "The logged metric by which the best are kept. Where not given the latest is kept.");
  OPTION(bool, verbose, false, "Says so when a checkpoint is saved or is not among the best.");
  OPTION(std::optional<SaveLast>, save_last, std::nullopt,
         "true also saves each checkpoint as last.ckpt; \"link\" makes that a link to it.");
  OPTION(int64_t, save_top_k, 1, "How many of the best are kept: -1 for all, 0 for none.");
  OPTION(bool, save_on_exception, false, "Saves a checkpoint when an exception ends the run.");
  OPTION(bool, save_weights_only, false, "Leaves optimizers, schedulers and callbacks out.");
  OPTION(std::string, mode, "min", "min where less of the metric is better, max where more is.");
  OPTION(bool, auto_insert_metric_name, true, "Whether {epoch} becomes epoch=3 rather than 3.");
  OPTION(std::optional<int64_t>, every_n_train_steps, std::nullopt,
         "Saves after every n-th optimizer step; 0 for never.");
  OPTION(std::optional<Duration>, train_time_interval, std::nullopt,
         "Saves when this much time has passed since the last time: DD:HH:MM:SS, or a map.");
  OPTION(std::optional<int64_t>, every_n_epochs, std::nullopt,
         "Saves after every n-th epoch; 0 for never. 1 where nothing else says when.");
  OPTION(std::optional<bool>, save_on_train_epoch_end, std::nullopt,
         "Saves after the training epoch rather than after validation. Where not given: true when "
         "there is no validation, or one at the end of every epoch.");
  OPTION(bool, wait_for_validation, true,
         "With monitor: a checkpoint that is due at a batch after which validation runs is saved "
         "after that, with its metrics. false: as Lightning 2.6, which in the middle of an epoch "
         "goes by the metric of the validation before.");
  OPTION(bool, enable_version_counter, true,
         "Adds -v1, -v2, ... where a file is there already, rather than replace it.");
  OPTION(std::string, checkpoint_name_last, "last", "Name for save_last, a template too.");
  OPTION(std::string, checkpoint_join_char, "-", "Between the parts of a name.");
  OPTION(std::string, checkpoint_equals_char, "=", "Between a metric's name and its value.");
};

class ModelCheckpoint : public Checkpoint {
 public:
  static constexpr const char* kFileExtension = ".ckpt";
  static constexpr int64_t kStartingVersion = 1;
  // Values for the file name, and the scores of saved files in the order they were saved.
  using Metrics = std::map<std::string, Number>;
  using Scores = std::vector<std::pair<std::string, double>>;

  // Errors: MisconfigurationError for a mode, save_top_k, save_last or trigger that makes no sense,
  // for several triggers at once, for a remote folder. During the run MisconfigurationError when
  // the metric was not logged although validation ran.
  explicit ModelCheckpoint(ModelCheckpointOptions options = {});

  const ModelCheckpointOptions& options() const { return options_; }
  const std::optional<std::string>& dirpath() const { return dirpath_; }  // known from setup() on
  std::string best_model_path() const override { return books_.best_model_path; }
  std::optional<double> best_model_score() const { return books_.best_model_score; }
  std::optional<double> current_score() const { return books_.current_score; }
  const std::string& last_model_path() const { return books_.last_model_path; }
  const Scores& best_k_models() const { return books_.best_k_models; }
  const std::string& kth_best_model_path() const { return books_.kth_best_model_path; }
  double kth_value() const { return books_.kth_value; }
  int64_t every_n_epochs() const { return every_n_epochs_; }
  int64_t every_n_train_steps() const { return every_n_train_steps_; }

  // The file's path for these metrics; one that is missing counts as 0.
  //   version   adds "-v3"
  std::string format_checkpoint_name(const Metrics& metrics,
                                     const std::optional<std::string>& filename = std::nullopt,
                                     std::optional<int64_t> version = std::nullopt) const;
  // Writes path and score of the best to a file, best_k_models.yaml in dirpath where none is given.
  void to_yaml(const std::optional<std::string>& path = std::nullopt) const;
  // Whether a checkpoint of this score would be saved now. Asks all ranks.
  bool check_monitor_top_k(Trainer& trainer, std::optional<double> current) const;
  // The files last.ckpt, last-v1.ckpt, ... in its folder.
  std::set<std::string> last_checkpoints(Trainer& trainer) const override;
  // The others.
  std::set<std::string> other_checkpoints(Trainer& trainer) const override;

  // Where it reads the time; seconds that never go back.
  void set_clock(std::function<double()> clock) { clock_ = std::move(clock); }

  void setup(Trainer& trainer, LightningModule& module, Stage stage) override;
  void on_train_start(Trainer& trainer, LightningModule& module) override;
  void on_train_batch_end(Trainer& trainer, LightningModule& module, const StepOutput& output,
                          const Batch& batch, int64_t batch_idx) override;
  void on_train_epoch_end(Trainer& trainer, LightningModule& module) override;
  void on_validation_end(Trainer& trainer, LightningModule& module) override;
  void on_train_end(Trainer& trainer, LightningModule& module) override;
  void on_exception(Trainer& trainer, LightningModule& module,
                    const std::exception& exception) override;
  State state_dict() const override;
  void load_state_dict(const State& state) override;
  std::string state_key() const override;

 private:
  void check() const;
  bool saves_last() const;
  bool links_last() const;
  bool due(Trainer& trainer);
  bool validates_in_epoch(const Trainer& trainer) const;
  bool validation_follows(const Trainer& trainer) const;
  bool saves_on_train_epoch_end(const Trainer& trainer) const;
  bool skips(const Trainer& trainer) const;
  void save_all(Trainer& trainer);
  void save_after_epoch(Trainer& trainer);
  bool saves_on_sigterm(Trainer& trainer) const;
  std::set<std::string> files(Trainer& trainer, bool last) const;

  std::string resolve_dirpath(const Trainer& trainer) const;
  Metrics monitor_candidates(const Trainer& trainer) const;
  std::string formatted(std::string name, Metrics metrics) const;
  // The name for these metrics with a version that is free; `own` may be replaced.
  std::string free_path(Trainer& trainer, const Metrics& metrics,
                        const std::optional<std::string>& filename, const std::string& own) const;
  bool exists(Trainer& trainer, const std::string& path) const;

  // What is known of the files. The state in a file names that file too, so it is noted before.
  struct Books {
    Scores best_k_models;
    std::string kth_best_model_path;
    double kth_value = 0;
    std::optional<double> current_score;
    std::optional<double> best_model_score;
    std::string best_model_path;
    std::string last_model_path;
  };
  // What held before the last save, to go back to when it failed in the background.
  struct Before {
    Books books;
    int64_t global_step;
    std::string path;
  };

  //   before   the books without this file
  void save(Trainer& trainer, const std::string& path, const Books& before);
  void save_top_k(Trainer& trainer, const Metrics& metrics);
  void save_latest(Trainer& trainer, const Metrics& metrics);
  void save_monitored(Trainer& trainer, const Metrics& metrics);
  void save_best(Trainer& trainer, const Metrics& metrics, double current);
  void save_last(Trainer& trainer, const Metrics& metrics);
  void rank(size_t k);
  void link(Trainer& trainer, const std::string& path, const std::string& link) const;
  void remove(Trainer& trainer, const std::string& previous, const std::string& current) const;
  void remove_replaced(Trainer& trainer);
  void settle(Trainer& trainer);

  ModelCheckpointOptions options_;
  std::optional<std::string> dirpath_;
  int64_t every_n_train_steps_ = 0;
  int64_t every_n_epochs_ = 0;
  std::optional<Seconds> train_time_interval_;
  std::function<double()> clock_;

  int64_t last_global_step_saved_ = 0;  // nothing is saved before the first step
  std::optional<double> last_time_checked_;
  bool save_after_validation_ = false;  // a save by steps or time that waits for its metric
  bool validated_ = false;              // validation ran since fit started
  std::string last_checkpoint_saved_;

  std::optional<Before> before_last_save_;
  // The checkpoints that others took the place of, and these, until they may be deleted.
  std::vector<std::pair<std::string, std::string>> replaced_;

  Books books_;
};

}  // namespace lightning
