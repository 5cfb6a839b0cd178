#include "lightning/cli/config_source.h"

#include <yaml-cpp/yaml.h>

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <set>
#include <vector>

#include "lightning/files.h"
#include "lightning/yaml.h"
#include "lightning/yaml_scalar.h"

namespace lightning::cli {
namespace {

// An anchor may hold itself, or itself twice.
constexpr int kDeepest = 100;
constexpr int kMostNodes = 1000000;

// A number with an exponent and no point or sign, which YAML 1.1 takes as text.
// Source: jsonargparse 4.53, the float resolver of its YAML loader.
bool is_exponent_float(const std::string& text) {
  size_t i = text[0] == '-' || text[0] == '+' ? 1 : 0;
  bool digits = false;
  bool exponent = false;
  for (; i < text.size(); ++i) {
    const char c = text[i];
    if (c >= '0' && c <= '9') {
      digits = true;
    } else if ((c == 'e' || c == 'E') && digits && !exponent) {
      exponent = true;
      digits = false;
      if (i + 1 < text.size() && (text[i + 1] == '-' || text[i + 1] == '+')) ++i;
    } else if (c != '_' && !(c == '.' && !exponent)) {
      return false;
    }
  }
  return exponent && digits;
}

class Reader {
 public:
  explicit Reader(ConfigSource& source) : source_(source) {}

  Json node(const YAML::Node& in, const std::string& path, int depth) {
    if (depth > kDeepest || ++nodes_ > kMostNodes) {
      refuse(in, "nests too deep; does an anchor hold itself?");
    }
    check_tag(in);
    if (in.IsMap()) return map(in, path, depth);
    if (in.IsSequence()) {
      Json list = Json::array();
      for (size_t i = 0; i < in.size(); ++i) {
        const std::string at = str(path, "[", i, "]");
        source_.lines.emplace(at, in[i].Mark().line + 1);
        list.push_back(node(in[i], at, depth + 1));
      }
      return list;
    }
    return in.IsScalar() ? scalar(in, path) : Json(nullptr);
  }

 private:
  Json map(const YAML::Node& in, const std::string& path, int depth) {
    Json out = Json::object();
    std::map<std::string, int> first;
    for (const auto& item : in) {
      if (!item.first.IsScalar()) refuse(item.first, "has a key that is not text");
      const std::string key = item.first.Scalar();
      if (key == "<<" && is_plain(item.first)) continue;
      const int line = item.first.Mark().line + 1;
      const auto [before, is_new] = first.emplace(key, line);
      if (!is_new) {
        refuse(item.first, str("gives \"", key, "\" a second time; the first is on line ",
                               before->second, ". Keep one of them"));
      }
      const std::string at = path.empty() ? key : path + "." + key;
      source_.lines[at] = line;
      out[key] = node(item.second, at, depth + 1);
    }
    for (const auto& item : in) {
      if (item.first.Scalar() == "<<" && is_plain(item.first)) {
        merge(item.second, path, depth, out);
      }
    }
    return out;
  }

  // Keys that are there already stay.
  void merge(const YAML::Node& in, const std::string& path, int depth, Json& out) {
    if (in.IsSequence()) {
      for (const auto& item : in) merge(item, path, depth + 1, out);
      return;
    }
    if (!in.IsMap()) refuse(in, "merges (\"<<\") what is not a map");
    const Json other = node(in, path, depth + 1);
    for (const auto& [key, value] : other.items()) {
      if (!out.contains(key)) out[key] = value;
    }
  }

  Json scalar(const YAML::Node& in, const std::string& path) {
    const std::string& text = in.Scalar();
    if (!is_plain(in)) return text;
    if (is_exponent_float(text)) {
      source_.texts[path] = text;
      std::string digits = text;
      digits.erase(std::remove(digits.begin(), digits.end(), '_'), digits.end());
      return std::strtod(digits.c_str(), nullptr);
    }
    const bool base_60 = text.find(':') != std::string::npos;
    return base_60 ? Json(text) : yaml_value(text);
  }

  // yaml-cpp tags quoted text "!" and plain text "?".
  static bool is_plain(const YAML::Node& node) { return node.Tag() == "?" || node.Tag().empty(); }

  void check_tag(const YAML::Node& in) const {
    static const std::set<std::string> kPlain = {
        "", "?", "!", "tag:yaml.org,2002:str", "tag:yaml.org,2002:seq", "tag:yaml.org,2002:map"};
    if (kPlain.count(in.Tag()) == 0) {
      refuse(in,
             str("has the tag ", in.Tag(), ". Write maps, lists, texts and numbers without one"));
    }
  }

  [[noreturn]] void refuse(const YAML::Node& in, const std::string& what) const {
    throw MisconfigurationError(
        str(source_.name.empty() ? "the value" : str(source_.name, ":", in.Mark().line + 1), " ",
            what, "."));
  }

  ConfigSource& source_;
  int nodes_ = 0;
};

size_t indent_of(const std::string& line) {
  return std::min(line.find_first_not_of(" -"), line.size());
}

}  // namespace

std::string ConfigSource::place(const std::string& path) const {
  if (name.empty()) return "";
  for (std::string at = path; !at.empty();) {
    const auto found = lines.find(at);
    if (found != lines.end()) return str(name, ":", found->second, ": ");
    const size_t end = at.find_last_of(".[");
    at = end == std::string::npos ? "" : at.substr(0, end);
  }
  return name + ": ";
}

ConfigSource parse_config(const std::string& text, const std::string& name) {
  ConfigSource source;
  source.name = name;
  try {
    const auto documents = YAML::LoadAll(text);
    if (documents.size() > 1) {
      throw MisconfigurationError(
          str(name, " holds ", documents.size(), " YAML documents, expected one."));
    }
    source.value = std::make_shared<const Json>(
        documents.empty() ? Json() : Reader(source).node(documents.front(), "", 0));
  } catch (const YAML::Exception& error) {
    const std::string place = name.empty()
                                  ? "the value"
                                  : str(name, ":", error.mark.line + 1, ":", error.mark.column + 1);
    throw MisconfigurationError(str(place, " is not valid YAML: ", error.msg, "."));
  }
  return source;
}

ConfigSource read_config(const std::string& path) {
  const std::string file = expand_path(path);
  if (!std::filesystem::is_regular_file(file)) {
    throw MisconfigurationError(str("The configuration file ", path, " does not exist."));
  }
  std::string text;
  try {
    text = read_file(file);
  } catch (const std::runtime_error& error) {
    throw MisconfigurationError(error.what());
  }
  ConfigSource source = parse_config(text, path);
  source.folder = std::filesystem::path(file).parent_path().string();
  return source;
}

std::string write_config(const Json& value, const std::map<std::string, std::string>& comments) {
  const std::string text = to_yaml(value, false);
  if (comments.empty()) return text;
  std::map<int, std::string> by_line;
  for (const auto& [path, line] : parse_config(text).lines) {
    const auto found = comments.find(path);
    if (found != comments.end()) by_line[line] = found->second;
  }
  std::string out;
  int number = 0;
  for (size_t begin = 0; begin < text.size();) {
    const size_t end = text.find('\n', begin);
    const std::string line = text.substr(begin, end - begin);
    const auto comment = by_line.find(++number);
    if (comment != by_line.end()) {
      out += std::string(indent_of(line), ' ') + "# " + comment->second + "\n";
    }
    out += line + "\n";
    begin = end == std::string::npos ? text.size() : end + 1;
  }
  return out;
}

}  // namespace lightning::cli
