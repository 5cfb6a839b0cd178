// Text for a terminal, from sources that nobody vouches for.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

namespace lightning::tools {

// The text with everything escaped that could steer a terminal or deceive its reader: control
// characters (also those of Unicode), marks that turn the direction of writing, line separators,
// and bytes that are no UTF-8. A name in a file cannot clear the screen or pass for another.
std::string escaped(std::string_view text);

// At most `most` bytes, ending between characters, with "..." where something was cut.
std::string shortened(const std::string& text, size_t most);

std::string bytes_text(uint64_t bytes);  // "512 B", "4.8 KiB", "1.0 GiB"
std::string count_text(uint64_t count);  // "1,234,567"
// "1 tensor", "3 tensors".
std::string counted(uint64_t count, const std::string& thing);

}  // namespace lightning::tools
