#include "callbacks/progress_bar.h"

#include <algorithm>
#include <stdexcept>

#include "lightning/errors.h"
#include "lightning/log.h"
#include "lightning/logger.h"
#include "lightning/terminal.h"
#include "lightning/trainer.h"

namespace lightning {
namespace {

bool is_number(const std::string& text) {
  return !text.empty() && text.size() < 18 &&
         text.find_first_not_of("0123456789") == std::string::npos;
}

// "version_3" is what folders are called; the version is 3.
std::string version_of(const Logger& logger) {
  const std::string version = logger.version();
  const std::string prefix = "version_";
  const bool counted =
      version.compare(0, prefix.size(), prefix) == 0 && is_number(version.substr(prefix.size()));
  return counted ? version.substr(prefix.size()) : version;
}

std::vector<std::string> versions(const Trainer& trainer) {
  std::vector<std::string> different;
  for (const auto& logger : trainer.loggers()) {
    const std::string version = version_of(*logger);
    if (std::find(different.begin(), different.end(), version) == different.end()) {
      different.push_back(version);
    }
  }
  return different;
}

}  // namespace

ProgressMetrics ProgressBar::get_metrics(Trainer& trainer, LightningModule&) {
  ProgressMetrics metrics;
  const std::string version = join(versions(trainer), "_");
  if (is_number(version)) {
    metrics.emplace_back("v_num", static_cast<int64_t>(std::stoll(version)));
  } else if (!version.empty()) {
    metrics.emplace_back("v_num",
                         version.substr(version.size() - std::min<size_t>(4, version.size())));
  }
  for (const auto& [name, value] : trainer.progress_bar_metrics()) {
    const double number = value.template item<double>();
    if (name == "v_num" && !metrics.empty()) {
      warn_once(
          "The progress bar shows the logger's version as v_num, and log(\"v_num\", ...) with "
          "prog_bar(true) writes over it. Give the metric another name, or override get_metrics() "
          "of the progress bar.");
      metrics[0].second = number;
      continue;
    }
    metrics.emplace_back(name, number);
  }
  return metrics;
}

std::optional<int64_t> ProgressBar::total_train_batches() const {
  std::optional<int64_t> batches = trainer().num_training_batches();
  if (trainer().max_epochs() == -1 && trainer().max_steps() > 0) {
    const int64_t steps_left = trainer().max_steps() - trainer().global_step();
    batches = std::min(batches.value_or(steps_left), steps_left);
  }
  return batches;
}

std::optional<int64_t> ProgressBar::total_val_batches_current_dataloader() const {
  return of_current_dataloader(trainer().sanity_checking() ? trainer().num_sanity_val_batches()
                                                           : trainer().num_val_batches());
}

std::optional<int64_t> ProgressBar::total_test_batches_current_dataloader() const {
  return of_current_dataloader(trainer().num_test_batches());
}

std::optional<int64_t> ProgressBar::total_predict_batches_current_dataloader() const {
  return of_current_dataloader(trainer().num_predict_batches());
}

std::optional<int64_t> ProgressBar::of_current_dataloader(
    const std::vector<std::optional<int64_t>>& batches) const {
  const auto index = static_cast<size_t>(dataloader_idx_.value_or(0));
  return index < batches.size() ? batches[index] : std::nullopt;
}

void ProgressBar::setup(Trainer& trainer, LightningModule&, Stage) {
  trainer_ = &trainer;
  if (!trainer.is_global_zero()) disable();
}

void ProgressBar::print_line(const std::string& line) { standard_output()->write(line + "\n"); }

Trainer& ProgressBar::trainer() const {
  if (trainer_ == nullptr) {
    throw std::logic_error(
        "A progress bar was asked about its trainer before setup() gave it one. An override of "
        "setup() must call ProgressBar::setup().");
  }
  return *trainer_;
}

bool ProgressBar::has_dataloader_changed(int64_t dataloader_idx) {
  const bool changed = dataloader_idx_ != dataloader_idx;
  dataloader_idx_ = dataloader_idx;
  return changed;
}

}  // namespace lightning
