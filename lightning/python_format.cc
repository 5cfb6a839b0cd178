#include "lightning/python_format.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstdio>
#include <vector>

#include "lightning/errors.h"
#include "lightning/python_text.h"

namespace lightning {
namespace {

// [[fill]align][sign][z][#][0][width][grouping][.precision][type]
struct Spec {
  std::string fill = " ";
  char align = '>';
  char sign = '-';
  bool no_negative_zero = false;
  bool alternate = false;
  size_t width = 0;
  char grouping = 0;
  int precision = -1;
  char type = 0;
};

[[noreturn]] void refuse(const std::string& spec, const std::string& why) {
  throw MisconfigurationError(str("Format \"", spec, "\" ", why,
                                  ". Expected a specification as in Python, for example \".2f\" or "
                                  "\"02d\"."));
}

bool is_align(char c) { return c == '<' || c == '>' || c == '=' || c == '^'; }

// Bytes of the UTF-8 character that starts with this one.
size_t character_bytes(char first) {
  const auto byte = static_cast<unsigned char>(first);
  return byte < 0x80 ? 1 : byte < 0xE0 ? 2 : byte < 0xF0 ? 3 : 4;
}

class SpecParser {
 public:
  explicit SpecParser(const std::string& text) : text_(text) {}

  Spec parse() {
    parse_align();
    if (peek() == '+' || peek() == '-' || peek() == ' ') spec_.sign = take();
    if (accept('z')) spec_.no_negative_zero = true;
    if (accept('#')) spec_.alternate = true;
    if (peek() == '0') {
      take();
      if (!filled_) spec_.fill = "0";
      if (!aligned_) spec_.align = '=';
    }
    spec_.width = static_cast<size_t>(std::max(0, number(0)));
    if (peek() == ',' || peek() == '_') spec_.grouping = take();
    if (peek() == ',' || peek() == '_') refuse(text_, "groups digits twice");
    if (accept('.')) {
      spec_.precision = number(-1);
      if (spec_.precision < 0) refuse(text_, "has no digits after its \".\"");
    }
    if (at_ < text_.size()) spec_.type = take();
    if (at_ < text_.size()) refuse(text_, "has characters after its type");
    return spec_;
  }

 private:
  char peek() const { return at_ < text_.size() ? text_[at_] : '\0'; }
  char take() { return text_[at_++]; }
  bool accept(char c) {
    if (peek() != c) return false;
    ++at_;
    return true;
  }
  int number(int missing) {
    if (peek() < '0' || peek() > '9') return missing;
    int64_t value = 0;
    while (peek() >= '0' && peek() <= '9') {
      value = value * 10 + (take() - '0');
      if (value > 4096) refuse(text_, "asks for more than 4096 characters");
    }
    return static_cast<int>(value);
  }
  void parse_align() {
    if (text_.empty()) return;
    const size_t bytes = character_bytes(text_[0]);
    if (text_.size() > bytes && is_align(text_[bytes])) {
      spec_.fill = text_.substr(0, bytes);
      spec_.align = text_[bytes];
      at_ = bytes + 1;
      aligned_ = filled_ = true;
    } else if (is_align(text_[0])) {
      spec_.align = take();
      aligned_ = true;
    }
  }

