#include "lightning/yaml_scalar.h"

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <nlohmann/json.hpp>
#include <vector>

namespace lightning {
namespace {

bool one_of(const std::string& text, const std::vector<std::string>& words) {
  return std::find(words.begin(), words.end(), text) != words.end();
}

// Reads a scalar from left to right; each function takes what fits and says whether it did.
class Scanner {
 public:
  explicit Scanner(const std::string& text) : text_(text) {}

  bool at_end() const { return at_ == text_.size(); }
  bool any(const char* characters) {
    const bool fits = !at_end() && std::strchr(characters, text_[at_]) != nullptr;
    at_ += fits ? 1 : 0;
    return fits;
  }
  // As many as there are, at least `least`, `most` at the most.
  bool many(const char* characters, size_t least, size_t most = std::string::npos) {
    size_t count = 0;
    while (count < most && any(characters)) ++count;
    return count >= least;
  }
  bool digits(size_t least, size_t most) { return many("0123456789", least, most); }
  bool word(const char* word) {
    const size_t length = std::strlen(word);
    const bool fits = text_.compare(at_, length, word) == 0;
    at_ += fits ? length : 0;
    return fits;
  }

 private:
  const std::string& text_;
  size_t at_ = 0;
};

constexpr const char* kDigits = "0123456789";
constexpr const char* kDigitsAnd_ = "0123456789_";

bool exponent(Scanner& in) {  // optional, but whole
  return !in.any("eE") || (in.any("+-") && in.many(kDigits, 1));
}

// One or more of ":59", base 60.
bool sixties(Scanner& in, bool& found) {
  for (found = false; in.any(":"); found = true) {
    const bool high = in.any("012345");
    if (!in.any(kDigits) && !high) return false;
  }
  return true;
}

bool is_float(const std::string& text) {
  if (one_of(text, {".nan", ".NaN", ".NAN"})) return true;
  Scanner in(text);
  const bool sign = in.any("+-");
  if (in.any(".")) {
    if (in.word("inf") || in.word("Inf") || in.word("INF")) return in.at_end();
    // PyYAML's expression takes no sign before ".5".
    return !sign && in.any(kDigits) && in.many(kDigitsAnd_, 0) && exponent(in) && in.at_end();
  }
  if (!in.any(kDigits)) return false;
  in.many(kDigitsAnd_, 0);
  bool base60 = false;
  if (!sixties(in, base60) || !in.any(".")) return false;
  in.many(kDigitsAnd_, 0);
  return (base60 || exponent(in)) && in.at_end();
}

bool is_integer(const std::string& text) {
  Scanner in(text);
  in.any("+-");
  if (in.any("0")) {
    if (in.at_end()) return true;
    if (in.any("b")) return in.many("01_", 1) && in.at_end();
    if (in.any("x")) return in.many("0123456789abcdefABCDEF_", 1) && in.at_end();
    return in.many("01234567_", 1) && in.at_end();
  }
  if (!in.any("123456789")) return false;
  in.many(kDigitsAnd_, 0);
  bool base60 = false;
  return sixties(in, base60) && in.at_end();
}

bool is_timestamp(const std::string& text) {
  const auto date = [](Scanner& in, size_t least) {
    return in.digits(4, 4) && in.any("-") && in.digits(least, 2) && in.any("-") &&
           in.digits(least, 2);
  };
  Scanner day(text);
  if (date(day, 2) && day.at_end()) return true;
  Scanner in(text);
  if (!date(in, 1) || !(in.any("Tt") || in.many(" \t", 1)) || !in.digits(1, 2)) return false;
  if (!in.any(":") || !in.digits(2, 2) || !in.any(":") || !in.digits(2, 2)) return false;
  if (in.any(".")) in.many(kDigits, 0);
  if (in.at_end()) return true;
  in.many(" \t", 0);
  if (in.any("Z")) return in.at_end();
  if (!in.any("+-") || !in.digits(1, 2)) return false;
  if (in.any(":") && !in.digits(2, 2)) return false;
  return in.at_end();
}

// Text without underscores and sign.
std::string bare(const std::string& text, bool& negative) {
  std::string out;
  for (const char c : text) {
    if (c != '_') out += c;
  }
  negative = !out.empty() && out[0] == '-';
  if (!out.empty() && (out[0] == '-' || out[0] == '+')) out.erase(0, 1);
  return out;
}

double base60(const std::string& text) {
  double sum = 0;
  for (size_t begin = 0; begin <= text.size();) {
    const size_t end = std::min(text.find(':', begin), text.size());
    sum = sum * 60 + std::strtod(text.substr(begin, end - begin).c_str(), nullptr);
    begin = end + 1;
  }
  return sum;
}

Json integer(const std::string& text) {
  bool negative = false;
  const std::string digits = bare(text, negative);
  if (digits.find(':') != std::string::npos) {
    return static_cast<int64_t>(base60(digits)) * (negative ? -1 : 1);
  }
  const bool prefixed = digits.size() > 1 && digits[0] == '0';
  const int base = !prefixed ? 10 : digits[1] == 'x' ? 16 : digits[1] == 'b' ? 2 : 8;
  errno = 0;
  const auto value = std::strtoull(digits.c_str() + (base == 2 ? 2 : 0), nullptr, base);
  const bool fits = errno == 0 && (!negative || value <= uint64_t{1} << 63);
  if (!fits) return std::strtod(text.c_str(), nullptr);
  if (negative) return static_cast<int64_t>(-value);
  if (value <= uint64_t{INT64_MAX}) return static_cast<int64_t>(value);
  return static_cast<uint64_t>(value);
}

Json floating(const std::string& text) {
  bool negative = false;
  std::string digits = bare(text, negative);
  std::transform(digits.begin(), digits.end(), digits.begin(),
                 [](unsigned char c) { return static_cast<char>(std::tolower(c)); });
  if (digits == ".nan") return ".nan";
  if (digits == ".inf") return negative ? "-.inf" : ".inf";
  const double value = base60(digits);
  return negative ? -value : value;
}

}  // namespace

YamlType yaml_type(const std::string& text) {
  if (one_of(text, {"", "~", "null", "Null", "NULL"})) return YamlType::null;
  if (one_of(text, {"yes", "Yes", "YES", "no", "No", "NO", "true", "True", "TRUE", "false", "False",
                    "FALSE", "on", "On", "ON", "off", "Off", "OFF"})) {
    return YamlType::boolean;
  }
  if (text == "<<") return YamlType::merge;
  if (text == "=") return YamlType::value;
  if (is_float(text)) return YamlType::floating;
  if (is_integer(text)) return YamlType::integer;
  if (is_timestamp(text)) return YamlType::timestamp;
  return YamlType::string;
}

Json yaml_value(const std::string& text) {
  switch (yaml_type(text)) {
    case YamlType::null:
      return nullptr;
    case YamlType::boolean:
      return one_of(text, {"yes", "Yes", "YES", "true", "True", "TRUE", "on", "On", "ON"});
    case YamlType::integer:
      return integer(text);
    case YamlType::floating:
      return floating(text);
    default:
      return text;
  }
}

}  // namespace lightning
