// Options are declared once. `OPTION(int64_t, patience, 3, "Checks without improvement ...")` in a
// struct that derives from `Options<Itself>` gives the chained accessors of LibTorch's idiom
// (`.patience(5)` sets, `.patience()` reads) and an entry in `fields()`, the one list that the
// command line, the YAML reader, --print_config, the schema and the hyper-parameter dump all walk.
//
//   struct TimerOptions : Options<TimerOptions> {
//     OPTION(std::string, duration, "", "DD:HH:MM:SS after which the run stops.");
//   };
//
// An options type is default-constructible, so that it can be filled from YAML; what must be given
// is checked by the part it configures, at construction. A type becomes usable as an option by a
// specialisation of `Codec`.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>
#include <type_traits>
#include <utility>
#include <variant>
#include <vector>

#include "lightning/errors.h"

namespace lightning {

// Configuration, whatever it was written in: null, bool, number, string, list, map in order.
using Json = nlohmann::ordered_json;

// The few steps on a Json that templates in headers need, so that json.hpp (1.1 s) stays in
// sources.
namespace json {
void set_null(Json& out);
void set_list(Json& out);
void set_map(Json& out);
Json& append(Json& list);
Json& member(Json& map, const std::string& key);
bool is_null(const Json& in);
bool is_map(const Json& in);
size_t size(const Json& list);
const Json& at(const Json& list, size_t i);
std::vector<std::string> keys(const Json& map);
const Json& at(const Json& map, const std::string& key);
bool is(const Json& in, const char* type);  // "bool", "int", "float", "str", "list", "map", "null"
std::string dump(const Json& in);           // on one line, for messages
}  // namespace json

// How a value of type T is read from and written to configuration.
//
//   read   `where` names the option in errors ("trainer.max_epochs").
//          Errors: MisconfigurationError with the value given and the type expected.
template <class T, class = void>
struct Codec;

#define LIGHTNING_DECLARE_CODEC(T)                                        \
  template <>                                                             \
  struct Codec<T> {                                                       \
    static void write(Json& out, const T& value);                         \
    static void read(const Json& in, T& value, const std::string& where); \
    static std::string type();                                            \
    static bool fits(const Json& in);                                     \
  }

LIGHTNING_DECLARE_CODEC(bool);
LIGHTNING_DECLARE_CODEC(int64_t);
LIGHTNING_DECLARE_CODEC(double);
LIGHTNING_DECLARE_CODEC(std::string);
LIGHTNING_DECLARE_CODEC(Json);

// One option of an options type: its name and help, and access to it in an object of that type.
struct Field {
  std::string name;
  std::string help;
  std::string type;  // as shown in --help: "int", "float or null", "list of str", "callback"
  const std::vector<Field>* fields;  // of an option that holds options itself; else null
  std::function<void(const void* options, Json& out)> write;
  std::function<void(void* options, const Json& in, const std::string& where)> read;
};

// Sets the named options from a map. `where` prefixes names in errors.
// Errors: MisconfigurationError for a name that is not in `fields`, with its nearest matches.
void read_fields(const std::vector<Field>& fields, void* options, const Json& in,
                 const std::string& where);
void write_fields(const std::vector<Field>& fields, const void* options, Json& out);

// The fields of an options type; null for any other type.
template <class T>
const std::vector<Field>* fields_of();

template <class Derived>
struct Options {
  using Self = Derived;

  // In the order of declaration. Learned once, by building one object that notes its options.
  static const std::vector<Field>& fields() {
    static const std::vector<Field> learned = [] {
      std::vector<Field> list;
      learning() = &list;
      static_cast<void>(Derived{});
      learning() = nullptr;
      return list;
    }();
    return learned;
  }
  void write(Json& out) const { write_fields(fields(), static_cast<const Derived*>(this), out); }
  void read(const Json& in, const std::string& where) {
    read_fields(fields(), static_cast<Derived*>(this), in, where);
  }

 protected:
  template <class T, class Default = T>
  static T declare_(const char* name, const char* help, T Derived::*member, Default&& initial) {
    if (learning() != nullptr) {
      learning()->push_back({name, help, Codec<T>::type(), fields_of<T>(),
                             [member](const void* options, Json& out) {
                               Codec<T>::write(out, static_cast<const Derived*>(options)->*member);
                             },
                             [member](void* options, const Json& in, const std::string& where) {
                               Codec<T>::read(in, static_cast<Derived*>(options)->*member, where);
                             }});
    }
    return T(std::forward<Default>(initial));
  }

