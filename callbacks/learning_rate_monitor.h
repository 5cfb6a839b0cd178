// Logs the learning rate of every parameter group, by its schedule's interval.
//
// Names: "lr-SGD"; "lr-SGD-1" for the second optimizer of a class; "/pg1", "/pg2" after it where an
// optimizer has several groups; the name of its LRSchedulerConfig instead where that has one. With
// "-momentum" and "-weight_decay" behind it for those. The values are callback metrics too.
//
// Registered as "LearningRateMonitor". Logs on rank 0.
// Source: Lightning 2.6, `LearningRateMonitor`.
#pragma once

#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "lightning/callback.h"
#include "lightning/options.h"

namespace lightning {

struct LearningRateMonitorOptions : Options<LearningRateMonitorOptions> {
  OPTION(std::optional<std::string>, logging_interval, std::nullopt,
         "step or epoch; where not given each schedule's own interval.");
  OPTION(bool, log_momentum, false, "Logs momentum too, or the first beta.");
  OPTION(bool, log_weight_decay, false, "Logs weight decay too.");
};

class LearningRateMonitor : public Callback {
 public:
  // Errors: MisconfigurationError for another interval; at the start of training without a logger.
  explicit LearningRateMonitor(LearningRateMonitorOptions options = {});

  // All learning rates logged so far, by name.
  const std::map<std::string, std::vector<double>>& lrs() const { return lrs_; }
  const std::map<std::string, double>& last_momentum_values() const { return momenta_; }
  const std::map<std::string, double>& last_weight_decay_values() const { return decays_; }

  void on_train_start(Trainer& trainer, LightningModule& module) override;
  void on_train_batch_start(Trainer& trainer, LightningModule& module, const Batch& batch,
                            int64_t batch_idx) override;
  void on_train_epoch_start(Trainer& trainer, LightningModule& module) override;

 private:
  using Row = std::vector<std::pair<std::string, double>>;
  // An optimizer, the name it is logged under, and the interval of its schedule.
  struct Watched {
    torch::optim::Optimizer* optimizer;
    std::string name;
    std::optional<std::string> interval;
  };

  static std::vector<Watched> watched(Trainer& trainer);
  void log(Trainer& trainer, const char* interval);
  void add(const Watched& one, Row& row);

  LearningRateMonitorOptions options_;
  std::map<std::string, std::vector<double>> lrs_;
  std::map<std::string, double> momenta_;
  std::map<std::string, double> decays_;
};

}  // namespace lightning
