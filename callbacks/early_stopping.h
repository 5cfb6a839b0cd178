// Ends fit when a metric stops getting better.
//
// Registered as "EarlyStopping". All ranks stop when any of them decides to.
// Source: Lightning 2.6, `EarlyStopping`.
#pragma once

#include <optional>
#include <string>

#include "lightning/callback.h"
#include "lightning/options.h"

namespace lightning {

struct EarlyStoppingOptions : Options<EarlyStoppingOptions> {
  EarlyStoppingOptions() = default;
  explicit EarlyStoppingOptions(std::string monitor) { this->monitor(std::move(monitor)); }

  OPTION(std::string, monitor, "", "The logged metric to watch. Must be given.");
  OPTION(double, min_delta, 0.0,
         "Smallest change that counts as an improvement, in units of the metric.");
  OPTION(int64_t, patience, 3,
         "Checks (not epochs) without improvement before the run ends. At least 1.");
  OPTION(bool, verbose, false, "Says so when the metric improves and when the run ends.");
  OPTION(std::string, mode, "min", "min where less is better, max where more is.");
  OPTION(bool, strict, true, "Whether a metric that was not logged is an error.");
  OPTION(bool, check_finite, true, "Ends the run when the metric is NaN or infinite.");
  OPTION(std::optional<double>, stopping_threshold, std::nullopt,
         "Ends the run once the metric is better than this.");
  OPTION(std::optional<double>, divergence_threshold, std::nullopt,
         "Ends the run once the metric is worse than this.");
  OPTION(std::optional<bool>, check_on_train_epoch_end, std::nullopt,
         "Checks after the training epoch rather than after validation. Where not given: true when "
         "validation runs once at the end of every epoch.");
  OPTION(bool, log_rank_zero_only, false, "Whether only rank 0 speaks.");
};

// As Python numbers them in checkpoints.
enum class EarlyStoppingReason {
  kNotStopped = 0,
  kStoppingThreshold = 1,
  kDivergenceThreshold = 2,
  kPatienceExhausted = 3,
  kNonFiniteMetric = 4,
};

class EarlyStopping : public Callback {
 public:
  // Errors: MisconfigurationError without monitor, for a mode other than "min" and "max", for
  // patience < 1 or min_delta < 0. During the run std::runtime_error when the metric was not logged
  // and `strict` is on.
  explicit EarlyStopping(EarlyStoppingOptions options);

  const EarlyStoppingOptions& options() const { return options_; }
  int64_t wait_count() const { return wait_count_; }        // checks since the last improvement
  int64_t stopped_epoch() const { return stopped_epoch_; }  // 0 where it did not stop
  double best_score() const { return best_score_; }
  int64_t patience() const { return options_.patience(); }  // a checkpoint's wins over the option
  EarlyStoppingReason stopping_reason() const { return stopping_reason_; }
  // Empty where it did not stop.
  const std::string& stopping_reason_message() const { return stopping_reason_message_; }

  void setup(Trainer& trainer, LightningModule& module, Stage stage) override;
  void on_train_epoch_end(Trainer& trainer, LightningModule& module) override;
  void on_validation_end(Trainer& trainer, LightningModule& module) override;
  State state_dict() const override;
  void load_state_dict(const State& state) override;
  std::string state_key() const override;
  CallbackRole role() const override { return CallbackRole::kMonitor; }

 private:
  struct Verdict {
    bool stop = false;
    std::string message;
  };

  bool applies(const Trainer& trainer) const;
  void check(Trainer& trainer);
  Verdict judge(double current);
  Verdict stop(EarlyStoppingReason reason, const std::string& message);
  std::string improvement(double current) const;
  bool better(double value, double than) const;
  // The value in the metric's own dtype, so that comparisons come out as in Python.
  double rounded(double value) const;
  void say(Trainer& trainer, const std::string& message) const;

  EarlyStoppingOptions options_;
  std::optional<bool> check_on_train_epoch_end_;
  bool single_ = true;  // the metric is float32
  int64_t wait_count_ = 0;
  int64_t stopped_epoch_ = 0;
  double best_score_;
  EarlyStoppingReason stopping_reason_ = EarlyStoppingReason::kNotStopped;
  std::string stopping_reason_message_;
};

}  // namespace lightning
