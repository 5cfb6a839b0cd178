// Prints what a model is made of when fit starts: layers with their types, parameters and modes,
// and totals.
//
//     | Name | Type       | Params | Mode  | FLOPs
//   ------------------------------------------------
//   0 | net  | Sequential | 132 K  | train | 0
//
// Registered as "ModelSummary". Printed on rank 0. FLOPs are those of one predict_forward() of the
// model's example_input_array, in eval mode; 0 where it has none. See lightning/summary.h for what
// is counted how, and why sizes of inputs and outputs are not there.
// Source: Lightning 2.6, `ModelSummary`.
#pragma once

#include <memory>
#include <string>

#include "lightning/callback.h"
#include "lightning/options.h"
#include "lightning/summary.h"
#include "lightning/terminal.h"

namespace lightning {

struct ModelSummaryOptions : Options<ModelSummaryOptions> {
  OPTION(int64_t, max_depth, 1, "Levels of submodules to show; -1 for all, 0 for no summary.");
};

class ModelSummary : public Callback {
 public:
  CallbackRole role() const override { return CallbackRole::kModelSummary; }

  // Errors: MisconfigurationError for max_depth < -1.
  explicit ModelSummary(const ModelSummaryOptions& options = {});

  int64_t max_depth() const { return max_depth_; }
  // Where it prints; stdout if not set.
  void set_output(std::shared_ptr<Output> output) { output_ = std::move(output); }

  void on_fit_start(Trainer& trainer, LightningModule& module) override;

 protected:
  // The text to print, with a line break at its end.
  virtual std::string format(const Summary& summary) const;
  const Output& output() const { return *output_; }

 private:
  int64_t max_depth_;
  std::shared_ptr<Output> output_ = standard_output();
};

}  // namespace lightning
