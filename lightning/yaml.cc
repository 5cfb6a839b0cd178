#include "lightning/yaml.h"

#include <yaml-cpp/yaml.h>

#include <algorithm>
#include <nlohmann/json.hpp>
#include <vector>

#include "lightning/python_text.h"
#include "lightning/yaml_scalar.h"

namespace lightning {
namespace {

// ---- Writing ------------------------------------------------------------------------------------

constexpr size_t kWidth = 80;
constexpr size_t kIndent = 2;
// A longer key takes the form "? key". PyYAML counts the five characters of "!!str" too.
constexpr size_t kLongestSimpleKey = 122;

// A byte that does not belong to UTF-8 becomes U+FFFD.
std::u32string code_points(const std::string& text) {
  std::u32string out;
  for (size_t i = 0; i < text.size();) {
    const auto byte = static_cast<unsigned char>(text[i]);
    const size_t length = byte < 0x80   ? 1
                          : byte < 0xC2 ? 0
                          : byte < 0xE0 ? 2
                          : byte < 0xF0 ? 3
                          : byte < 0xF5 ? 4
                                        : 0;
    char32_t code = length <= 1 ? byte : byte & (0xFF >> (length + 1));
    bool good = length > 0 && i + length <= text.size();
    for (size_t k = 1; good && k < length; ++k) {
      const auto next = static_cast<unsigned char>(text[i + k]);
      good = (next & 0xC0) == 0x80;
      code = (code << 6) | (next & 0x3F);
    }
    out += good ? code : U'\uFFFD';
    i += good ? length : 1;
  }
  return out;
}

enum class Style { plain, single_quotes, double_quotes };

// Which styles keep the text what it is. Source: PyYAML 6, `Emitter.analyze_scalar`.
struct Analysis {
  bool multiline = false;
  bool plain = true;
  bool single_quotes = true;
};

bool blank(char32_t c) { return c == U' ' || c == U'\0' || c == U'\t' || c == U'\r' || c == U'\n'; }
bool in(char32_t c, const char* characters) {
  return c != 0 && c < 0x80 &&
         std::string(characters).find(static_cast<char>(c)) != std::string::npos;
}

Analysis analyze(const std::u32string& text) {
  Analysis out;
  if (text.empty()) return out;
  const auto starts = [&](const std::u32string& with) { return text.compare(0, 3, with) == 0; };
  bool indicator = starts(U"---") || starts(U"...");
  bool special = false;
  for (size_t i = 0; i < text.size(); ++i) {
    const char32_t c = text[i];
    const bool before_blank = i + 1 == text.size() || blank(text[i + 1]);
    if (i == 0) {
      indicator |= in(c, "#,[]{}&*!|>'\"%@`") || (in(c, "?:-") && before_blank);
    } else {
      indicator |= (c == U':' && before_blank) || (c == U'#' && blank(text[i - 1]));
    }
    out.multiline |= c == U'\n' || c == U'\x85' || c == U'\u2028' || c == U'\u2029';
    special |= c != U'\n' && (c < 0x20 || c > 0x7E);
    if (i > 0) {
      special |= text[i - 1] == U' ' && c == U'\n';
      out.single_quotes &= !(text[i - 1] == U'\n' && c == U' ');
    }
  }
  const auto edge = [](char32_t c) { return c == U' ' || c == U'\n'; };
  out.single_quotes &= !special;
  out.plain = out.single_quotes && !out.multiline && !indicator && !edge(text.front()) &&
              !edge(text.back());
  return out;
}

// Source of layout and line breaks: PyYAML 6, `Emitter`.
class Writer {
 public:
  explicit Writer(bool sort_keys) : sort_keys_(sort_keys) {}

  std::string run(const Json& value) {
    const bool plain = node(value, 0, false);
    new_line(0);
    return out_ + (plain ? "...\n" : "");  // PyYAML ends a bare scalar so
  }

 private:
  // True for a plain scalar. `indent` is that of the collection around; `in_map`: a map's value.
  bool node(const Json& value, size_t indent, bool in_map) {
    if (value.is_structured() && value.empty()) {
      indicator(value.is_array() ? "[]" : "{}");
    } else if (value.is_array()) {
      list(value, in_map && !indention_ ? indent : deeper(indent));
    } else if (value.is_object()) {
      map(value, deeper(indent));
    } else {
      return scalar(value, indent);
    }
    return false;
  }

