#include "lightning/options.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <nlohmann/json.hpp>

namespace lightning {

namespace json {

void set_null(Json& out) { out = nullptr; }
void set_list(Json& out) { out = Json::array(); }
void set_map(Json& out) { out = Json::object(); }
Json& append(Json& list) { return list.emplace_back(nullptr); }
Json& member(Json& map, const std::string& key) { return map[key]; }
bool is_null(const Json& in) { return in.is_null(); }
bool is_map(const Json& in) { return in.is_object(); }
size_t size(const Json& list) { return list.size(); }
const Json& at(const Json& list, size_t i) { return list.at(i); }
const Json& at(const Json& map, const std::string& key) { return map.at(key); }
std::string dump(const Json& in) { return in.dump(); }

std::vector<std::string> keys(const Json& map) {
  std::vector<std::string> names;
  for (const auto& item : map.items()) names.push_back(item.key());
  return names;
}

bool is(const Json& in, const char* type) {
  const std::string wanted = type;
  if (wanted == "bool") return in.is_boolean();
  if (wanted == "int") return in.is_number_integer();
  if (wanted == "float") return in.is_number();
  if (wanted == "str") return in.is_string();
  if (wanted == "list") return in.is_array();
  if (wanted == "map") return in.is_object();
  return in.is_null();
}

}  // namespace json

namespace {

[[noreturn]] void refuse(const Json& in, const std::string& where, const std::string& type) {
  throw MisconfigurationError(str(where, " got ", in.dump(), ", expected ", type, "."));
}

}  // namespace

void Codec<bool>::write(Json& out, const bool& value) { out = value; }
void Codec<bool>::read(const Json& in, bool& value, const std::string& where) {
  if (!in.is_boolean()) refuse(in, where, "true or false");
  value = in.get<bool>();
}
std::string Codec<bool>::type() { return "bool"; }
bool Codec<bool>::fits(const Json& in) { return in.is_boolean(); }

void Codec<int64_t>::write(Json& out, const int64_t& value) { out = value; }
void Codec<int64_t>::read(const Json& in, int64_t& value, const std::string& where) {
  if (!in.is_number_integer()) refuse(in, where, "an integer");
  if (in.is_number_unsigned() && in.get<uint64_t>() > uint64_t{INT64_MAX}) {
    refuse(in, where, "an integer below 2^63");
  }
  value = in.get<int64_t>();
}
std::string Codec<int64_t>::type() { return "int"; }
bool Codec<int64_t>::fits(const Json& in) { return in.is_number_integer(); }

// JSON has no infinity; it travels as the string that Python and YAML write.
void Codec<double>::write(Json& out, const double& value) {
  if (std::isfinite(value)) {
    out = value;
  } else {
    out = std::isnan(value) ? ".nan" : value > 0 ? ".inf" : "-.inf";
  }
}
void Codec<double>::read(const Json& in, double& value, const std::string& where) {
  if (in.is_number()) {
    value = in.get<double>();
    return;
  }
  const auto text = in.is_string() ? in.get<std::string>() : "";
  if (text == ".inf" || text == "inf") {
    value = INFINITY;
  } else if (text == "-.inf" || text == "-inf") {
    value = -INFINITY;
  } else if (text == ".nan" || text == "nan") {
    value = NAN;
  } else {
    refuse(in, where, "a number");
  }
}
std::string Codec<double>::type() { return "float"; }
bool Codec<double>::fits(const Json& in) {
  static const std::vector<std::string> words = {".inf", "inf", "-.inf", "-inf", ".nan", "nan"};
  return in.is_number() ||
         (in.is_string() && std::count(words.begin(), words.end(), in.get<std::string>()) > 0);
}

void Codec<std::string>::write(Json& out, const std::string& value) { out = value; }
void Codec<std::string>::read(const Json& in, std::string& value, const std::string& where) {
  if (!in.is_string()) refuse(in, where, "a string");
  value = in.get<std::string>();
}
std::string Codec<std::string>::type() { return "str"; }
bool Codec<std::string>::fits(const Json& in) { return in.is_string(); }

void Codec<Json>::write(Json& out, const Json& value) { out = value; }
void Codec<Json>::read(const Json& in, Json& value, const std::string&) { value = in; }
std::string Codec<Json>::type() { return "any"; }
bool Codec<Json>::fits(const Json&) { return true; }

void read_fields(const std::vector<Field>& fields, void* options, const Json& in,
                 const std::string& where) {
  if (in.is_null()) return;
  if (!in.is_object()) refuse(in, where, "a map of options");
  for (const auto& item : in.items()) {
    const auto field = std::find_if(fields.begin(), fields.end(),
                                    [&](const Field& f) { return f.name == item.key(); });
    const auto path = where.empty() ? item.key() : where + "." + item.key();
    if (field == fields.end()) {
      std::vector<std::string> names;
      for (const auto& known : fields) names.push_back(known.name);
      throw MisconfigurationError(str(path, " is not an option.", did_you_mean(item.key(), names),
                                      " Known: ", names.empty() ? "none" : join(names), "."));
    }
    field->read(options, item.value(), path);
  }
}

void write_fields(const std::vector<Field>& fields, const void* options, Json& out) {
  out = Json::object();
  for (const auto& field : fields) field.write(options, out[field.name]);
}

}  // namespace lightning