 private:
  static std::vector<Field>*& learning() {
    thread_local std::vector<Field>* list = nullptr;
    return list;
  }
};

template <class T>
using is_options = std::is_base_of<Options<T>, T>;

template <class T>
const std::vector<Field>* fields_of() {
  if constexpr (is_options<T>::value) return &T::fields();
  return nullptr;
}

#define LIGHTNING_OPTION_(type, name, initial, help)                                  \
 private:                                                                             \
  type name##_ = Self::template declare_<type>(#name, help, &Self::name##_, initial); \
                                                                                      \
 public:                                                                              \
  const type& name() const { return name##_; }                                        \
  Self& name(type value) {                                                            \
    name##_ = std::move(value);                                                       \
    return static_cast<Self&>(*this);                                                 \
  }                                                                                   \
  static_assert(true, "")

// A type with commas is given a name first (`using Limits = std::map<std::string, int64_t>`).
#define OPTION(type, name, initial, help) LIGHTNING_OPTION_(type, name, initial, help)

// ---- Codecs of composed types -------------------------------------------------------------------

template <class T>
struct Codec<std::optional<T>> {
  static void write(Json& out, const std::optional<T>& value) {
    value ? Codec<T>::write(out, *value) : json::set_null(out);
  }
  static void read(const Json& in, std::optional<T>& value, const std::string& where) {
    if (json::is_null(in)) return value.reset();
    Codec<T>::read(in, value.emplace(), where);
  }
  static std::string type() { return Codec<T>::type() + " or null"; }
  static bool fits(const Json& in) { return json::is_null(in) || Codec<T>::fits(in); }
};

// A single value stands for a list of one.
template <class T>
struct Codec<std::vector<T>> {
  static void write(Json& out, const std::vector<T>& values) {
    json::set_list(out);
    for (const T& value : values) Codec<T>::write(json::append(out), value);
  }
  static void read(const Json& in, std::vector<T>& values, const std::string& where) {
    values.clear();
    if (json::is_null(in)) return;
    if (!json::is(in, "list")) return Codec<T>::read(in, values.emplace_back(), where);
    for (size_t i = 0; i < json::size(in); ++i) {
      T value{};
      Codec<T>::read(json::at(in, i), value, str(where, "[", i, "]"));
      values.push_back(std::move(value));
    }
  }
  static std::string type() { return "list of " + Codec<T>::type(); }
  static bool fits(const Json& in) { return json::is(in, "list"); }
};

template <class T>
struct Codec<std::map<std::string, T>> {
  static void write(Json& out, const std::map<std::string, T>& values) {
    json::set_map(out);
    for (const auto& [key, value] : values) Codec<T>::write(json::member(out, key), value);
  }
  static void read(const Json& in, std::map<std::string, T>& values, const std::string& where) {
    values.clear();
    if (json::is_null(in)) return;
    for (const auto& key : json::keys(in)) {
      Codec<T>::read(json::at(in, key), values[key], where + "." + key);
    }
  }
  static std::string type() { return "map of " + Codec<T>::type(); }
  static bool fits(const Json& in) { return json::is_map(in); }
};

// A value of one of several types: the first whose Codec fits. `std::variant<int64_t, double>`
// keeps 1 (one batch) and 1.0 (all of them) apart.
template <class... T>
struct Codec<std::variant<T...>> {
  using Value = std::variant<T...>;
  static void write(Json& out, const Value& value) {
    std::visit([&](const auto& v) { Codec<std::decay_t<decltype(v)>>::write(out, v); }, value);
  }
  static void read(const Json& in, Value& value, const std::string& where) {
    if ((read_as<T>(in, value, where) || ...)) return;
    throw MisconfigurationError(str(where, " got ", json::dump(in), ", expected ", type(), "."));
  }
  static std::string type() { return join({Codec<T>::type()...}, " or "); }
  static bool fits(const Json& in) { return (Codec<T>::fits(in) || ...); }

 private:
  template <class One>
  static bool read_as(const Json& in, Value& value, const std::string& where) {
    if (!Codec<One>::fits(in)) return false;
    One one{};
    Codec<One>::read(in, one, where);
    value = std::move(one);
    return true;
  }
};

template <class T>
struct Codec<T, std::enable_if_t<is_options<T>::value>> {
  static void write(Json& out, const T& value) { value.write(out); }
  static void read(const Json& in, T& value, const std::string& where) { value.read(in, where); }
  static std::string type() { return "map"; }
  static bool fits(const Json& in) { return json::is_map(in); }
};

}  // namespace lightning