  size_t deeper(size_t indent) {
    const size_t inner = root_ ? 0 : indent + kIndent;
    root_ = false;
    return inner;
  }

  void list(const Json& items, size_t indent) {
    for (const auto& item : items) {
      new_line(indent);
      indicator("-", true);
      node(item, indent, false);
    }
  }

  void map(const Json& values, size_t indent) {
    std::vector<std::string> keys;
    for (const auto& item : values.items()) keys.push_back(item.key());
    if (sort_keys_) std::sort(keys.begin(), keys.end());  // by code point, as UTF-8 is
    for (const auto& key : keys) {
      new_line(indent);
      const auto text = code_points(key);
      const bool simple =
          !text.empty() && text.size() <= kLongestSimpleKey && !analyze(text).multiline;
      if (!simple) indicator("?", true);
      string(text, key_style(key, text, simple), indent + kIndent, !simple);
      if (simple) {
        out_ += ':';
        ++column_;
        whitespace_ = indention_ = false;
      } else {
        new_line(indent);
        indicator(":", true);
      }
      node(values[key], indent, true);
    }
  }

  Style key_style(const std::string& key, const std::u32string& text, bool simple) {
    const Style style = string_style(key, text);
    return simple && style == Style::plain && text.empty() ? Style::single_quotes : style;
  }

  static Style string_style(const std::string& text, const std::u32string& points) {
    const auto analysis = analyze(points);
    if (analysis.plain && yaml_type(text) == YamlType::string) return Style::plain;
    return analysis.single_quotes ? Style::single_quotes : Style::double_quotes;
  }

  bool scalar(const Json& value, size_t indent) {
    const size_t inner = root_ ? kIndent : indent + kIndent;
    double number = 0;
    if (value.is_string() && !travelling_float(value, number)) {
      const auto& text = value.get_ref<const std::string&>();
      const auto points = code_points(text);
      const Style style = string_style(text, points);
      string(points, style, inner, true);
      return style == Style::plain;
    }
    indicator(bare_scalar(value));
    return true;
  }

  static std::string bare_scalar(const Json& value) {
    if (value.is_string()) return value.get<std::string>();
    if (value.is_null()) return "null";
    if (!value.is_number_float()) return value.dump();
    const auto text = python_repr(value.get<double>());
    if (text.find('n') != std::string::npos) {  // inf, -inf, nan
      return text[0] == '-' ? "-." + text.substr(1) : "." + text;
    }
    // YAML 1.1 takes no float without a point.
    const auto e = text.find('e');
    const bool point = text.find('.') != std::string::npos;
    return e == std::string::npos || point ? text : text.substr(0, e) + ".0" + text.substr(e);
  }

  void string(const std::u32string& text, Style style, size_t indent, bool split) {
    if (style == Style::double_quotes) return double_quoted(text, indent, split);
    if (style == Style::single_quotes) return quoted(text, indent, split, true);
    quoted(text, indent, split, false);
  }

  // Plain, or in single quotes: ASCII and line feeds. Breaks a long line at a single space.
  void quoted(const std::u32string& text, size_t indent, bool split, bool quotes) {
    if (quotes) indicator("'");
    if (!quotes && !text.empty() && !whitespace_) put(" ");
    if (!quotes) whitespace_ = indention_ = false;
    for (size_t i = 0; i < text.size();) {
      size_t end = i;
      while (end < text.size() && text[end] == text[i]) ++end;
      if (text[i] == U' ') {
        const bool inside = i > 0 && end < text.size();
        if (end == i + 1 && column_ > kWidth && split && inside) {
          new_line(indent);
          if (!quotes) whitespace_ = indention_ = false;
        } else {
          put(std::string(end - i, ' '));
        }
        i = end;
      } else if (text[i] == U'\n') {
        // A single break would be folded into a space.
        for (size_t k = i; k <= end; ++k) line_break();
        new_line(indent);
        i = end;
      } else {
        put(text[i] == U'\'' && quotes ? "''" : std::string(1, static_cast<char>(text[i])));
        ++i;
      }
    }
    if (quotes) {
      put("'");
      whitespace_ = indention_ = false;
    }
  }

