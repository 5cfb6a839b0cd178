// Text for a terminal, from sources that nobody vouches for.
#pragma once

#include <string>
#include <string_view>

namespace lightning {

// The text with everything escaped that could steer a terminal or deceive its reader: control
// characters (also those of Unicode), marks that turn the direction of writing, line separators,
// and bytes that are no UTF-8. A name in a file cannot clear the screen or pass for another.
std::string escaped(std::string_view text);
// As above, but lines stay lines: for messages that a name from a file may be part of.
std::string escaped_lines(std::string_view text);

}  // namespace lightning
