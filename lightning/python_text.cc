#include "lightning/python_text.h"

#include <charconv>
#include <cmath>
#include <limits>
#include <nlohmann/json.hpp>

namespace lightning {
namespace {

// Python keeps printable characters and escapes the rest. Beyond Latin-1 everything counts as
// printable here, but for the line separators.
bool printable(const std::string& text, size_t i, size_t& length) {
  const auto byte = static_cast<unsigned char>(text[i]);
  length = byte < 0x80 ? 1 : byte < 0xE0 ? 2 : byte < 0xF0 ? 3 : 4;
  if (length == 1) return byte >= 0x20 && byte != 0x7F;
  if (byte == 0xC2 && i + 1 < text.size()) {  // U+0080 to U+00BF
    const auto low = static_cast<unsigned char>(text[i + 1]);
    return low > 0xA0 && low != 0xAD;
  }
  return text.compare(i, 3, "\u2028") != 0 && text.compare(i, 3, "\u2029") != 0;
}

std::string escaped(const std::string& text, size_t i, size_t length) {
  const auto byte = static_cast<unsigned char>(text[i]);
  char out[8];
  if (length == 3) {
    std::snprintf(out, sizeof(out), "\\u20%02x", text[i + 2] == '\xA8' ? 0x28 : 0x29);
  } else {
    const auto code = length == 2 ? static_cast<unsigned char>(text[i + 1]) : byte;
    std::snprintf(out, sizeof(out), "\\x%02x", code);
  }
  return out;
}

std::string quoted(const std::string& text) {
  const bool double_quotes =
      text.find('\'') != std::string::npos && text.find('"') == std::string::npos;
  const char quote = double_quotes ? '"' : '\'';
  std::string out(1, quote);
  size_t length = 1;
  for (size_t i = 0; i < text.size(); i += length) {
    const char c = text[i];
    length = 1;
    if (c == quote || c == '\\') {
      out += {'\\', c};
    } else if (c == '\n' || c == '\r' || c == '\t') {
      out += {'\\', c == '\n' ? 'n' : c == '\r' ? 'r' : 't'};
    } else if (printable(text, i, length)) {
      out += text.substr(i, length);
    } else {
      out += escaped(text, i, length);
    }
  }
  return out + quote;
}

}  // namespace

std::string python_repr(double value) {
  if (std::isnan(value)) return "nan";
  if (std::isinf(value)) return value > 0 ? "inf" : "-inf";
  const double size = std::abs(value);
  const bool fixed = size == 0 || (size >= 1e-4 && size < 1e16);
  char buffer[40];
  const char* const end =
      std::to_chars(buffer, buffer + sizeof(buffer), value,
                    fixed ? std::chars_format::fixed : std::chars_format::scientific)
          .ptr;
  std::string text(buffer, static_cast<size_t>(end - buffer));
  if (fixed && text.find('.') == std::string::npos) text += ".0";
  return text;
}

bool travelling_float(const Json& value, double& out) {
  if (!value.is_string()) return false;
  const auto& text = value.get_ref<const std::string&>();
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  if (text == ".inf") return out = kInfinity, true;
  if (text == "-.inf") return out = -kInfinity, true;
  if (text == ".nan") return out = std::numeric_limits<double>::quiet_NaN(), true;
  return false;
}

std::string python_repr(const Json& value) {
  double number = 0;
  if (travelling_float(value, number)) return python_repr(number);
  if (value.is_string()) return quoted(value.get_ref<const std::string&>());
  if (value.is_array()) {
    std::vector<std::string> items;
    for (const auto& item : value) items.push_back(python_repr(item));
    return "[" + join(items) + "]";
  }
  if (value.is_object()) {
    std::vector<std::string> items;
    for (const auto& [key, item] : value.items()) {
      items.push_back(quoted(key) + ": " + python_repr(item));
    }
    return "{" + join(items) + "}";
  }
  if (value.is_null()) return "None";
  if (value.is_boolean()) return value.get<bool>() ? "True" : "False";
  if (value.is_number_float()) return python_repr(value.get<double>());
  return value.dump();
}

std::string python_str(const Json& value) {
  double number = 0;
  if (travelling_float(value, number)) return python_repr(number);
  return value.is_string() ? value.get<std::string>() : python_repr(value);
}

}  // namespace lightning
