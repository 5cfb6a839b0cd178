#include "lightning/cli/help.h"

#include <algorithm>
#include <nlohmann/json.hpp>
#include <sstream>

#include "lightning/terminal.h"

namespace lightning::cli {
namespace {

constexpr int kHelpColumn = 26;
constexpr int kNarrowest = 50;
constexpr int kWidest = 100;

int width() {
  const int columns = standard_output()->columns();
  return columns == 0 ? 80 : std::clamp(columns - 2, kNarrowest, kWidest);
}

// The words of `text` in lines that begin at `column`; the cursor stands at `at`.
std::string wrapped(const std::string& text, int at, int column) {
  std::string out;
  if (at > 0 && at >= column) {
    out += "\n";
    at = 0;
  }
  out += std::string(column - at, ' ');
  int used = column;
  bool first = true;
  std::istringstream words(text);
  for (std::string word; words >> word; first = false) {
    const int length = display_width(word);
    if (!first && used + 1 + length > width()) {
      out += "\n" + std::string(column, ' ');
      used = column;
      first = true;
    }
    out += (first ? "" : " ") + word;
    used += length + (first ? 0 : 1);
  }
  return out + "\n";
}

std::string entry(const std::string& option, const std::string& help) {
  const std::string head = "  " + option;
  return head + wrapped(help, display_width(head), kHelpColumn);
}

std::string upper(std::string text) {
  std::transform(text.begin(), text.end(), text.begin(),
                 [](unsigned char c) { return static_cast<char>(std::toupper(c)); });
  return text;
}

std::string placeholder(const Place& place) {
  if (place.type == "bool") return "{true,false}";
  if (place.type == "bool or null") return "{true,false,null}";
  if (place.kind == Place::Kind::kGroup) return "FILE";
  return place.kind == Place::Kind::kPart ? "NAME" : upper(place.name);
}

std::string describe(const Place& place, const Json* fallback) {
  std::vector<std::string> facts;
  if (place.kind != Place::Kind::kGroup && !place.type.empty()) {
    facts.push_back("type: " + place.type);
  }
  if (fallback != nullptr && place.kind != Place::Kind::kGroup) {
    const std::string text =
        fallback->is_string() ? fallback->get<std::string>() : fallback->dump();
    facts.push_back("default: " + (text.empty() ? "\"\"" : text));
  }
  if (place.parts != nullptr && !place.part_names().empty()) {
    facts.push_back("known: " + join(place.part_names()));
  }
  return facts.empty() ? place.help : place.help + " (" + join(facts) + ")";
}

std::string options(const std::vector<Place>& places, const Json& values,
                    const std::string& prefix);

std::string option(const Place& place, const Json& values, const std::string& prefix) {
  const std::string key = prefix.empty() ? place.name : prefix + "." + place.name;
  const bool known = values.is_object() && values.contains(place.name);
  const Json none = nullptr;
  const Json& value = known ? values.at(place.name) : none;
  std::string out;
  if (place.kind == Place::Kind::kPart) {
    out += entry("--" + key + ".help [NAME]",
                 str("Lists every ", place.parts->kind(), ", or the options of the one named."));
  }
  out += entry("--" + key + " " + placeholder(place), describe(place, known ? &value : nullptr));
  if (place.kind == Place::Kind::kGroup) return out + options(place.places, value, key);
  // A part that is chosen already shows its options.
  const std::string name = part_name(value);
  if (place.kind == Place::Kind::kPart && value.is_object() && place.registry_of(name).has(name)) {
    out += options(places_of(place.registry_of(name).entry(name)),
                   value.contains("init_args") ? value.at("init_args") : none, key);
  }
  return out;
}

std::string options(const std::vector<Place>& places, const Json& values,
                    const std::string& prefix) {
  std::string out;
  for (const Place& place : places) out += option(place, values, prefix);
  return out;
}

const Place* find(const std::vector<Place>& places, const std::string& key) {
  const size_t dot = key.find('.');
  for (const Place& place : places) {
    if (place.name != key.substr(0, dot)) continue;
    return dot == std::string::npos ? &place : find(place.places, key.substr(dot + 1));
  }
  return nullptr;
}

std::string common_options() {
  return entry("-h, --help", "Shows this help and ends.") +
         entry("-c FILE, --config FILE",
               "A configuration in YAML or JSON. May be given several times, also between other "
               "options; what comes later wins.");
}

}  // namespace

std::string usage(const Program& program, const std::string& subcommand) {
  if (!subcommand.empty()) {
    return str("usage: ", program.name, " ", subcommand,
               " [-h] [-c FILE] [--print_config[=FLAGS]] [--KEY VALUE] ...\n");
  }
  std::vector<std::string> names;
  for (const auto& one : program.subcommands) names.push_back(one.first);
  return str("usage: ", program.name, " [-h] [--version] [-c FILE] {", join(names, ","), "} ...\n");
}

std::string program_help(const Program& program) {
  std::string out = usage(program, "") + "\n" + wrapped(program.description, 0, 0) +
                    "\noptions:\n" + common_options() +
                    entry("--version", "Shows the version and ends.") + "\nsubcommands:\n";
  for (const auto& [name, help] : program.subcommands) out += entry(name, help);
  return out + "\n" +
         wrapped(str("For the options of one: ", program.name, " SUBCOMMAND --help"), 0, 0);
}

std::string subcommand_help(const Program& program, const std::string& subcommand,
                            const ConfigTree& tree) {
  std::string out = usage(program, subcommand) + "\n";
  for (const auto& [name, help] : program.subcommands) {
    if (name == subcommand) out += wrapped(help, 0, 0);
  }
  out += "\noptions:\n" + common_options() +
         entry("--print_config[=FLAGS]",
               "Prints the configuration that all other options make, and ends. Flags, with commas "
               "between them: comments (help above each key), skip_default, skip_null.");
  const Json values = tree.values();
  bool in_group = true;
  for (const Place& place : tree.places()) {
    const bool group = place.kind != Place::Kind::kValue;
    if (group) out += str("\n", place.name, ":\n");
    if (!group && in_group) out += "\n";
    in_group = group;
    out += option(place, values, "");
  }
  return out;
}

std::string part_help(const ConfigTree& tree, const std::string& key, const std::string& name) {
  const Place* place = find(tree.places(), key);
  if (place == nullptr || place->kind == Place::Kind::kValue) {
    throw MisconfigurationError(
        str("--", key, ".help: ", key, " is no option that takes parts or options of its own."));
  }
  std::string out;
  if (place->kind == Place::Kind::kGroup) {
    out = str(place->help, "\n\n");
    const Json values = tree.values();
    const Json::json_pointer at("/" + [&] {
      std::string path = key;
      std::replace(path.begin(), path.end(), '.', '/');
      return path;
    }());
    return out + options(place->places, values.at(at), key);
  }
  if (name.empty()) {
    for (const auto& known : place->part_names()) {
      out += entry(known, place->registry_of(known).entry(known).help);
    }
    return out.empty() ? str("No ", place->parts->kind(), " is linked into this program.\n") : out;
  }
  const auto& found = place->registry_of(part_name(name)).entry(part_name(name));
  Json values;
  write_fields(*found.fields, found.default_options().get(), values);
  const std::string listed = options(places_of(found), values, key);
  return str(found.name, ": ", found.help, "\n\n",
             listed.empty() ? "It has no options.\n" : listed);
}

}  // namespace lightning::cli
