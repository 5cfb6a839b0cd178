#include "lightning/registry.h"

#include <algorithm>
#include <nlohmann/json.hpp>

namespace lightning {

const Json& empty_config() {
  static const Json empty = Json::object();
  return empty;
}

namespace {
std::vector<const RegistryBase*>& all_registries() {
  static std::vector<const RegistryBase*> all;
  return all;
}
}  // namespace

RegistryBase::RegistryBase(std::string kind) : kind_(std::move(kind)) {
  all_registries().push_back(this);
}

const RegistryBase* RegistryBase::of_kind(const std::string& kind) {
  for (const auto* one : all_registries()) {
    if (one->kind() == kind) return one;
  }
  return nullptr;
}

void RegistryBase::add_entry(Entry entry) {
  if (has(entry.name)) {
    throw std::logic_error(str("Two plugins register the ", kind_, " \"", entry.name,
                               "\". Link one of them, or rename one."));
  }
  entries_.push_back(std::make_shared<const Entry>(std::move(entry)));
}

std::vector<std::string> RegistryBase::names() const {
  std::vector<std::string> names;
  for (const auto& entry : entries_) names.push_back(entry->name);
  std::sort(names.begin(), names.end());
  return names;
}

bool RegistryBase::has(const std::string& name) const {
  return std::any_of(entries_.begin(), entries_.end(),
                     [&](const auto& entry) { return entry->name == name; });
}

const RegistryBase::Entry& RegistryBase::entry(const std::string& name) const {
  for (const auto& entry : entries_) {
    if (entry->name == name) return *entry;
  }
  if (entries_.empty()) {
    throw MisconfigurationError(
        str("Got ", kind_, " \"", name, "\", but no ", kind_,
            " is linked into this program: add the target that registers it (//:lightning holds "
            "all of this framework's) to the program's deps."));
  }
  throw MisconfigurationError(str("Got ", kind_, " \"", name,
                                  "\", which no linked plugin provides.",
                                  did_you_mean(name, names()), " Known: ", join(names()), "."));
}

const RegistryBase::Entry& RegistryBase::entry(std::type_index options_type) const {
  for (const auto& entry : entries_) {
    if (entry->options_type == options_type) return *entry;
  }
  throw MisconfigurationError(
      str("No linked ", kind_, " takes options of the type given. Known: ", join(names()), "."));
}

std::shared_ptr<void> RegistryBase::make_erased(const std::string& name, const Json& config,
                                                const std::string& where) const {
  const Entry& found = entry(name);
  const auto options = found.default_options();
  read_fields(*found.fields, options.get(), config, where.empty() ? name : where);
  return found.factory(options.get());
}

namespace detail {

std::shared_ptr<const Json> copy_json(const Json& json) {
  return std::make_shared<const Json>(json);
}

void read_part(const Json& in, const std::string& where, const std::string& kind, std::string& name,
               std::shared_ptr<const Json>& config) {
  if (in.is_null()) return;
  const auto last_component = [](const std::string& path) {
    return path.substr(path.rfind('.') == std::string::npos ? 0 : path.rfind('.') + 1);
  };
  if (in.is_number()) {  // precision: 16
    name = in.dump();
    return;
  }
  if (in.is_string()) {
    name = last_component(in.get<std::string>());
    return;
  }
  if (!in.is_object() || !in.contains("class_path") || !in.at("class_path").is_string()) {
    throw MisconfigurationError(str(where, " got ", in.dump(), ", expected the name of a ", kind,
                                    ", or {class_path: NAME, init_args: {...}}."));
  }
  for (const auto& item : in.items()) {
    if (item.key() != "class_path" && item.key() != "init_args") {
      throw MisconfigurationError(str(where, ".", item.key(),
                                      " is not known beside class_path and init_args; options of "
                                      "the ",
                                      kind, " go under init_args."));
    }
  }
  name = last_component(in.at("class_path").get<std::string>());
  if (in.contains("init_args") && !in.at("init_args").is_null()) {
    config = copy_json(in.at("init_args"));
  }
}

void write_part(Json& out, const RegistryBase& parts, const std::string& name, const Json* config,
                const std::type_index* type, const void* options) {
  if (type != nullptr) {
    const auto& entry = parts.entry(*type);
    Json args;
    write_fields(*entry.fields, options, args);
    out = Json{{"class_path", entry.name}, {"init_args", args}};
  } else if (config == nullptr || config->empty()) {
    out = name;
  } else {
    out = Json{{"class_path", name}, {"init_args", *config}};
  }
}

}  // namespace detail
}  // namespace lightning
