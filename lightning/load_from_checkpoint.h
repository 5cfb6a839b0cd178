// Builds a module or a data module from a checkpoint: its hyper-parameters make the object, its
// state goes into it. No Trainer is needed.
//
//   auto model = load_from_checkpoint<Classifier>("epoch=9-step=990.ckpt");
//   auto wider = load_from_checkpoint<Classifier>(path, LoadOptions().hparam("dropout", 0.0));
//   auto other = load_from_checkpoint<Tagger>(path, LoadOptions().strict(false),
//       [&](const TaggerOptions& options) { return std::make_shared<Tagger>(options, vocabulary);
//       });
//
// Files of Python Lightning and of this framework, plain state dicts, safetensors and sharded
// folders alike. Call it on one thread; building the object draws from the random generators, as
// its constructor does.
// Source: Lightning 2.6, `LightningModule.load_from_checkpoint`; the reference's section 5.5.
#pragma once

#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "lightning/datamodule.h"
#include "lightning/module.h"
#include "lightning/options.h"
#include "lightning/registry.h"

namespace lightning {

class LoadOptions {
 public:
  // A .yaml, .yml or .csv file of hyper-parameters; they replace those of the checkpoint.
  LoadOptions& hparams_file(std::string path);
  // One hyper-parameter; replaces that of the checkpoint and of the file. An option in an option is
  // written with dots: hparam("optimizer.lr", 0.1).
  template <class T>
  LoadOptions& hparam(const std::string& name, const T& value) {
    return set_hparam(name, [&](Json& out) { write(out, value); });
  }
  // Whether every key of the state dict and of the module must be in the other. Default: the
  // module's strict_loading().
  LoadOptions& strict(bool strict);
  // "cpu", "cuda:1": where the module is moved when it is loaded. Default: it stays where its
  // constructor made it, which is the host where that did not ask for more.
  LoadOptions& map_location(std::string device);

 private:
  friend class CheckpointBuilder;

  template <class T>
  static void write(Json& out, const T& value) {
    if constexpr (std::is_same<T, bool>::value || !std::is_arithmetic<T>::value) {
      if constexpr (std::is_convertible<T, std::string>::value) {
        Codec<std::string>::write(out, value);
      } else {
        Codec<T>::write(out, value);
      }
    } else if constexpr (std::is_integral<T>::value) {
      Codec<int64_t>::write(out, static_cast<int64_t>(value));
    } else {
      Codec<double>::write(out, static_cast<double>(value));
    }
  }
  LoadOptions& set_hparam(const std::string& name, const std::function<void(Json&)>& write);

  std::optional<std::string> hparams_file_;
  std::shared_ptr<const Json> hparams_;
  std::optional<bool> strict_;
  std::optional<std::string> map_location_;
};

// A checkpoint that is read and about to become an object. For load_from_checkpoint below.
class CheckpointBuilder {
 public:
  enum class Kind { kModule, kDataModule };

  // Errors: those of reading; MisconfigurationError for a file of hyper-parameters that cannot be
  // read.
  CheckpointBuilder(const std::string& path, const LoadOptions& options, Kind kind);
  ~CheckpointBuilder();

  // The hyper-parameters, merged.
  const Json& hparams() const;
  // Fills an options object. Those that it does not know are left out, with a warning.
  void fill(const std::vector<Field>& fields, void* options) const;
  // Warns of hyper-parameters for an object that takes none.
  void fill_none(const std::string& built) const;
  // The registered module that the checkpoint names, if it does; null otherwise.
  std::shared_ptr<LightningModule> registered_module() const;
  std::shared_ptr<LightningDataModule> registered_datamodule() const;
  // For an object that is of another type than was asked for, or that nothing can build.
  [[noreturn]] void refuse(const std::string& wanted, const std::string& got) const;

  // Loads the checkpoint's state, with the hooks.
  void finish(LightningModule& module);
  void finish(LightningDataModule& datamodule);

 private:
  struct Content;
  std::shared_ptr<void> make_registered(const RegistryBase& parts) const;

