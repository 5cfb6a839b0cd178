#include "lightning/escaped.h"

#include <cstdint>
#include <cstdio>

namespace lightning {
namespace {

// The length of the UTF-8 character at `at` and its number; 0 for bytes that are none.
size_t decode(std::string_view text, size_t at, uint32_t& code) {
  const auto byte = [&](size_t i) { return static_cast<unsigned char>(text[at + i]); };
  const unsigned char first = byte(0);
  if (first < 0x80) {
    code = first;
    return 1;
  }
  const size_t length = first >= 0xf0 ? 4 : first >= 0xe0 ? 3 : first >= 0xc0 ? 2 : 0;
  if (length == 0 || first > 0xf4 || at + length > text.size()) return 0;
  code = first & (0x7fU >> length);
  for (size_t i = 1; i < length; ++i) {
    if ((byte(i) & 0xc0) != 0x80) return 0;
    code = code << 6 | (byte(i) & 0x3fU);
  }
  static constexpr uint32_t kLeast[] = {0, 0, 0x80, 0x800, 0x10000};
  const bool is_surrogate = code >= 0xd800 && code < 0xe000;
  return code < kLeast[length] || code > 0x10ffff || is_surrogate ? 0 : length;
}

bool is_unsafe(uint32_t code) {
  const auto between = [&](uint32_t first, uint32_t last) { return code >= first && code <= last; };
  return code < 0x20 || between(0x7f, 0x9f) || code == 0xad ||  // controls, the soft hyphen
         code == 0x61c || between(0x200b, 0x200f) ||            // without width, direction
         between(0x2028, 0x202e) || between(0x2060, 0x206f) ||  // lines, direction, invisible
         code == 0xfeff || between(0xfff9, 0xfffb) || between(0xe0000, 0xe007f);
}

std::string formatted(const char* format, uint32_t value) {
  char text[16];
  std::snprintf(text, sizeof(text), format, value);
  return text;
}

std::string escaped_but(std::string_view text, std::string_view kept) {
  std::string out;
  out.reserve(text.size());
  for (size_t at = 0; at < text.size();) {
    uint32_t code = 0;
    const size_t length = decode(text, at, code);
    if (length == 0) {
      out += formatted("\\x%02x", static_cast<unsigned char>(text[at++]));
      continue;
    }
    if (!is_unsafe(code) || kept.find(text[at]) != kept.npos) {
      out += text.substr(at, length);
    } else if (code == '\n' || code == '\t' || code == '\r') {
      out += code == '\n' ? "\\n" : code == '\t' ? "\\t" : "\\r";
    } else {
      out += formatted(code < 0x100 ? "\\x%02x" : code < 0x10000 ? "\\u%04x" : "\\U%08x", code);
    }
    at += length;
  }
  return out;
}

}  // namespace

std::string escaped(std::string_view text) { return escaped_but(text, ""); }

std::string escaped_lines(std::string_view text) { return escaped_but(text, "\n\t"); }

}  // namespace lightning
