#include "lightning/load_from_checkpoint.h"

#include <ATen/Context.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cctype>
#include <cstdlib>
#include <filesystem>
#include <map>
#include <nlohmann/json.hpp>
#include <sstream>
#include <typeinfo>

#include "lightning/checkpoint/checkpoint_file.h"
#include "lightning/checkpoint/migration.h"
#include "lightning/checkpoint/module_state.h"
#include "lightning/files.h"
#include "lightning/hparams.h"
#include "lightning/hparams_state.h"
#include "lightning/log.h"
#include "lightning/yaml.h"

namespace lightning {

// ---- What to load -------------------------------------------------------------------------------

LoadOptions& LoadOptions::hparams_file(std::string path) {
  hparams_file_ = std::move(path);
  return *this;
}

LoadOptions& LoadOptions::strict(bool strict) {
  strict_ = strict;
  return *this;
}

LoadOptions& LoadOptions::map_location(std::string device) {
  map_location_ = std::move(device);
  return *this;
}

LoadOptions& LoadOptions::set_hparam(const std::string& name,
                                     const std::function<void(Json&)>& write) {
  Json all = hparams_ == nullptr ? Json::object() : *hparams_;
  Json value;
  write(value);
  all[name] = value;
  hparams_ = std::make_shared<const Json>(std::move(all));
  return *this;
}

// ---- Files of hyper-parameters ------------------------------------------------------------------

namespace {

// A value in a table of tags, where Python evaluates literals and takes the rest as text.
Json tag_value(const std::string& text, const std::string& where) {
  static const std::map<std::string, Json> words = {
      {"True", true}, {"False", false}, {"None", nullptr}, {"", ""}};
  const auto word = words.find(text);
  if (word != words.end()) return word->second;
  if (std::string("[{('\"").find(text[0]) != std::string::npos) {
    std::string list = text;
    if (list.front() == '(' && list.back() == ')') {
      list.front() = '[';
      list.back() = ']';
    }
    try {
      return from_yaml(list, where);
    } catch (const MisconfigurationError&) {
      return text;
    }
  }
  char* end = nullptr;
  const auto integer = std::strtoll(text.c_str(), &end, 10);
  if (*end == '\0' && std::to_string(integer) == text) return integer;
  const double number = std::strtod(text.c_str(), &end);
  const bool is_number = *end == '\0' && text.find_first_of("0123456789") != std::string::npos &&
                         text.find_first_of("xXpP") == std::string::npos;
  if (!is_number) return text;
  return number;
}

// The fields of one line; text in quotes may hold commas and doubled quotes.
std::vector<std::string> split_csv(const std::string& line) {
  std::vector<std::string> fields(1);
  bool quoted = false;
  for (size_t i = 0; i < line.size(); ++i) {
    if (line[i] == '"' && quoted && i + 1 < line.size() && line[i + 1] == '"') {
      fields.back() += line[++i];
    } else if (line[i] == '"') {
      quoted = !quoted;
    } else if (line[i] == ',' && !quoted) {
      fields.emplace_back();
    } else if (line[i] != '\r') {
      fields.back() += line[i];
    }
  }
  return fields;
}

// "key,value" and a line for each. Source: Lightning 2.6, `load_hparams_from_tags_csv`.
Json read_tags(const std::string& path) {
  if (!std::filesystem::exists(path)) {
    throw MisconfigurationError(
        str("There are no hyper-parameters at ", path, ". Give the file of a run."));
  }
  std::istringstream text(read_file(path));
  Json tags = Json::object();
  std::string line;
  for (int64_t number = 1; std::getline(text, line); ++number) {
    if (number == 1 || line.empty() || line == "\r") continue;
    const auto fields = split_csv(line);
    if (fields.size() < 2) {
      throw MisconfigurationError(
          str(path, " line ", number, " is \"", line, "\", expected a key, a comma and a value."));
    }
    tags[fields[0]] = tag_value(fields[1], str(path, " line ", number));
  }
  return tags;
}

Json read_hparams(const std::string& path) {
  std::string extension = std::filesystem::path(path).extension().string();
  std::transform(extension.begin(), extension.end(), extension.begin(),
                 [](unsigned char c) { return static_cast<char>(std::tolower(c)); });
  if (extension == ".csv") return read_tags(path);
  if (extension == ".yaml" || extension == ".yml") return load_hparams_from_yaml(path);
  throw MisconfigurationError(
      str("hparams_file got \"", path, "\", expected a name that ends in .yaml, .yml or .csv."));
}

std::string last_component(const std::string& path) {
  return path.substr(path.rfind('.') == std::string::npos ? 0 : path.rfind('.') + 1);
}

const Field* find_field(const std::vector<Field>& fields, const std::string& name) {
  const auto found = std::find_if(fields.begin(), fields.end(),
                                  [&](const Field& field) { return field.name == name; });
  return found == fields.end() ? nullptr : &*found;
}

// What the options know, and the names of the rest, with those of options inside options.
Json known_part(const std::vector<Field>& fields, const Json& hparams, const std::string& prefix,
                std::vector<std::string>& unknown) {
  Json known = Json::object();
  for (const auto& [key, value] : hparams.items()) {
    const Field* field = find_field(fields, key);
    if (field == nullptr) {
      unknown.push_back(prefix + key);
    } else if (field->fields != nullptr && value.is_object()) {
      known[key] = known_part(*field->fields, value, prefix + key + ".", unknown);
    } else {
      known[key] = value;
    }
  }
  return known;
}

// Errors: MisconfigurationError for a name that the options do not have.
void require_known(const std::vector<Field>& fields, const std::string& name) {
  const auto dot = name.find('.');
  const std::string head = name.substr(0, dot);
  const Field* field = find_field(fields, head);
  if (field == nullptr) {
    std::vector<std::string> names;
    for (const auto& known : fields) names.push_back(known.name);
    throw MisconfigurationError(
        str("LoadOptions().hparam got \"", name, "\", which is not an option of what is loaded.",
            did_you_mean(head, names), " Known: ", names.empty() ? "none" : join(names), "."));
  }
  if (dot != std::string::npos && field->fields != nullptr) {
    require_known(*field->fields, name.substr(dot + 1));
  }
}

void assign(Json& hparams, const std::string& name, const Json& value) {
  const auto dot = name.find('.');
  if (dot == std::string::npos) {
    hparams[name] = value;
    return;
  }
  Json& inner = hparams[name.substr(0, dot)];
  if (!inner.is_object()) inner = Json::object();
  assign(inner, name.substr(dot + 1), value);
}

c10::Device device_of(const std::string& name) {
  const auto refuse = [&](const std::string& expected) -> c10::Device {
    throw MisconfigurationError(str("map_location got \"", name, "\", expected ", expected, "."));
  };
  std::optional<c10::Device> device;
  try {
    device = c10::Device(name);
  } catch (const c10::Error&) {
    return refuse("a device such as \"cpu\" or \"cuda:0\"");
  }
  if (!device->is_cuda()) return *device;
  if (!at::hasCUDA()) return refuse("\"cpu\": no CUDA device is there");
  const auto count = static_cast<int64_t>(at::getNumGPUs());
  if (device->index() >= count)
    return refuse(str("an index below ", count,
                      ", as many GPUs are "
                      "there"));
  return *device;
}

// The names that this kind of object has in a checkpoint.
struct Keys {
  const char* hparams;
  const char* name;
};
Keys keys_of(CheckpointBuilder::Kind kind) {
  return kind == CheckpointBuilder::Kind::kModule
             ? Keys{"hyper_parameters", "hparams_name"}
             : Keys{"datamodule_hyper_parameters", "datamodule_hparams_name"};
}

void merge(Json& into, const State* saved) {
  if (saved == nullptr) return;
  const Json plain = hparams_from_state(*saved);
  if (plain.is_object()) into.update(plain);
}

}  // namespace

// ---- From a checkpoint to an object -------------------------------------------------------------

struct CheckpointBuilder::Content {
  std::string path;
  LoadOptions options;
  State checkpoint;
  std::optional<c10::Device> device;
  Json hparams = Json::object();
  std::string class_path;
  std::string argument;  // of the constructor, that takes all of them; else empty
};

CheckpointBuilder::CheckpointBuilder(const std::string& path, const LoadOptions& options, Kind kind)
    : content_(std::make_unique<Content>()) {
  content_->path = path;
  content_->options = options;
  if (options.map_location_) content_->device = device_of(*options.map_location_);
  content_->checkpoint = as_trainer_checkpoint(read_checkpoint_file(path), detect_format(path));
  migrate_checkpoint(content_->checkpoint, path);
  const State& checkpoint = content_->checkpoint;
  const Keys keys = keys_of(kind);
  Json& hparams = content_->hparams;
  if (kind == Kind::kModule) {  // names of old versions
    merge(hparams, checkpoint.find("hparams"));
    merge(hparams, checkpoint.find("module_arguments"));
  }
  merge(hparams, checkpoint.find(keys.hparams));
  if (options.hparams_file_) hparams.update(read_hparams(*options.hparams_file_));
  if (options.hparams_ != nullptr) {
    for (const auto& [name, value] : options.hparams_->items()) assign(hparams, name, value);
  }
  if (hparams.contains("_class_path") && hparams["_class_path"].is_string()) {
    content_->class_path = hparams["_class_path"].get<std::string>();
  }
  hparams.erase("_class_path");
  hparams.erase("_instantiator");
  const State* name = checkpoint.find(keys.name);
  if (name != nullptr && name->is<std::string>()) content_->argument = name->as_string();
}

CheckpointBuilder::~CheckpointBuilder() = default;

const Json& CheckpointBuilder::hparams() const { return content_->hparams; }

void CheckpointBuilder::fill(const std::vector<Field>& fields, void* options) const {
  const auto& overrides = content_->options.hparams_;
  Json hparams = content_->hparams;
  // A Python constructor that takes all of them as one argument.
  if (find_field(fields, content_->argument) != nullptr && !hparams.contains(content_->argument)) {
    hparams = Json{{content_->argument, hparams}};
  }
  if (overrides != nullptr) {
    for (const auto& item : overrides->items()) require_known(fields, item.key());
  }
  std::vector<std::string> unknown;
  const Json known = known_part(fields, hparams, "", unknown);
  if (!unknown.empty()) {
    warn(str(content_->path,
             " holds hyper-parameters that what is loaded does not have; they are "
             "left out: ",
             join(unknown), "."));
  }
  try {
    read_fields(fields, options, known, "");
  } catch (const MisconfigurationError& error) {
    throw MisconfigurationError(str("Cannot take the hyper-parameters of ", content_->path, ": ",
                                    error.what(),
                                    " Give another value with "
                                    "LoadOptions().hparam(name, value)."));
  }
}

void CheckpointBuilder::fill_none(const std::string& built) const {
  const auto& overrides = content_->options.hparams_;
  if (overrides != nullptr && !overrides->empty()) {
    throw MisconfigurationError(
        str("LoadOptions().hparam got \"", overrides->begin().key(), "\", but ", built,
            " takes no hyper-parameters: its constructor has no options type. Give one to it, or a "
            "factory to load_from_checkpoint."));
  }
  if (content_->hparams.empty()) return;
  std::vector<std::string> names;
  for (const auto& item : content_->hparams.items()) names.push_back(item.key());
  warn(str(content_->path, " holds hyper-parameters, but ", built,
           " takes none; they are left out: ", join(names), "."));
}

std::shared_ptr<void> CheckpointBuilder::make_registered(const RegistryBase& parts) const {
  const std::string name = last_component(content_->class_path);
  if (name.empty() || !parts.has(name)) return nullptr;
  const auto& entry = parts.entry(name);
  const auto options = entry.default_options();
  fill(*entry.fields, options.get());
  return entry.factory(options.get());
}

std::shared_ptr<LightningModule> CheckpointBuilder::registered_module() const {
  return std::static_pointer_cast<LightningModule>(make_registered(registry<LightningModule>()));
}

std::shared_ptr<LightningDataModule> CheckpointBuilder::registered_datamodule() const {
  return std::static_pointer_cast<LightningDataModule>(
      make_registered(registry<LightningDataModule>()));
}

void CheckpointBuilder::refuse(const std::string& wanted, const std::string& got) const {
  if (!got.empty()) {
    throw MisconfigurationError(str(content_->path, " is of the class \"", content_->class_path,
                                    "\", which is registered as a ", got, " and is no ", wanted,
                                    ". Load it as ", got, ", or give a factory."));
  }
  const std::string named = content_->class_path.empty()
                                ? "names no class"
                                : str("names the class \"", content_->class_path,
                                      "\", which is not registered in this program");
  throw MisconfigurationError(
      str("Cannot build a ", wanted, " from ", content_->path,
          ": it has no constructor that takes "
          "its options alone or nothing, and the checkpoint ",
          named, ". Load it as a class that has one, or give a factory to load_from_checkpoint."));
}

void CheckpointBuilder::finish(LightningModule& module) {
  const auto& options = content_->options;
  if (options.strict_ && module.strict_loading_is_set() &&
      *options.strict_ != module.strict_loading()) {
    const auto word = [](bool strict) { return strict ? "true" : "false"; };
    throw MisconfigurationError(str("LoadOptions().strict(", word(*options.strict_),
                                    ") is in conflict with set_strict_loading(",
                                    word(module.strict_loading()), ") of the module ",
                                    module.name(), ". Set the same value for both of them."));
  }
  const bool strict = options.strict_.value_or(module.strict_loading());
  module.ensure_configured();
  module.on_load_checkpoint(content_->checkpoint);
  const State* state = content_->checkpoint.find("state_dict");
  if (state == nullptr) {
    throw CheckpointError(str("Cannot load ", content_->path, ": it has no \"state_dict\"."));
  }
  IncompatibleKeys keys;
  try {
    keys = load_module_state_dict(module, *state, strict);
  } catch (const CheckpointError& error) {
    throw CheckpointError(str("Cannot load ", content_->path, ": ", error.what()));
  }
  if (!keys.missing.empty()) {
    warn("Found keys that are in the model state dict but not in the checkpoint: " +
         join(keys.missing));
  }
  if (!keys.unexpected.empty()) {
    warn("Found keys that are not in the model state dict but in the checkpoint: " +
         join(keys.unexpected));
  }
  if (state->empty()) {
    warn(str("The state dict in ", content_->path, " contains no parameters."));
  }
  if (content_->device) module.to(*content_->device);
}

void CheckpointBuilder::finish(LightningDataModule& datamodule) {
  const State* state = content_->checkpoint.find(class_name(typeid(datamodule)));
  if (state != nullptr) datamodule.load_state_dict(*state);
}

}  // namespace lightning
