// The base of progress bars: what they are told by the trainer, whatever they look like.
//
// A bar of one's own derives from this (or from LiveProgressBar, which also draws) and overrides
// the hooks it wants. Bars are silent on ranks other than 0. All of it runs on the thread that
// called fit().
// Source: Lightning 2.6, `ProgressBar`.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "callbacks/meter.h"
#include "lightning/callback.h"
#include "lightning/fwd.h"
#include "lightning/line_printer.h"

namespace lightning {

class ProgressBar : public Callback, public LinePrinter {
 public:
  CallbackRole role() const override { return CallbackRole::kProgressBar; }

  // `v_num` (the logger's version; the last four characters of one that is no number) and then
  // what was logged with prog_bar(true). Fetches values from the device, which waits for it.
  // Warns once where a logged name is `v_num`.
  virtual ProgressMetrics get_metrics(Trainer& trainer, LightningModule& module);

  // The tuner switches the bar off and on.
  virtual void disable() { enabled_ = false; }
  virtual void enable() { enabled_ = true; }
  virtual bool is_enabled() const { return enabled_; }

  virtual std::string sanity_check_description() const { return "Sanity Checking"; }
  virtual std::string train_description() const { return "Training"; }
  virtual std::string validation_description() const { return "Validation"; }
  virtual std::string test_description() const { return "Testing"; }
  virtual std::string predict_description() const { return "Predicting"; }

  // Batches of the epoch, or of the data loader that is being evaluated; nullopt: not known. They
  // may change from epoch to epoch.
  std::optional<int64_t> total_train_batches() const;
  std::optional<int64_t> total_val_batches_current_dataloader() const;
  std::optional<int64_t> total_test_batches_current_dataloader() const;
  std::optional<int64_t> total_predict_batches_current_dataloader() const;

  void setup(Trainer& trainer, LightningModule& module, Stage stage) override;
  // On stdout, with nothing in its way.
  void print_line(const std::string& line) override;

 protected:
  // Errors: std::logic_error before setup.
  Trainer& trainer() const;
  // Whether batches now come from another data loader than at the last call.
  bool has_dataloader_changed(int64_t dataloader_idx);
  void reset_dataloader_idx_tracker() { dataloader_idx_.reset(); }

 private:
  std::optional<int64_t> of_current_dataloader(
      const std::vector<std::optional<int64_t>>& batches) const;

  Trainer* trainer_ = nullptr;
  std::optional<int64_t> dataloader_idx_;
  bool enabled_ = true;
};

}  // namespace lightning
