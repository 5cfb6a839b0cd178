#include "lightning/hparams.h"

#include <algorithm>
#include <filesystem>
#include <nlohmann/json.hpp>

#include "lightning/files.h"
#include "lightning/python_text.h"
#include "lightning/yaml.h"

namespace lightning {
namespace {

constexpr const char* kClassPath = "_class_path";

bool list_of_maps(const Json& value) {
  return value.is_array() &&
         std::all_of(value.begin(), value.end(), [](const Json& item) { return item.is_object(); });
}

Json sanitized(const Json& value) {
  double number = 0;
  if (travelling_float(value, number)) return number;
  if (value.is_boolean() || value.is_number() || value.is_string()) return value;
  return python_str(value);
}

void flatten(const Json& map, const std::string& prefix, Json& out) {
  for (const auto& [key, value] : map.items()) {
    const std::string name = prefix + key;
    if (value.is_object()) {
      flatten(value, name + "/", out);
    } else if (list_of_maps(value)) {
      for (size_t i = 0; i < value.size(); ++i) flatten(value[i], str(name, "/", i, "/"), out);
    } else {
      out[name] = sanitized(value);
    }
  }
}

// Python's ==: maps compare without their order, 1 equals 1.0.
bool equal(const Json& a, const Json& b) {
  if (a.is_object() && b.is_object()) {
    return a.size() == b.size() && std::all_of(a.items().begin(), a.items().end(), [&](auto& item) {
             return b.contains(item.key()) && equal(item.value(), b[item.key()]);
           });
  }
  if (a.is_array() && b.is_array()) {
    return std::equal(a.begin(), a.end(), b.begin(), b.end(), equal);
  }
  return a == b;
}

bool same_type(const Json& a, const Json& b) {
  return a.type() == b.type() || (a.is_number_integer() && b.is_number_integer());
}

}  // namespace

Json sanitize_hparams(const Json& hparams) {
  Json out = Json::object();
  flatten(hparams, "", out);
  return out;
}

Json merge_hparams(const Json& module, const Json& datamodule) {
  Json merged = Json::object();
  for (const Json* source : {&module, &datamodule}) {
    for (const auto& [key, value] : source->items()) {
      if (key == kClassPath) continue;
      if (merged.contains(key) && !(same_type(merged[key], value) && equal(merged[key], value))) {
        throw MisconfigurationError(
            str("The hyper-parameter \"", key, "\" is ", merged[key].dump(), " in the module and ",
                value.dump(),
                " in the data module. Give both the same value, rename one, or save one of them "
                "with save_hyperparameters(options, /*logger=*/false)."));
      }
      merged[key] = value;
    }
  }
  return merged;
}

void save_hparams_to_yaml(const std::string& path, const Json& hparams) {
  if (!hparams.is_object()) {
    throw MisconfigurationError(
        str("save_hparams_to_yaml got ", hparams.dump(), " for ", path, ", expected a map."));
  }
  write_file(path, to_yaml(hparams));
}

Json load_hparams_from_yaml(const std::string& path) {
  if (!std::filesystem::exists(path)) {
    throw MisconfigurationError(
        str("There are no hyper-parameters at ", path, ". Give the hparams.yaml of a run."));
  }
  const Json loaded = from_yaml(read_file(path), path);
  if (loaded.is_null()) return Json::object();
  if (!loaded.is_object()) {
    throw MisconfigurationError(
        str(path, " holds ", loaded.dump(), ", expected a map of hyper-parameters."));
  }
  return loaded;
}

}  // namespace lightning
