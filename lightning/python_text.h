// Numbers and values as Python prints them, for files that both sides write.
#pragma once

#include <string>

#include "lightning/options.h"

namespace lightning {

// `repr(float)`: the fewest digits that read back equal; "0.1", "1.0", "1e-05", "1e+16", "inf".
std::string python_repr(double value);

// `repr(value)`: "[1, 'a', None]", "{'lr': 0.1}". The strings ".inf", "-.inf" and ".nan", in which
// infinity travels through configuration, print as the floats they stand for.
std::string python_repr(const Json& value);

// `str(value)`: like repr, but a string prints bare.
std::string python_str(const Json& value);

// The float behind ".inf", "-.inf" or ".nan"; false for other values.
bool travelling_float(const Json& value, double& out);

}  // namespace lightning
