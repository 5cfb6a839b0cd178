#include "lightning/cli/config_tree.h"

#include <algorithm>
#include <filesystem>
#include <nlohmann/json.hpp>

namespace lightning::cli {
namespace {

constexpr const char* kClass = "class_path";
constexpr const char* kArgs = "init_args";
// Names that an error lists even where it knows what was meant.
constexpr size_t kFew = 12;

std::vector<std::string> split(const std::string& text, const std::string& separator) {
  std::vector<std::string> words;
  size_t begin = 0;
  for (size_t end; (end = text.find(separator, begin)) != std::string::npos;) {
    words.push_back(text.substr(begin, end - begin));
    begin = end + separator.size();
  }
  words.push_back(text.substr(begin));
  return words;
}

std::string below(const std::string& path, const std::string& key) {
  return path.empty() ? key : path + "." + key;
}

std::string above(const std::string& path) {
  const size_t dot = path.find_last_of('.');
  return dot == std::string::npos ? "" : path.substr(0, dot);
}

bool starts_with(const std::string& text, const std::string& with) {
  return text.compare(0, with.size(), with) == 0;
}

bool ends_with(const std::string& text, const std::string& with) {
  return text.size() >= with.size() &&
         text.compare(text.size() - with.size(), with.size(), with) == 0;
}

bool is_file_name(const std::string& text) {
  return ends_with(text, ".yaml") || ends_with(text, ".yml") || ends_with(text, ".json");
}

// "auto", "cpu" and "16-mixed" are words, "EarlyStopping" is a class: written with its init_args.
bool is_class(const std::string& name) { return name[0] >= 'A' && name[0] <= 'Z'; }

Json as_part(const std::string& name, Json args) {
  if (args.is_null()) args = Json::object();
  if (!is_class(name) && args.empty()) return name;
  return Json{{kClass, name}, {kArgs, std::move(args)}};
}

const Json& args_of(const Json& part) {
  return part.is_object() && part.contains(kArgs) && part.at(kArgs).is_object() ? part.at(kArgs)
                                                                                : empty_config();
}

// `path` is the whole key, `where` begins the error.
const Place& find_place(const std::vector<Place>& places, const std::string& key,
                        const std::string& path, const std::string& where) {
  std::vector<std::string> names;
  for (const auto& place : places) {
    if (place.name == key) return place;
    names.push_back(place.name);
  }
  const std::string near = did_you_mean(key, names);
  const bool lists = near.empty() || names.size() <= kFew;
  throw MisconfigurationError(
      str(where, path, " is not an option.", near,
          lists ? str(" Known: ", names.empty() ? "none" : join(names), ".") : ""));
}

// Applies one source to a tree of values.
class Applier {
 public:
  explicit Applier(const ConfigSource& source) : source_(source) {}

  void map(const std::vector<Place>& places, Json& values, const Json& in, const std::string& path,
           const std::string& what) {
    if (in.is_null()) return;
    if (!in.is_object()) {
      refuse(path, str(path.empty() ? "The configuration" : path, " got ", in.dump(), ", expected ",
                       what, "."));
    }
    for (const auto& [written, value] : in.items()) {
      const bool adds = ends_with(written, "+");
      const std::string key = adds ? written.substr(0, written.size() - 1) : written;
      const Place& place = find(places, key, below(path, written));
      apply(place, values[key], value, below(path, written), adds);
    }
  }

  void apply(const Place& place, Json& values, const Json& in, const std::string& path, bool adds) {
    if (adds && !place.is_list) {
      refuse(path, str(path, " adds to a list, but ", place.name, " is none; its type is ",
                       place.type, "."));
    }
    switch (place.kind) {
      case Place::Kind::kGroup:
        return group(place, values, in, path);
      case Place::Kind::kPart:
        return parts(place, values, in, path, adds);
      case Place::Kind::kValue:
        values = checked(place, adds ? added(values, in) : in, path);
    }
  }

