// What a model is made of: its layers with their types and sizes, and totals.
//
// Sizes of inputs and outputs are not shown: LibTorch's modules have no forward hooks, so nothing
// tells what went in and out of a layer. FLOPs are known where the model has an
// `example_input_array`; see flop_counter.h for how they are found without hooks.
// Source: Lightning 2.6, `lightning.pytorch.utilities.model_summary`.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "lightning/flop_counter.h"
#include "lightning/fwd.h"

namespace lightning {

// One row: a submodule with all that is below it.
struct LayerSummary {
  std::string name;  // "encoder.layers.0"
  std::string type;  // as Python shows it: "Linear" for torch::nn::LinearImpl
  int64_t parameters = 0;
  bool training = true;
  int64_t flops = 0;
};

struct Summary {
  std::vector<LayerSummary> layers;
  // Parameters that stand in the module itself rather than in a layer that is shown.
  int64_t leftover_parameters = 0;
  // A parameter that several layers share counts once here, and in each of these layers.
  int64_t total_parameters = 0;
  int64_t trainable_parameters = 0;
  double size_mb = 0;         // parameters at `parameter_bits`, in units of 10^6 bytes
  int64_t train_modules = 0;  // of all submodules, shown or not; the module itself is not counted
  int64_t eval_modules = 0;
  int64_t total_flops = 0;
};

//   max_depth       levels of submodules to show; -1 for all, 0 for none
//   parameter_bits  that one parameter takes, for the size in MB
//   flops           empty where they are not known; they show as 0 then, as in the original
// Undefined parameters count 0. Sharded ones count whole.
// Errors: MisconfigurationError for max_depth < -1.
Summary summarize(const torch::nn::Module& module, int64_t max_depth = 1,
                  int64_t parameter_bits = 32, const FlopCounts& flops = {});

// The class of a submodule as Python shows it: without namespaces, and without the "Impl" of
// LibTorch's module holders.
std::string layer_type(const torch::nn::Module& module);

// The table's columns, in order: a header and one cell for each row, "other params" last.
struct SummaryColumn {
  std::string header;
  std::vector<std::string> cells;
};
std::vector<SummaryColumn> summary_columns(const Summary& summary);

// The table as ModelSummary prints it; no line break at its end.
std::string format_summary(const Summary& summary);

// 123 -> "123  ", 1234 -> "1.2 K", 132000 -> "132 K", 5e15 -> "5,000 T".
std::string human_readable_count(int64_t number);
// 1234.5 -> "1,234.500".
std::string formatted_model_size(double megabytes);

}  // namespace lightning