  void double_quoted(const std::u32string& text, size_t indent, bool split) {
    indicator("\"");
    // Text is written in runs, and a line is broken at the end of one, so the column is that of the
    // run's start.
    size_t start = 0;
    const auto write_run = [&](size_t end) {
      for (; start < end; ++start) put(std::string(1, static_cast<char>(text[start])));
    };
    for (size_t end = 0; end <= text.size(); ++end) {
      const bool stop = end == text.size() || text[end] == U'"' || text[end] == U'\\' ||
                        text[end] < 0x20 || text[end] > 0x7E;
      if (stop) {
        write_run(end);
        if (end < text.size()) {
          put(escape(text[end]));
          start = end + 1;
        }
      }
      const bool may_break =
          end > 0 && end + 1 < text.size() && (text[end] == U' ' || start >= end) && split;
      if (may_break && column_ + end > kWidth + start) {
        write_run(end);
        put("\\");
        new_line(indent);
        whitespace_ = indention_ = false;
        if (text[start] == U' ') put("\\");
      }
    }
    put("\"");
    whitespace_ = indention_ = false;
  }

  static std::string escape(char32_t c) {
    static const std::vector<std::pair<char32_t, char>> kNamed = {
        {U'\0', '0'},  {U'\a', 'a'},   {U'\b', 'b'},   {U'\t', 't'},     {U'\n', 'n'},
        {U'\v', 'v'},  {U'\f', 'f'},   {U'\r', 'r'},   {U'\x1B', 'e'},   {U'"', '"'},
        {U'\\', '\\'}, {U'\x85', 'N'}, {U'\xA0', '_'}, {U'\u2028', 'L'}, {U'\u2029', 'P'}};
    for (const auto& [code, letter] : kNamed) {
      if (code == c) return {'\\', letter};
    }
    char out[16];
    const char* format = c <= 0xFF ? "\\x%02X" : c <= 0xFFFF ? "\\u%04X" : "\\U%08X";
    std::snprintf(out, sizeof(out), format, static_cast<unsigned>(c));
    return out;
  }

  void put(const std::string& text) {
    out_ += text;
    column_ += text.size();
  }
  void indicator(const std::string& text, bool indention = false) {
    put(whitespace_ ? text : " " + text);
    whitespace_ = false;
    indention_ = indention_ && indention;
  }
  void line_break() {
    out_ += '\n';
    column_ = 0;
    whitespace_ = indention_ = true;
  }
  // To the indent, on a new line unless nothing but indention stands on this one.
  void new_line(size_t indent) {
    if (!indention_ || column_ > indent || (column_ == indent && !whitespace_)) line_break();
    if (column_ < indent) {
      whitespace_ = true;
      put(std::string(indent - column_, ' '));
    }
  }

  bool sort_keys_;
  bool root_ = true;
  std::string out_;
  size_t column_ = 0;
  bool whitespace_ = true;  // the last character was a space, or the line is new
  bool indention_ = true;   // nothing but spaces, "-", "?" and ":" stand on this line
};

// ---- Reading ------------------------------------------------------------------------------------

constexpr int kDeepest = 200;

class Reader {
 public:
  explicit Reader(const std::string& where) : where_(where) {}

  Json read(const YAML::Node& node, int depth = 0) {
    // An anchor may hold itself.
    if (depth > kDeepest) refuse(node, str("nests more than ", kDeepest, " levels deep"));
    check_tag(node);
    if (node.IsNull() || !node.IsDefined()) return nullptr;
    if (node.IsScalar()) return scalar(node);
    if (node.IsSequence()) {
      Json list = Json::array();
      for (const auto& item : node) list.push_back(read(item, depth + 1));
      return list;
    }
    return map(node, depth);
  }

 private:
  Json map(const YAML::Node& node, int depth) {
    Json out = Json::object();
    for (const auto& item : node) {
      if (!item.first.IsScalar() && !item.first.IsNull())
        refuse(item.first, "has a key that is no text");
      const auto key = item.first.IsNull() ? "null" : text(item.first);
      const bool merges = key == "<<" && plain(item.first);
      if (!merges) out[key] = read(item.second, depth + 1);
    }
    for (const auto& item : node) {
      if (item.first.IsScalar() && item.first.Scalar() == "<<" && plain(item.first)) {
        merge(item.second, depth, out);
      }
    }
    return out;
  }

