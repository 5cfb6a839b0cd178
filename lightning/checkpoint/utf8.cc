#include "lightning/checkpoint/utf8.h"

#include <cstdint>
#include <cstring>

namespace lightning {

size_t first_invalid_utf8(std::string_view text) {
  const auto byte = [&](size_t i) { return static_cast<uint8_t>(text[i]); };
  for (size_t i = 0; i < text.size();) {
    uint64_t eight;
    while (text.size() - i >= sizeof(eight)) {
      std::memcpy(&eight, text.data() + i, sizeof(eight));
      if ((eight & 0x8080808080808080) != 0) break;
      i += sizeof(eight);
    }
    if (i == text.size()) break;
    const auto first = byte(i);
    const size_t size = first < 0x80   ? 1
                        : first < 0xc2 ? 0
                        : first < 0xe0 ? 2
                        : first < 0xf0 ? 3
                                       : 4;
    if (size == 0 || first > 0xf4 || size > text.size() - i) return i;
    for (size_t k = 1; k < size; ++k) {
      if ((byte(i + k) & 0xc0) != 0x80) return i;
    }
    // Forms that are longer than needed, and values beyond U+10FFFF.
    if ((first == 0xe0 && byte(i + 1) < 0xa0) || (first == 0xf0 && byte(i + 1) < 0x90) ||
        (first == 0xf4 && byte(i + 1) > 0x8f)) {
      return i;
    }
    i += size;
  }
  return text.size();
}

}  // namespace lightning
