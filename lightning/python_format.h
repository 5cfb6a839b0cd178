// Numbers by Python's format specifications, for file names such as "{epoch:02d}-{val_loss:.2f}".
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <variant>

namespace lightning {

using Number = std::variant<int64_t, double>;

// `format(value, spec)`: fill, alignment, sign, "#", "0", width, grouping, precision and type as in
// Python, except for the types "n" and "c".
// Errors: MisconfigurationError for a specification that Python refuses, with the reason.
std::string python_format(const Number& value, const std::string& spec);

// `template.format(values)` where each `{0[name]:spec}` takes a value by its name; "{{" and "}}"
// are braces. Errors: MisconfigurationError for a template that is malformed or names something
// else.
std::string python_format_fields(const std::string& text,
                                 const std::map<std::string, Number>& values);

}  // namespace lightning