  // Follows a key of the command line down to the place it names.
  void follow(const std::vector<Place>& places, Json& values, const std::string& key,
              const std::string& whole) {
    const size_t dot = key.find('.');
    std::string first = key.substr(0, dot);
    const bool last = dot == std::string::npos;
    const bool adds = last && ends_with(first, "+");
    if (adds) first.pop_back();
    const Place& place = find(places, first, whole);
    Json& value = values[first];
    if (last) return apply(place, value, *source_.value, whole, adds);
    const std::string rest = key.substr(dot + 1);
    switch (place.kind) {
      case Place::Kind::kGroup:
        return follow(place.places, value, rest, whole);
      case Place::Kind::kPart:
        return follow_part(place, value, rest, whole);
      case Place::Kind::kValue:
        return follow_value(place, value, rest, whole);
    }
  }

 private:
  const Place& find(const std::vector<Place>& places, const std::string& key,
                    const std::string& path) const {
    return find_place(places, key, path, source_.place(path));
  }

  void group(const Place& place, Json& values, const Json& in, const std::string& path) {
    if (in.is_string()) {
      const ConfigSource file = included(in.get<std::string>());
      return Applier(file).map(place.places, values, *file.value, "", "a map of options");
    }
    map(place.places, values, in, path, "a map of options, or the name of a YAML file");
  }

  // The value as its option takes it. Text such as 1e-3 is a number only where numbers are taken.
  Json checked(const Place& place, const Json& in, const std::string& path) const {
    const auto text = source_.texts.find(path);
    try {
      return place.check(in, path);
    } catch (const MisconfigurationError& error) {
      if (text != source_.texts.end()) {
        try {
          return place.check(text->second, path);
        } catch (const MisconfigurationError&) {
        }
      }
      refuse(path, error.what());
    }
  }

  static Json added(const Json& before, const Json& in) {
    Json out = before.is_array()  ? before
               : before.is_null() ? Json::array()
                                  : Json::array({before});
    if (!in.is_array()) {
      out.push_back(in);
    } else {
      out.insert(out.end(), in.begin(), in.end());
    }
    return out;
  }

  // ---- Parts ------------------------------------------------------------------------------------

  void parts(const Place& place, Json& values, const Json& in, const std::string& path, bool adds) {
    Json out;
    if (adds) {
      out = values.is_array() ? values : Json::array();
      if (values.is_string() || values.is_object()) out.push_back(values);
      if (!in.is_array()) {
        out.push_back(part(place, nullptr, in, path));
      } else {
        for (size_t i = 0; i < in.size(); ++i) {
          out.push_back(part(place, nullptr, in[i], str(path, "[", i, "]")));
        }
      }
    } else if (in.is_array()) {
      out = Json::array();
      for (size_t i = 0; i < in.size(); ++i) {
        out.push_back(part(place, nullptr, in[i], str(path, "[", i, "]")));
      }
    } else {
      out = part(place, values, in, path);
    }
    try {
      Json normal = place.check(out, path);
      // "null" may stand for an empty list; parts stay as they were completed here.
      values = out.is_null() ? std::move(normal) : std::move(out);
    } catch (const MisconfigurationError& error) {
      refuse(path, error.what());
    }
  }

  // One part: `in` over what was there before.
  Json part(const Place& place, const Json& before, const Json& in, const std::string& path) {
    if (in.is_number()) return part(place, before, Json(number_text(in, path)), path);
    if (in.is_string()) {
      const auto text = in.get<std::string>();
      if (is_file_name(text) && !place.registry_of(part_name(in)).has(part_name(in))) {
        const ConfigSource file = included(text);
        return Applier(file).part(place, before, *file.value, "");
      }
      return merged(place, before, part_name(in), empty_config(), path);
    }
    if (!in.is_object()) return in;
    for (const auto& item : in.items()) {
      if (item.key() == kClass || item.key() == kArgs) continue;
      refuse(below(path, item.key()),
             str(below(path, item.key()),
                 " is not known beside class_path and init_args. Options of the ",
                 place.parts->kind(), " go under init_args."));
    }
    const Json& chosen = in.contains(kClass) ? in.at(kClass) : before;
    const std::string name = part_name(chosen);
    if (name.empty()) {
      refuse(path,
             str(path.empty() ? place.name : path, " got ", in.dump(), ", expected the name of a ",
                 place.parts->kind(), ", or {class_path: NAME, init_args: {...}}."));
    }
    return merged(place, before, name, in.contains(kArgs) ? in.at(kArgs) : empty_config(),
                  below(path, kArgs));
  }

