#include "callbacks/early_stopping.h"

#include <ATen/ops/scalar_tensor.h>

#include <cmath>
#include <cstdio>
#include <limits>
#include <nlohmann/json.hpp>

#include "lightning/checkpoint/state.h"
#include "lightning/errors.h"
#include "lightning/log.h"
#include "lightning/python_text.h"
#include "lightning/registry.h"
#include "lightning/strategy.h"
#include "lightning/trainer.h"

namespace lightning {
namespace {

const Registration<Callback> kEarlyStopping{
    "EarlyStopping", "Ends fit when a metric stops getting better.",
    [](const EarlyStoppingOptions& options) { return std::make_unique<EarlyStopping>(options); }};

EarlyStoppingOptions checked(EarlyStoppingOptions options) {
  if (options.monitor().empty()) {
    throw MisconfigurationError(
        "EarlyStopping got no monitor, expected the name of a logged metric. Write "
        "EarlyStoppingOptions(\"val_loss\").");
  }
  if (options.mode() != "min" && options.mode() != "max") {
    throw MisconfigurationError(str("EarlyStopping got mode \"", options.mode(),
                                    "\", expected \"min\" (less is better) or \"max\".",
                                    did_you_mean(options.mode(), {"min", "max"})));
  }
  if (options.patience() < 1) {
    throw MisconfigurationError(str("EarlyStopping got patience ", options.patience(),
                                    ", expected at least 1. To end the run at the first check "
                                    "without improvement write patience(1)."));
  }
  if (!(options.min_delta() >= 0)) {
    throw MisconfigurationError(str("EarlyStopping got min_delta ", options.min_delta(),
                                    ", expected zero or more. Give the size of the change; its "
                                    "direction follows from mode."));
  }
  return options;
}

std::string fixed(double value) {
  if (!std::isfinite(value)) return python_repr(value);
  char text[64];
  std::snprintf(text, sizeof(text), "%.3f", value);
  return text;
}

}  // namespace

EarlyStopping::EarlyStopping(EarlyStoppingOptions options)
    : options_(checked(std::move(options))),
      check_on_train_epoch_end_(options_.check_on_train_epoch_end()),
      best_score_(options_.mode() == "min" ? std::numeric_limits<double>::infinity()
                                           : -std::numeric_limits<double>::infinity()) {}

void EarlyStopping::setup(Trainer& trainer, LightningModule&, Stage) {
  // Where validation runs several times in an epoch, or not in each, it is validation that counts.
  if (!check_on_train_epoch_end_) {
    check_on_train_epoch_end_ =
        trainer.val_check_interval_is_epoch() && trainer.check_val_every_n_epoch() == 1;
  }
}

void EarlyStopping::on_train_epoch_end(Trainer& trainer, LightningModule&) {
  if (*check_on_train_epoch_end_ && applies(trainer)) check(trainer);
}

void EarlyStopping::on_validation_end(Trainer& trainer, LightningModule&) {
  if (!*check_on_train_epoch_end_ && applies(trainer)) check(trainer);
}

bool EarlyStopping::applies(const Trainer& trainer) const {
  return trainer.state_fn() == Stage::kFit && !trainer.sanity_checking() && !trainer.fast_dev_run();
}

void EarlyStopping::check(Trainer& trainer) {
  const auto& metrics = trainer.callback_metrics();
  const auto metric = metrics.find(options_.monitor());
  if (metric == metrics.end()) {
    std::vector<std::string> names;
    for (const auto& one : metrics) names.push_back(one.first);
    const std::string message = str("EarlyStopping got no metric \"", options_.monitor(),
                                    "\" to watch.", did_you_mean(options_.monitor(), names),
                                    names.empty() ? std::string(" Nothing was logged so far.")
                                                  : " Logged so far: " + join(names) + ".",
                                    " Log it with log(\"", options_.monitor(),
                                    "\", value) before the check, or write strict(false).");
    if (options_.strict()) throw std::runtime_error(message);
    if (options_.verbose()) warn(message);
    return;
  }

  single_ = metric->second.scalar_type() != at::kDouble;
  const Verdict verdict = judge(metric->second.item<double>());
  if (trainer.strategy().reduce_any(verdict.stop)) {
    trainer.set_should_stop(true);
    stopped_epoch_ = trainer.current_epoch();
    stopping_reason_message_ = verdict.message;
  }
  if (!verdict.message.empty() && options_.verbose()) say(trainer, verdict.message);
}

EarlyStopping::Verdict EarlyStopping::judge(double current) {
  const auto& o = options_;
  const auto compared = [&](const char* what, double threshold) {
    return str(what, " threshold reached: ", o.monitor(), " = ", python_repr(current),
               o.mode() == "min" ? " < " : " > ", python_repr(threshold),
               ". Signaling Trainer to stop.");
  };
  if (o.check_finite() && !std::isfinite(current)) {
    return stop(EarlyStoppingReason::kNonFiniteMetric,
                str("Monitored metric ", o.monitor(), " = ", python_repr(current),
                    " is not finite. Previous best value was ", fixed(best_score_),
                    ". Signaling Trainer to stop."));
  }
  if (o.stopping_threshold() && better(current, rounded(*o.stopping_threshold()))) {
    return stop(EarlyStoppingReason::kStoppingThreshold,
                compared("Stopping", *o.stopping_threshold()));
  }
  if (o.divergence_threshold() && better(-current, -rounded(*o.divergence_threshold()))) {
    return stop(EarlyStoppingReason::kDivergenceThreshold,
                compared("Divergence", *o.divergence_threshold()));
  }
  const double margin = rounded(o.mode() == "min" ? -o.min_delta() : o.min_delta());
  if (better(rounded(current - margin), best_score_)) {
    const Verdict verdict{false, improvement(current)};
    best_score_ = current;
    wait_count_ = 0;
    return verdict;
  }
  if (++wait_count_ < o.patience()) return {};
  return stop(EarlyStoppingReason::kPatienceExhausted,
              str("Monitored metric ", o.monitor(), " did not improve in the last ", wait_count_,
                  " records. Best score: ", fixed(best_score_), ". Signaling Trainer to stop."));
}

EarlyStopping::Verdict EarlyStopping::stop(EarlyStoppingReason reason, const std::string& message) {
  stopping_reason_ = reason;
  return {true, message};
}

std::string EarlyStopping::improvement(double current) const {
  if (!std::isfinite(best_score_)) {
    return str("Metric ", options_.monitor(), " improved. New best score: ", fixed(current));
  }
  return str("Metric ", options_.monitor(), " improved by ", fixed(std::abs(best_score_ - current)),
             " >= min_delta = ", python_repr(options_.min_delta()),
             ". New best score: ", fixed(current));
}

bool EarlyStopping::better(double value, double than) const {
  return options_.mode() == "min" ? value < than : value > than;
}

double EarlyStopping::rounded(double value) const {
  return single_ ? static_cast<double>(static_cast<float>(value)) : value;
}

void EarlyStopping::say(Trainer& trainer, const std::string& message) const {
  if (trainer.world_size() == 1) return info(message);
  const std::string line = str("[rank: ", trainer.global_rank(), "] ", message);
  if (trainer.is_global_zero()) return info(line);
  if (!options_.log_rank_zero_only()) std::fprintf(stderr, "%s\n", line.c_str());
}

State EarlyStopping::state_dict() const {
  const auto best = at::scalar_tensor(best_score_, single_ ? at::kFloat : at::kDouble);
  return State::dict(
      {{"wait_count", wait_count_},
       {"stopped_epoch", stopped_epoch_},
       {"best_score", best},
       {"patience", options_.patience()},
       {"stopping_reason", static_cast<int64_t>(stopping_reason_)},
       {"stopping_reason_message",
        stopping_reason_message_.empty() ? State() : State(stopping_reason_message_)}});
}

void EarlyStopping::load_state_dict(const State& state) {
  wait_count_ = state.at("wait_count").as_int();
  stopped_epoch_ = state.at("stopped_epoch").as_int();
  best_score_ = state.at("best_score").as_double();
  options_.patience(state.at("patience").as_int());
  // Files of Lightning 2.5 and before have no reason.
  const State* reason = state.find("stopping_reason");
  stopping_reason_ = reason == nullptr ? EarlyStoppingReason::kNotStopped
                                       : static_cast<EarlyStoppingReason>(reason->as_int());
  const State* message = state.find("stopping_reason_message");
  stopping_reason_message_ = message == nullptr || message->is_none() ? "" : message->as_string();
}

std::string EarlyStopping::state_key() const {
  return class_name(typeid(*this)) +
         python_repr(Json{{"monitor", options_.monitor()}, {"mode", options_.mode()}});
}

}  // namespace lightning