  // Keys that are there already stay.
  void merge(const YAML::Node& node, int depth, Json& out) {
    if (node.IsSequence()) {
      for (const auto& item : node) merge(item, depth + 1, out);
      return;
    }
    if (!node.IsMap()) refuse(node, "merges (\"<<\") what is no map");
    const Json other = read(node, depth + 1);
    for (const auto& [key, value] : other.items()) {
      if (!out.contains(key)) out[key] = value;
    }
  }

  Json scalar(const YAML::Node& node) {
    const auto& tag = node.Tag();
    if (plain(node)) return yaml_value(node.Scalar());
    const auto ends = [&](const std::string& with) {
      return tag.size() > with.size() &&
             tag.compare(tag.size() - with.size(), with.size(), with) == 0;
    };
    // A tag that names a type has the last word, where the text can be of that type.
    if (ends(":float") || ends("/float") || ends(":int") || ends("/int") || ends(":bool") ||
        ends("/bool") || ends(":null") || ends("/none")) {
      const Json value = yaml_value(node.Scalar());
      const bool to_float = ends("float") && value.is_number_integer();
      return to_float ? Json(value.get<double>()) : value;
    }
    return text(node);
  }

  // yaml-cpp reads "\N" and "\_" as single bytes, where U+0085 and U+00A0 are meant.
  static std::string text(const YAML::Node& node) {
    std::string out;
    const auto& read = node.Scalar();
    for (size_t i = 0; i < read.size(); ++i) {
      const auto byte = static_cast<unsigned char>(read[i]);
      size_t more = byte < 0xC0 ? 0 : byte < 0xE0 ? 1 : byte < 0xF0 ? 2 : 3;
      if (byte == 0x85 || byte == 0xA0) out += '\xC2';
      out += read[i];
      for (; more > 0 && i + 1 < read.size(); --more) out += read[++i];
    }
    return out;
  }

  // yaml-cpp tags quoted text "!", plain text "?" (or "" where it was made empty).
  static bool plain(const YAML::Node& node) { return node.Tag() == "?" || node.Tag().empty(); }

  void check_tag(const YAML::Node& node) {
    static const std::vector<std::string> kPython = {"none", "bool",  "str",  "unicode", "int",
                                                     "long", "float", "list", "tuple",   "dict"};
    static const std::vector<std::string> kYaml = {"null", "bool", "str", "int",      "float",
                                                   "seq",  "map",  "set", "timestamp"};
    const std::string core = "tag:yaml.org,2002:";
    const std::string python = core + "python/";
    if (!node.IsDefined()) return;
    const auto& tag = node.Tag();
    if (tag.empty() || tag == "?" || tag == "!") return;
    const auto known = [&](const std::string& prefix, const std::vector<std::string>& names) {
      return tag.compare(0, prefix.size(), prefix) == 0 &&
             std::find(names.begin(), names.end(), tag.substr(prefix.size())) != names.end();
    };
    if (!known(core, kYaml) && !known(python, kPython)) {
      refuse(node, str("has the tag ", tag, ", which stands for an object, not for data"));
    }
  }

  [[noreturn]] void refuse(const YAML::Node& node, const std::string& what) const {
    const auto mark = node.Mark();
    throw MisconfigurationError(str(where_, ":", mark.line + 1, ":", mark.column + 1, " ", what,
                                    ". Write maps, lists, texts and numbers."));
  }

  const std::string& where_;
};

}  // namespace

std::string to_yaml(const Json& value, bool sort_keys) { return Writer(sort_keys).run(value); }

Json from_yaml(const std::string& text, const std::string& where) {
  try {
    return Reader(where).read(YAML::Load(text));
  } catch (const YAML::Exception& error) {
    throw MisconfigurationError(str(where, ":", error.mark.line + 1, ":", error.mark.column + 1,
                                    " is not valid YAML: ", error.msg, "."));
  }
}

}  // namespace lightning