  std::unique_ptr<Content> content_;
};

namespace detail {

// Stands for whatever options type a constructor takes, and becomes it.
struct AnyOptions {
  const CheckpointBuilder& builder;
  template <class O, std::enable_if_t<is_options<O>::value, int> = 0>
  operator O() const {
    O options;
    builder.fill(O::fields(), &options);
    return options;
  }
};

template <class M>
constexpr bool is_module() {
  constexpr bool module = std::is_base_of<LightningModule, M>::value;
  static_assert(module || std::is_base_of<LightningDataModule, M>::value,
                "load_from_checkpoint builds a LightningModule or a LightningDataModule");
  return module;
}

template <class M>
std::shared_ptr<M> build_registered(const CheckpointBuilder& builder) {
  const auto part = [&] {
    if constexpr (is_module<M>()) {
      return builder.registered_module();
    } else {
      return builder.registered_datamodule();
    }
  }();
  if (part == nullptr) return nullptr;
  if (auto object = std::dynamic_pointer_cast<M>(part)) return object;
  builder.refuse(class_name(typeid(M)), class_name(typeid(*part)));
}

template <class M>
std::shared_ptr<M> build(const CheckpointBuilder& builder) {
  if (auto object = build_registered<M>(builder)) return object;
  constexpr bool is_base =
      std::is_same<M, LightningModule>::value || std::is_same<M, LightningDataModule>::value;
  if constexpr (!is_base && std::is_constructible<M, AnyOptions>::value) {
    return std::make_shared<M>(AnyOptions{builder});
  } else if constexpr (!is_base && std::is_default_constructible<M>::value) {
    builder.fill_none(class_name(typeid(M)));
    return std::make_shared<M>();
  } else {
    builder.refuse(class_name(typeid(M)), "");
  }
}

template <class M, class Factory>
std::shared_ptr<M> build(const CheckpointBuilder& builder, const Factory& factory) {
  using O = typename FactoryOptions<Factory>::type;
  if constexpr (std::is_same<O, Json>::value) {
    return factory(builder.hparams());
  } else if constexpr (std::is_same<O, NoOptions>::value) {
    builder.fill_none(class_name(typeid(M)));
    return factory();
  } else {
    return factory(static_cast<O>(AnyOptions{builder}));
  }
}

}  // namespace detail

// The object, with the checkpoint's state in it.
//
// Its hyper-parameters are those of the checkpoint, then of `hparams_file`, then of `hparam()`; the
// last that names one wins. They fill the options type that M's constructor takes; an M without
// hyper-parameters is default-constructed. Where the checkpoint names a registered class
// (`_class_path`, as the command line leaves it), that one is built; it must be an M, so that
// load_from_checkpoint<LightningModule>(path) builds whatever the checkpoint is of.
//
// Of a module, configure_model() then runs, on_load_checkpoint() sees the checkpoint, and the
// weights are loaded; of a data module, load_state_dict() is called where the checkpoint has state
// under its name.
//
// Errors: CheckpointError for a file that cannot be read, and for one that does not fit, which
// lists all missing, unexpected and mis-shaped keys before any weight is changed.
// MisconfigurationError for a hyper-parameter of the wrong type, with its name and value; for an
// hparam() that the class does not have; for strict() against the module's own strict_loading();
// for a device that is not there.
template <class M>
std::shared_ptr<M> load_from_checkpoint(const std::string& path, const LoadOptions& options = {}) {
  using Kind = CheckpointBuilder::Kind;
  CheckpointBuilder builder(path, options,
                            detail::is_module<M>() ? Kind::kModule : Kind::kDataModule);
  auto object = detail::build<M>(builder);
  builder.finish(*object);
  return object;
}

// The same with the object made by `factory`, from its options type, from a `const Json&` with all
// hyper-parameters, or from nothing. The class that the checkpoint names has no say then.
template <class M, class Factory>
std::shared_ptr<M> load_from_checkpoint(const std::string& path, const LoadOptions& options,
                                        const Factory& factory) {
  using Kind = CheckpointBuilder::Kind;
  CheckpointBuilder builder(path, options,
                            detail::is_module<M>() ? Kind::kModule : Kind::kDataModule);
  std::shared_ptr<M> object = detail::build<M>(builder, factory);
  builder.finish(*object);
  return object;
}

}  // namespace lightning
