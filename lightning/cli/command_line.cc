#include "lightning/cli/command_line.h"

#include <algorithm>
#include <nlohmann/json.hpp>
#include <optional>

namespace lightning::cli {
namespace {

bool starts_with(const std::string& text, const std::string& with) {
  return text.compare(0, with.size(), with) == 0;
}

bool ends_with(const std::string& text, const std::string& with) {
  return text.size() >= with.size() &&
         text.compare(text.size() - with.size(), with.size(), with) == 0;
}

bool has(const std::vector<std::string>& words, const std::string& word) {
  return std::find(words.begin(), words.end(), word) != words.end();
}

// What stands under a subcommand in a file that was given before it.
ConfigSource section(const ConfigSource& whole, const std::string& name) {
  ConfigSource part = whole;
  part.value = std::make_shared<const Json>(whole.value->at(name));
  part.lines.clear();
  part.texts.clear();
  const auto move = [prefix = name + "."](const auto& from, auto& to) {
    for (const auto& [path, what] : from) {
      if (starts_with(path, prefix)) to[path.substr(prefix.size())] = what;
    }
  };
  move(whole.lines, part.lines);
  move(whole.texts, part.texts);
  return part;
}

void erase_nulls(Json& value) {
  if (value.is_array()) {
    for (Json& item : value) erase_nulls(item);
  }
  if (!value.is_object()) return;
  std::vector<std::string> nulls;
  for (const auto& item : value.items()) {
    erase_nulls(item.value());
    if (item.value().is_null()) nulls.push_back(item.key());
  }
  for (const auto& key : nulls) value.erase(key);
}

std::vector<std::string> split_at_commas(const std::string& text) {
  std::vector<std::string> words(1);
  for (const char c : text) {
    if (c == ',') {
      words.emplace_back();
    } else {
      words.back() += c;
    }
  }
  return words;
}

}  // namespace

class CommandLine::Words {
 public:
  explicit Words(const std::vector<std::string>& words) : words_(words) {}

  bool end() const { return at_ == words_.size(); }
  const std::string& peek() const { return words_[at_]; }
  bool at_option() const { return !end() && peek().size() > 1 && peek()[0] == '-'; }
  std::string take() { return words_[at_++]; }

  // An option without its dashes; sets `value` where it is written "--key=value".
  std::string key(std::optional<std::string>& value) {
    std::string word = take();
    const size_t equals = word.find('=');
    if (equals != std::string::npos) {
      value = word.substr(equals + 1);
      word.resize(equals);
    }
    return word.substr(starts_with(word, "--") ? 2 : 1);
  }

  // The value of an option, maybe in the next word. One that begins with two dashes needs "=".
  std::optional<std::string> value(std::optional<std::string> given) {
    if (!given && !end() && !starts_with(peek(), "--")) given = take();
    return given;
  }

