// Parts are found by name. A plugin names itself in its own source file:
//
//   const Registration<Strategy> kDDP{"ddp", "Replicates the model on each device; ...",
//       [](const DDPStrategyOptions& options) { return std::make_unique<DDPStrategy>(options); }};
//
// and `registry<Strategy>().make("ddp", config)` makes one. A kind of part has a static
// `kPartKind` ("strategy"). A library that registers itself needs `alwayslink = True`.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <typeindex>
#include <vector>

#include "lightning/options.h"

namespace lightning {

// What the registries of all kinds share, without their types.
class RegistryBase {
 public:
  using Factory = std::function<std::shared_ptr<void>(const void* options)>;

  struct Entry {
    std::string name;
    std::string help;
    const std::vector<Field>* fields;
    std::type_index options_type;
    std::function<std::shared_ptr<void>()> default_options;
    Factory factory;
  };

  explicit RegistryBase(std::string kind);
  RegistryBase(const RegistryBase&) = delete;
  RegistryBase& operator=(const RegistryBase&) = delete;

  // The registry of a kind ("strategy"), for code that has no types, as the command line; null
  // where nothing of that kind was registered or asked for.
  static const RegistryBase* of_kind(const std::string& kind);

  const std::string& kind() const { return kind_; }

  // In alphabetical order.
  std::vector<std::string> names() const;
  bool has(const std::string& name) const;

  // Errors: MisconfigurationError for an unknown name, with its nearest matches; for no linked
  // plugin at all, which target to add.
  const Entry& entry(const std::string& name) const;

  // The name under which a part that takes options of this C++ type was registered first.
  const Entry& entry(std::type_index options_type) const;

 protected:
  // Errors: std::logic_error for a name taken twice, at start-up.
  void add_entry(Entry entry);

  std::shared_ptr<void> make_erased(const std::string& name, const Json& config,
                                    const std::string& where) const;

 private:
  std::string kind_;
  std::vector<std::shared_ptr<const Entry>> entries_;
};

template <class Part>
class Registry : public RegistryBase {
 public:
  Registry() : RegistryBase(Part::kPartKind) {}

  template <class OptionsType, class F>
  void add(std::string name, std::string help, F factory) {
    add_entry({std::move(name), std::move(help), &OptionsType::fields(),
               std::type_index(typeid(OptionsType)), [] { return std::make_shared<OptionsType>(); },
               [factory](const void* options) -> std::shared_ptr<void> {
                 std::shared_ptr<Part> part = factory(*static_cast<const OptionsType*>(options));
                 return part;
               }});
  }

  // Makes the named part from a map of its options. `where` prefixes option names in errors.
  // Errors: MisconfigurationError for an unknown name or option, and whatever the part refuses.
  std::shared_ptr<Part> make(const std::string& name, const Json& config,
                             const std::string& where = "") const {
    return std::static_pointer_cast<Part>(make_erased(name, config, where));
  }
  std::shared_ptr<Part> make(const std::string& name) const;

  // Makes the part that was registered with this type of options.
  std::shared_ptr<Part> make_from_options(std::type_index type, const void* options) const {
    return std::static_pointer_cast<Part>(entry(type).factory(options));
  }
};

const Json& empty_config();

template <class Part>
std::shared_ptr<Part> Registry<Part>::make(const std::string& name) const {
  return make(name, empty_config());
}

template <class Part>
Registry<Part>& registry() {
  static Registry<Part> instance;
  return instance;
}

// Options of a part that has none.
struct NoOptions : Options<NoOptions> {};

namespace detail {
template <class F>
struct FactoryOptions : FactoryOptions<decltype(&F::operator())> {};
template <class C, class R, class O>
struct FactoryOptions<R (C::*)(const O&) const> {
  using type = O;
};
template <class C, class R>
struct FactoryOptions<R (C::*)() const> {
  using type = NoOptions;
};
}  // namespace detail

// Registers a part when the program starts; the options type is the factory's parameter.
template <class Part>
struct Registration {
  template <class F>
  Registration(std::string name, std::string help, F factory) {
    using OptionsType = typename detail::FactoryOptions<F>::type;
    if constexpr (std::is_same<OptionsType, NoOptions>::value) {
      registry<Part>().template add<NoOptions>(std::move(name), std::move(help),
                                               [factory](const NoOptions&) { return factory(); });
    } else {
      registry<Part>().template add<OptionsType>(std::move(name), std::move(help), factory);
    }
  }
};

// A part by name and options, by its typed options, or an object: what a flag holds.
template <class K>
class Part {
 public:
  Part() = default;
  Part(const char* name) : name_(name) {}
  Part(std::string name) : name_(std::move(name)) {}
  Part(std::string name, const Json& config) : name_(std::move(name)), config_(copy(config)) {}
  template <class Derived, std::enable_if_t<std::is_base_of<K, Derived>::value, int> = 0>
  Part(std::shared_ptr<Derived> object) : object_(std::move(object)) {}
  template <class O, std::enable_if_t<is_options<O>::value, int> = 0>
  Part(const O& options) : type_(typeid(O)), options_(std::make_shared<O>(options)) {}

  bool empty() const { return name_.empty() && object_ == nullptr && options_ == nullptr; }

  // The registered name; empty for an object.
  const std::string& name() const { return name_; }
  const std::shared_ptr<K>& object() const { return object_; }

  // Makes the part, or gives the object. `where` is the flag's name, for errors.
  std::shared_ptr<K> make(const std::string& where) const {
    if (object_ != nullptr) return object_;
    if (options_ != nullptr) return registry<K>().make_from_options(type_, options_.get());
    return registry<K>().make(name_, config_ ? *config_ : empty_config(), where);
  }

  void write(Json& out) const;
  void read(const Json& in, const std::string& where);

 private:
  static std::shared_ptr<const Json> copy(const Json& config);

  std::string name_;
  std::shared_ptr<const Json> config_;
  std::type_index type_ = typeid(void);
  std::shared_ptr<const void> options_;
  std::shared_ptr<K> object_;
};

namespace detail {
// Reads "name", or {class_path: name, init_args: {...}}. Python's import paths serve: the name is
// what follows the last dot.
void read_part(const Json& in, const std::string& where, const std::string& kind, std::string& name,
               std::shared_ptr<const Json>& config);
void write_part(Json& out, const RegistryBase& parts, const std::string& name, const Json* config,
                const std::type_index* type, const void* options);
std::shared_ptr<const Json> copy_json(const Json& json);
}  // namespace detail

template <class K>
std::shared_ptr<const Json> Part<K>::copy(const Json& config) {
  return detail::copy_json(config);
}
template <class K>
void Part<K>::write(Json& out) const {
  if (empty()) return json::set_null(out);
  const bool typed = options_ != nullptr;
  const std::string& shown = object_ ? K::kPartKind : name_;
  detail::write_part(out, registry<K>(), object_ ? "<" + shown + " object>" : name_, config_.get(),
                     typed ? &type_ : nullptr, options_.get());
}
template <class K>
void Part<K>::read(const Json& in, const std::string& where) {
  *this = Part();
  detail::read_part(in, where, K::kPartKind, name_, config_);
}

template <class K>
struct Codec<Part<K>> {
  static void write(Json& out, const Part<K>& value) { value.write(out); }
  static void read(const Json& in, Part<K>& value, const std::string& where) {
    value.read(in, where);
  }
  static std::string type() { return K::kPartKind; }
  static bool fits(const Json& in) {
    return json::is(in, "str") || json::is(in, "int") || json::is_map(in);
  }
};

}  // namespace lightning