  Json merged(const Place& place, const Json& before, const std::string& name, const Json& args,
              const std::string& path) {
    // Words that no part registers are the Trainer's to judge: "gpu" for "cuda", 16 for "16-mixed".
    if (!place.registry_of(name).has(name) && !is_class(name) && args.empty()) return name;
    const auto places = places_of(entry(place, name, path));
    Json out = Json::object();
    const bool same = part_name(before) == name;
    for (const auto& [key, value] : args_of(before).items()) {
      // Another class keeps the options that both know. Source: jsonargparse,
      // `discard_init_args_on_class_path_change`.
      const auto known = std::find_if(places.begin(), places.end(),
                                      [&key = key](const Place& p) { return p.name == key; });
      if (same || (known != places.end() && fits(*known, value))) out[key] = value;
    }
    map(places, out, args, path, "a map of options");
    return as_part(name, std::move(out));
  }

  static bool fits(const Place& place, const Json& value) {
    try {
      place.check(value, place.name);
      return true;
    } catch (const MisconfigurationError&) {
      return false;
    }
  }

  const RegistryBase::Entry& entry(const Place& place, const std::string& name,
                                   const std::string& path) const {
    try {
      return place.registry_of(name).entry(name);
    } catch (const MisconfigurationError& error) {
      refuse(path, str(ends_with(path, kArgs) ? above(path) : path, ": ", error.what()));
    }
  }

  void follow_part(const Place& place, Json& value, std::string rest, const std::string& whole) {
    Json& chosen = value.is_array() && !value.empty() ? value.back() : value;
    const std::string name = part_name(chosen);
    if (rest == kClass) return parts(place, value, *source_.value, whole, false);
    if (name.empty()) {
      const std::string key = whole.substr(0, whole.size() - rest.size() - 1);
      refuse(whole,
             str(whole, " comes before a ", place.parts->kind(), " is named. Write --", key,
                 place.is_list ? "+=" : "=", "NAME first. Known: ", join(place.part_names()), "."));
    }
    Json args = args_of(chosen);
    if (rest == kArgs) {
      map(places_of(entry(place, name, whole)), args, *source_.value, whole, "a map of options");
    } else {
      if (starts_with(rest, std::string(kArgs) + ".")) rest.erase(0, std::string(kArgs).size() + 1);
      follow(places_of(entry(place, name, whole)), args, rest, whole);
    }
    chosen = as_part(name, std::move(args));
  }

  // A key inside a value that is a map: "model.limits.width".
  void follow_value(const Place& place, Json& value, const std::string& rest,
                    const std::string& whole) {
    Json out = value.is_object() ? value : Json::object();
    Json* at = &out;
    for (const auto& key : split(rest, ".")) at = &(*at)[key];
    *at = *source_.value;
    value = checked(place, out, whole.substr(0, whole.size() - rest.size() - 1));
  }

  std::string number_text(const Json& in, const std::string& path) const {
    const auto text = source_.texts.find(path);
    return text == source_.texts.end() ? in.dump() : text->second;
  }

  // A file named in this source, found from where this source lies.
  ConfigSource included(const std::string& name) const {
    const std::filesystem::path path(name);
    const bool here = path.is_absolute() || name[0] == '~' || source_.folder.empty();
    return read_config(here ? name : (std::filesystem::path(source_.folder) / path).string());
  }

  [[noreturn]] void refuse(const std::string& path, const std::string& message) const {
    throw MisconfigurationError(source_.place(path) + message);
  }

