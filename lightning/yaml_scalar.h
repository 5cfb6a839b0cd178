// What a plain YAML 1.1 scalar means. Shared by the two halves of yaml.h.
#pragma once

#include <string>

#include "lightning/options.h"

namespace lightning {

enum class YamlType { string, null, boolean, integer, floating, timestamp, merge, value };

// By PyYAML's implicit resolvers.
YamlType yaml_type(const std::string& text);

// The value of a plain scalar. An integer beyond 64 bits becomes a float, a timestamp its text.
Json yaml_value(const std::string& text);

}  // namespace lightning
