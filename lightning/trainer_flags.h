// From a Trainer's options to checked settings and parts. Used by the Trainer alone.
#pragma once

#include <memory>
#include <optional>
#include <vector>

#include "lightning/loops/settings.h"
#include "lightning/trainer_options.h"

namespace lightning {

// The options with flags that were left at their default taken from PL_TRAINER_<FLAG> in the
// environment, as YAML: PL_TRAINER_MAX_EPOCHS=3. What the program sets wins.
// Errors: MisconfigurationError that names the variable.
// Source: Lightning 2.6, `_defaults_from_env_vars`.
TrainerOptions with_environment(TrainerOptions options);

// Every flag that needs no module and no data, checked.
// Errors: MisconfigurationError with the flag's name, what was given and what would do.
Settings check_flags(const TrainerOptions& options);

// The callbacks in the order they are called: those given, the defaults that are wanted, tuners
// first and checkpoints last.
// Errors: MisconfigurationError for two progress bars, for a part that a flag turns off, for two
// callbacks of one state key.
std::vector<std::shared_ptr<Callback>> make_callbacks(const TrainerOptions& options);
// As above for a list that has all it needs.
std::vector<std::shared_ptr<Callback>> in_order(std::vector<std::shared_ptr<Callback>> callbacks);

//   logs   whether this process does: rank 0. The others get loggers that write nothing.
std::vector<std::shared_ptr<Logger>> make_loggers(const TrainerOptions& options,
                                                  const Settings& settings, bool logs = true);

// Accelerator, devices, precision, checkpoint IO and this process's place among those of the
// run, connected to the strategy.
// Errors: MisconfigurationError for devices that do not exist, for processes that somebody else
// started in another number than the flags say.
std::shared_ptr<Strategy> make_strategy(const TrainerOptions& options);

}  // namespace lightning