  const std::string& text_;
  size_t at_ = 0;
  bool aligned_ = false;
  bool filled_ = false;
  Spec spec_;
};

// Digits of a number in groups, and zeros before them up to `width` characters.
std::string grouped(const std::string& digits, char separator, size_t every, size_t width) {
  std::string reversed;
  size_t count = 0;
  const auto add = [&](char digit) {
    if (count != 0 && count % every == 0) reversed += separator;
    reversed += digit;
    ++count;
  };
  for (auto digit = digits.rbegin(); digit != digits.rend(); ++digit) add(*digit);
  while (reversed.size() < width) add('0');
  return {reversed.rbegin(), reversed.rend()};
}

size_t characters(const std::string& text) {
  return static_cast<size_t>(
      std::count_if(text.begin(), text.end(), [](char c) { return (c & 0xC0) != 0x80; }));
}

// Sign, prefix, whole part and the rest ("." and what follows), filled up to the width.
std::string assemble(const Spec& spec, bool negative, const std::string& prefix,
                     const std::string& whole, const std::string& rest, size_t group) {
  std::string lead = negative ? "-" : spec.sign == '-' ? "" : std::string(1, spec.sign);
  lead += prefix;
  const size_t taken = lead.size() + rest.size();
  const bool zeros = spec.align == '=' && spec.fill == "0";
  std::string number = whole;
  if (spec.grouping != 0) {
    const size_t room = zeros && spec.width > taken ? spec.width - taken : 0;
    number = grouped(whole, spec.grouping, group, room);
  }
  number += rest;
  const size_t length = characters(lead) + characters(number);
  if (length >= spec.width) return lead + number;
  const auto pad = [&spec](size_t count) {
    std::string text;
    for (size_t i = 0; i < count; ++i) text += spec.fill;
    return text;
  };
  const size_t missing = spec.width - length;
  if (spec.align == '<') return lead + number + pad(missing);
  if (spec.align == '=') return lead + pad(missing) + number;
  if (spec.align == '^') return pad(missing / 2) + lead + number + pad(missing - missing / 2);
  return pad(missing) + lead + number;
}

std::string printed(const char* format, int precision, double value) {
  std::vector<char> text(64);
  const auto length = std::snprintf(text.data(), text.size(), format, precision, value);
  if (static_cast<size_t>(length) >= text.size()) {
    text.resize(static_cast<size_t>(length) + 1);
    std::snprintf(text.data(), text.size(), format, precision, value);
  }
  return text.data();
}

std::string upper(std::string text) {
  for (char& c : text) {
    if (c >= 'a' && c <= 'z') c = static_cast<char>(c - 'a' + 'A');
  }
  return text;
}

// No type but a precision: like "g", with one digit after the point at least.
std::string general_with_point(double value, int precision) {
  const int digits = std::max(precision, 1);
  std::string text = printed("%.*e", digits - 1, value);
  const int exponent = std::atoi(text.c_str() + text.find('e') + 1);
  if (exponent < -4 || exponent >= digits - 1) {
    std::string mantissa = text.substr(0, text.find('e'));
    if (mantissa.find('.') != std::string::npos) {
      mantissa.erase(mantissa.find_last_not_of('0') + 1);
      if (mantissa.back() == '.') mantissa.pop_back();
    }
    return mantissa + text.substr(text.find('e'));
  }
  text = printed("%.*g", digits, value);
  return text.find('.') == std::string::npos ? text + ".0" : text;
}

// The magnitude of a finite or infinite value, without its sign.
std::string magnitude(const Spec& spec, double value) {
  const bool large = spec.type == 'E' || spec.type == 'F' || spec.type == 'G';
  if (!std::isfinite(value)) {
    const std::string text = std::isnan(value) ? "nan" : "inf";
    return (large ? upper(text) : text) + (spec.type == '%' ? "%" : "");
  }
  const int precision = spec.precision < 0 ? 6 : spec.precision;
  std::string text;
  switch (spec.type) {
    case 'e':
    case 'E':
      text = printed(spec.alternate ? "%#.*e" : "%.*e", precision, value);
      break;
    case 'f':
    case 'F':
      text = printed(spec.alternate ? "%#.*f" : "%.*f", precision, value);
      break;
    case 'g':
    case 'G':
      text = printed(spec.alternate ? "%#.*g" : "%.*g", precision, value);
      break;
    case '%':
      text = printed(spec.alternate ? "%#.*f" : "%.*f", precision, value * 100) + "%";
      break;
    default:
      text = spec.precision < 0 ? python_repr(value) : general_with_point(value, spec.precision);
  }
  return large ? upper(text) : text;
}

std::string format_float(const Spec& spec, double value, const std::string& text) {
  if (spec.type != 0 && std::string("eEfFgG%").find(spec.type) == std::string::npos) {
    refuse(text, str("has the type \"", spec.type, "\", which a float does not take"));
  }
  std::string digits = magnitude(spec, std::abs(value));
  bool negative = std::signbit(value) && !std::isnan(value);
  if (spec.no_negative_zero && digits.find_first_of("123456789") == std::string::npos &&
      std::isfinite(value)) {
    negative = false;
  }
  const size_t whole = digits.find_first_not_of("0123456789");
  const size_t cut = whole == std::string::npos ? digits.size() : whole;
  if (cut == 0) {  // inf and nan are not grouped
    Spec plain = spec;
    plain.grouping = 0;
    return assemble(plain, negative, "", "", digits, 3);
  }
  return assemble(spec, negative, "", digits.substr(0, cut), digits.substr(cut), 3);
}

std::string in_base(uint64_t value, unsigned base) {
  char text[65];
  const auto end = std::to_chars(text, text + sizeof(text), value, static_cast<int>(base));
  return {text, end.ptr};
}

std::string format_int(const Spec& spec, int64_t value, const std::string& text) {
  if (spec.type != 0 && std::string("eEfFgG%").find(spec.type) != std::string::npos) {
    return format_float(spec, static_cast<double>(value), text);
  }
  if (spec.precision >= 0) refuse(text, "has a precision, which an integer does not take");
  if (spec.no_negative_zero) refuse(text, "has a \"z\", which an integer does not take");
  const bool negative = value < 0;
  const uint64_t size = negative ? ~static_cast<uint64_t>(value) + 1 : static_cast<uint64_t>(value);
  switch (spec.type) {
    case 0:
    case 'd':
      return assemble(spec, negative, "", in_base(size, 10), "", 3);
    case 'b':
    case 'o':
    case 'x':
    case 'X': {
      if (spec.grouping == ',') refuse(text, "groups by \",\", which only decimals take");
      const unsigned base = spec.type == 'b' ? 2 : spec.type == 'o' ? 8 : 16;
      std::string digits = in_base(size, base);
      if (spec.type == 'X') digits = upper(digits);
      const std::string prefix = spec.alternate ? std::string{'0', spec.type} : "";
      return assemble(spec, negative, prefix, digits, "", 4);
    }
    default:
      refuse(text, str("has the type \"", spec.type, "\", which an integer does not take"));
  }
}

}  // namespace

std::string python_format(const Number& value, const std::string& spec) {
  if (spec.empty()) {
    const auto* whole = std::get_if<int64_t>(&value);
    return whole ? std::to_string(*whole) : python_repr(std::get<double>(value));
  }
  const Spec parsed = SpecParser(spec).parse();
  if (const auto* whole = std::get_if<int64_t>(&value)) return format_int(parsed, *whole, spec);
  return format_float(parsed, std::get<double>(value), spec);
}

std::string python_format_fields(const std::string& text,
                                 const std::map<std::string, Number>& values) {
  std::string out;
  const auto refuse_template = [&text](const std::string& why) {
    throw MisconfigurationError(str("File name \"", text, "\" ", why,
                                    ". Write metrics as {name} or {name:.2f}, and a brace as {{ "
                                    "or }}."));
  };
  for (size_t i = 0; i < text.size(); ++i) {
    const char c = text[i];
    if (c == '{' || c == '}') {
      if (i + 1 < text.size() && text[i + 1] == c) {
        out += c;
        ++i;
        continue;
      }
      if (c == '}') refuse_template("has a single \"}\"");
    } else {
      out += c;
      continue;
    }
    const std::string open = "{0[";
    const size_t close = text.find(']', i);
    const size_t end = close == std::string::npos ? close : text.find('}', close);
    if (text.compare(i, open.size(), open) != 0 || end == std::string::npos) {
      refuse_template("has a \"{\" without a metric's name and \"}\" after it");
    }
    const auto value = values.find(text.substr(i + open.size(), close - i - open.size()));
    if (value == values.end()) refuse_template("names a metric that is not there");
    const std::string after = text.substr(close + 1, end - close - 1);
    if (!after.empty() && after[0] != ':') refuse_template("has \"" + after + "\" after a name");
    out += python_format(value->second, after.empty() ? "" : after.substr(1));
    i = end;
  }
  return out;
}

}  // namespace lightning
