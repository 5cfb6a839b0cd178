// YAML to and from Json, as PyYAML writes and reads it.
//
// yaml-cpp follows YAML 1.2, PyYAML 1.1: "yes" is true, "1e-3" a string, "0777" octal. Files go
// both ways, so this side keeps PyYAML's rules; infinity and nan travel as ".inf", "-.inf", ".nan".
#pragma once

#include <string>

#include "lightning/options.h"

namespace lightning {

// What `yaml.dump(value)` gives, byte for byte: blocks, lines of 80, ASCII. The keys of maps are
// sorted, or in their own order.
std::string to_yaml(const Json& value, bool sort_keys = true);

// What `yaml.safe_load` gives, with Python's tuples as lists and dates as the text they are.
// Anchors and "<<" are followed. `where` names the text in errors ("hparams.yaml"). Errors:
// MisconfigurationError with line and column for bad YAML, or for a tag that is not data
// (`!!python/object`).
Json from_yaml(const std::string& text, const std::string& where);

}  // namespace lightning
