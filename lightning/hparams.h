// Hyper-parameters on their way to loggers and to `hparams.yaml`.
// Source: Lightning 2.6, `_log_hyperparams`, `_flatten_dict`, `_sanitize_params`, `core/saving.py`.
#pragma once

#include <string>

#include "lightning/options.h"

namespace lightning {

// One flat map of numbers, bools and strings, as a logger's table wants it. Nested maps, and lists
// of maps by their index, become "optimizer/lr" and "layers/0/width"; what else is no number, bool
// or string becomes Python's text for it ("[1, 2]", "None"). An empty map or list leaves nothing.
Json sanitize_hparams(const Json& hparams);

// The module's, then the data module's; either may be null. "_class_path", with which the command
// line rebuilds a module, is left out.
// Errors: MisconfigurationError for a key that both have with different values (1 and 1.0 differ),
// with the key and both values.
Json merge_hparams(const Json& module, const Json& datamodule);

// Writes the map as Python's `yaml.dump` does, byte for byte: keys sorted, lists as blocks, text
// that would read as another type in quotes. The file is replaced at once.
// Errors: MisconfigurationError for what is not a map; std::runtime_error with path and reason.
void save_hparams_to_yaml(const std::string& path, const Json& hparams);

// Reads what either side wrote; an empty file is an empty map.
// Errors: MisconfigurationError for a missing file, bad YAML (with its line), or no map.
Json load_hparams_from_yaml(const std::string& path);

}  // namespace lightning