 private:
  const std::vector<std::string>& words_;
  size_t at_ = 0;
};

std::vector<std::string> CommandLine::subcommands() const {
  std::vector<std::string> names;
  for (const auto& one : program_.subcommands) names.push_back(one.first);
  return names;
}

Request CommandLine::read(const std::vector<std::string>& arguments) {
  request_ = Request();
  Words words(arguments);
  if (!read_before_subcommand(words)) return request_;
  choose_subcommand(words);
  request_.tree = std::make_shared<ConfigTree>(make_tree_(request_.subcommand));
  for (const ConfigSource& file : files_) {
    if (file.value->contains(request_.subcommand)) {
      request_.tree->apply(section(file, request_.subcommand));
    }
  }
  while (!words.end() && request_.output.empty()) read_option(words);
  if (prints_ && request_.output.empty()) request_.output = print_config();
  return request_;
}

// False where all is said.
bool CommandLine::read_before_subcommand(Words& words) {
  const auto names = subcommands();
  while (words.at_option()) {
    const std::string word = words.peek();
    std::optional<std::string> given;
    const std::string key = words.key(given);
    if (key == "h" || key == "help") {
      request_.output = program_help(program_);
      return false;
    }
    if (key == "version") {
      request_.output = program_.name + " " + program_.version + "\n";
      return false;
    }
    if (key != "c" && key != "config") {
      throw MisconfigurationError(str("unrecognized argument ", word, ". Options come after the ",
                                      "subcommand: ", program_.name, " {", join(names, ","), "} ",
                                      word, " ..."));
    }
    const auto file = words.value(given);
    if (!file) throw MisconfigurationError(word + " expects the name of a file.");
    files_.push_back(read_config(*file));
    for (const auto& section : json::is_map(*files_.back().value)
                                   ? json::keys(*files_.back().value)
                                   : std::vector<std::string>{"The whole file"}) {
      if (has(names, section)) continue;
      throw MisconfigurationError(
          str(files_.back().place(section), section, " is not a subcommand. A file before the ",
              "subcommand has a section for each of them (", join(names), "); a file without ",
              "sections comes after it: ", program_.name, " fit --config ", *file));
    }
  }
  return true;
}

void CommandLine::choose_subcommand(Words& words) {
  const auto names = subcommands();
  if (words.end()) {
    std::vector<std::string> sections;
    for (const auto& file : files_) {
      for (const auto& name : json::keys(*file.value)) {
        if (!has(sections, name)) sections.push_back(name);
      }
    }
    if (sections.size() != 1) {
      throw MisconfigurationError(
          str("expected a subcommand, one of ", join(names), ", but none was given."));
    }
    request_.subcommand = sections[0];
    return;
  }
  const std::string name = words.take();
  if (!has(names, name)) {
    throw MisconfigurationError(str("got subcommand \"", name, "\", expected one of ", join(names),
                                    ".", did_you_mean(name, names)));
  }
  request_.subcommand = name;
}

void CommandLine::read_option(Words& words) {
  const std::string word = words.peek();
  if (!words.at_option()) {
    throw MisconfigurationError(str("unrecognized argument \"", word, "\". Options are written ",
                                    "--KEY VALUE or --KEY=VALUE."));
  }
  std::optional<std::string> given;
  const std::string key = words.key(given);
  ConfigTree& tree = *request_.tree;
  if (key == "h" || key == "help") {
    request_.output = subcommand_help(program_, request_.subcommand, tree);
  } else if (ends_with(key, ".help")) {
    request_.output =
        part_help(tree, key.substr(0, key.size() - 5), words.value(given).value_or(""));
  } else if (key == "print_config") {
    prints_ = true;
    flags_ = given && !given->empty() ? split_at_commas(*given) : std::vector<std::string>();
    static const std::vector<std::string> kFlags = {"comments", "skip_default", "skip_null",
                                                    "skip_unset"};
    for (const auto& flag : flags_) {
      if (has(kFlags, flag)) continue;
      throw MisconfigurationError(str("--print_config got flag \"", flag, "\", expected ",
                                      join(kFlags), ".", did_you_mean(flag, kFlags)));
    }
  } else if (key == "c" || key == "config") {
    const auto file = words.value(given);
    if (!file) throw MisconfigurationError(word + " expects the name of a file.");
    tree.apply(read_config(*file));
  } else {
    const auto value = words.value(given);
    if (!value) {
      tree.check_key(key);
      throw MisconfigurationError(
          str("--", key, " expects a value: --", key, "=VALUE, or --", key, " VALUE."));
    }
    tree.set(key, *value);
    request_.options.emplace_back(key, *value);
  }
}

std::string CommandLine::print_config() const {
  Json values = request_.tree->values();
  if (has(flags_, "skip_default")) values = request_.tree->without_defaults(values);
  if (has(flags_, "skip_null") || has(flags_, "skip_unset")) erase_nulls(values);
  const bool comments = has(flags_, "comments");
  return program_.config_header + write_config(values, comments
                                                           ? request_.tree->comments(values)
                                                           : std::map<std::string, std::string>());
}

}  // namespace lightning::cli
