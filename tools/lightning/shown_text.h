// Sizes and counts as people read them, and long text cut short.
#pragma once

#include <cstdint>
#include <string>

namespace lightning::tools {

// At most `most` bytes, ending between characters, with "..." where something was cut.
std::string shortened(const std::string& text, size_t most);

std::string bytes_text(uint64_t bytes);  // "512 B", "4.8 KiB", "1.0 GiB"
std::string count_text(uint64_t count);  // "1,234,567"
// "1 tensor", "3 tensors".
std::string counted(uint64_t count, const std::string& thing);

}  // namespace lightning::tools