  const ConfigSource& source_;
};

// ---- The whole configuration --------------------------------------------------------------------

std::string path_in(const std::string& path, const Json& key) {
  return key.is_number() ? str(path, "[", key.dump(), "]") : below(path, key.get<std::string>());
}

// `f(place, value, path)` for each part that is named in the values, innermost last.
template <class F>
void for_each_part(const std::vector<Place>& places, Json& values, const F& f) {
  if (!values.is_object()) return;
  for (const auto& place : places) {
    if (!values.contains(place.name)) continue;
    Json& value = values[place.name];
    if (place.kind == Place::Kind::kGroup) for_each_part(place.places, value, f);
    if (place.kind != Place::Kind::kPart) continue;
    if (!value.is_array()) f(place, value);
    for (size_t i = 0; value.is_array() && i < value.size(); ++i) f(place, value[i]);
  }
}

// Parts of classes with all of their options.
void complete(const Place& place, Json& value) {
  const std::string name = part_name(value);
  if (name.empty() || !place.registry_of(name).has(name)) return;
  if (!is_class(name) && args_of(value).empty()) return;
  const auto& entry = place.registry_of(name).entry(name);
  const auto options = entry.default_options();
  read_fields(*entry.fields, options.get(), args_of(value), name);
  Json args;
  write_fields(*entry.fields, options.get(), args);
  for_each_part(places_of(entry), args, complete);
  value = Json{{kClass, name}, {kArgs, args}};
}

Json default_args(const RegistryBase::Entry& entry) {
  Json args;
  write_fields(*entry.fields, entry.default_options().get(), args);
  for_each_part(places_of(entry), args, complete);
  return args;
}

// Takes out what equals the defaults.
void prune(const std::vector<Place>& places, Json& values, const Json& defaults) {
  for (const auto& place : places) {
    if (!values.contains(place.name)) continue;
    Json& value = values[place.name];
    const Json fallback = defaults.contains(place.name) ? defaults.at(place.name) : Json();
    if (value == fallback && value.type() == fallback.type()) {
      values.erase(place.name);
    } else if (place.kind == Place::Kind::kGroup && value.is_object()) {
      prune(place.places, value, fallback.is_object() ? fallback : empty_config());
      if (value.empty()) values.erase(place.name);
    }
  }
}

void prune_part(const Place& place, Json& value) {
  const std::string name = part_name(value);
  if (name.empty() || !place.registry_of(name).has(name) || !value.is_object()) return;
  const auto& entry = place.registry_of(name).entry(name);
  Json& args = value[kArgs];
  const auto places = places_of(entry);
  prune(places, args, default_args(entry));
  for_each_part(places, args, prune_part);
  if (args.empty()) value.erase(kArgs);
}

void collect_comments(const std::vector<Place>& places, const Json& values, const std::string& path,
                      std::map<std::string, std::string>& out) {
  if (!values.is_object()) return;
  const auto inside = [&out](const Place& place, const Json& value, const std::string& at) {
    const std::string name = part_name(value);
    if (name.empty() || !place.registry_of(name).has(name)) return;
    const auto& entry = place.registry_of(name).entry(name);
    if (value.is_object() && value.contains(kClass)) out[below(at, kClass)] = entry.help;
    collect_comments(places_of(entry), args_of(value), below(at, kArgs), out);
  };
  for (const auto& place : places) {
    if (!values.contains(place.name)) continue;
    const std::string at = below(path, place.name);
    const Json& value = values.at(place.name);
    const bool typed = place.kind != Place::Kind::kGroup && !place.type.empty();
    out[at] = place.help + (typed ? str(" (type: ", place.type, ")") : "");
    if (place.kind == Place::Kind::kGroup) collect_comments(place.places, value, at, out);
    if (place.kind != Place::Kind::kPart) continue;
    if (!value.is_array()) inside(place, value, at);
    for (size_t i = 0; value.is_array() && i < value.size(); ++i) {
      inside(place, value[i], path_in(at, i));
    }
  }
}

// The registries behind an option's type, as "callback" in "list of callback or null".
std::vector<const RegistryBase*> parts_of_type(const std::string& type, bool& is_list) {
  std::vector<const RegistryBase*> found;
  for (std::string word : split(type, " or ")) {
    const bool list = starts_with(word, "list of ");
    if (list) word.erase(0, 8);
    const RegistryBase* parts = RegistryBase::of_kind(word);
    if (parts == nullptr) continue;
    found.push_back(parts);
    is_list |= list;
  }
  return found;
}

}  // namespace

const RegistryBase& Place::registry_of(const std::string& part) const {
  for (const auto* registry : all_parts) {
    if (registry->has(part)) return *registry;
  }
  return *parts;
}

std::vector<std::string> Place::part_names() const {
  std::vector<std::string> names;
  for (const auto* registry : all_parts) {
    for (const auto& name : registry->names()) names.push_back(name);
  }
  return names;
}

std::string part_name(const Json& value) {
  const Json* named = &value;
  if (value.is_object()) {
    if (!value.contains(kClass)) return "";
    named = &value.at(kClass);
  }
  if (!named->is_string()) return "";
  const auto name = named->get<std::string>();
  return name.substr(name.find_last_of('.') + 1);
}

Json read_and_write(const std::vector<Field>& fields, void* options, const Json& given,
                    const std::string& path) {
  read_fields(fields, options, given, path);
  Json all;
  write_fields(fields, options, all);
  return all;
}

std::vector<Place> places_of(const std::vector<Field>& fields, const Trial& trial) {
  std::vector<Place> places;
  for (const Field& field : fields) {
    Place place;
    place.name = field.name;
    place.help = field.help;
    place.type = field.type;
    place.check = [trial, name = field.name](const Json& value, const std::string& path) {
      return trial(Json{{name, value}}, above(path)).at(name);
    };
    if (field.fields != nullptr) {
      place.kind = Place::Kind::kGroup;
      place.places = places_of(*field.fields, place.check);
    } else if (place.all_parts = parts_of_type(field.type, place.is_list);
               !place.all_parts.empty()) {
      place.parts = place.all_parts.front();
      place.kind = Place::Kind::kPart;
    } else {
      place.is_list = field.type.find("list of ") != std::string::npos;
    }
    places.push_back(std::move(place));
  }
  return places;
}

std::vector<Place> places_of(const RegistryBase::Entry& entry) {
  const auto trial = [fields = entry.fields, make = entry.default_options](
                         const Json& given, const std::string& path) {
    return read_and_write(*fields, make().get(), given, path);
  };
  return places_of(*entry.fields, trial);
}

ConfigTree::ConfigTree(std::vector<Place> places, const Json& defaults)
    : places_(std::move(places)),
      defaults_(std::make_shared<Json>(defaults)),
      values_(std::make_shared<Json>(defaults)) {}

void ConfigTree::apply(const ConfigSource& source) {
  Applier(source).map(places_, *values_, *source.value, "", "a map of options");
}

void ConfigTree::set(const std::string& key, const std::string& text) {
  ConfigSource source;
  try {
    source = parse_config(text);
    std::map<std::string, std::string> texts;
    for (const auto& [path, number] : source.texts) {
      texts[path.empty() ? key : path[0] == '[' ? key + path : below(key, path)] = number;
    }
    source.texts = std::move(texts);
  } catch (const MisconfigurationError&) {  // text that is no YAML, as "[draft"
    source.value = std::make_shared<const Json>(text);
  }
  Json before = *values_;
  try {
    Applier(source).follow(places_, *values_, key, key);
  } catch (const MisconfigurationError&) {
    *values_ = std::move(before);
    // "0,1", "yes" and "2024" are text for an option that takes no list, bool or number.
    if (source.value->is_string()) throw;
    ConfigSource plain;
    plain.value = std::make_shared<const Json>(text);
    before = *values_;
    try {
      Applier(plain).follow(places_, *values_, key, key);
      return;
    } catch (const MisconfigurationError&) {
      *values_ = std::move(before);
    }
    throw;
  }
}

void ConfigTree::check_key(const std::string& key) const {
  const std::vector<Place>* places = &places_;
  for (size_t begin = 0; places != nullptr;) {
    const size_t end = std::min(key.find('.', begin), key.size());
    const Place& place = find_place(*places, key.substr(begin, end - begin), key, "");
    const bool last = end == key.size();
    places = !last && place.kind == Place::Kind::kGroup ? &place.places : nullptr;
    begin = end + 1;
  }
}

Json ConfigTree::values() const {
  Json values = *values_;
  for_each_part(places_, values, complete);
  return values;
}

Json ConfigTree::without_defaults(const Json& values) const {
  Json defaults = *defaults_;
  for_each_part(places_, defaults, complete);
  Json out = values;
  prune(places_, out, defaults);
  for_each_part(places_, out, prune_part);
  return out;
}

std::map<std::string, std::string> ConfigTree::comments(const Json& values) const {
  std::map<std::string, std::string> out;
  collect_comments(places_, values, "", out);
  return out;
}

}  // namespace lightning::cli
