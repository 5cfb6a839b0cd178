// From the loaders a user gave to the one a loop iterates: requested, fitted to the strategy and
// the flags, limited.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "lightning/data/combined_loader.h"
#include "lightning/loops/run.h"

namespace lightning {

enum class LoaderStage { kTrain, kVal, kTest, kPredict };
const char* to_string(LoaderStage stage);  // "train", "val", "test", "predict"

struct StageData {
  std::shared_ptr<CombinedLoader> loader;
  std::vector<std::optional<int64_t>> num_batches;  // of each loader; nullopt: not known
  // Whether there are several ranks, and one of them does not know its number.
  bool ranks_may_differ = false;
};

// Where a stage's loaders come from: given, the data module's hook, or the module's.
bool has_loaders(const Run& run, LoaderStage stage);

// Asks for the loaders of a stage and prepares them.
// Errors: MisconfigurationError when there are none, a limit that leaves no batch, a fraction of an
// unknown length, a sequential CombinedLoader in training.
StageData setup_stage(Run& run, LoaderStage stage);

// Batches of a loader under a limit. Errors as above.
std::optional<int64_t> limited_batches(std::optional<int64_t> length, const BatchLimit& limit,
                                       LoaderStage stage);

const BatchLimit& limit_of(const Settings& settings, LoaderStage stage);
bool is_zero(const BatchLimit& limit);

}  // namespace lightning
