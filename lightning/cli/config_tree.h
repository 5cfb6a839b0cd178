// The configuration of one run: which keys there are, and what sources said about them so far.
//
// Sources are applied from left to right and a later one wins, key by key; lists are replaced as a
// whole. Everything is checked when it is applied, so an error names the file and line that is to
// blame. Parts are checked to their last option: {class_path: EarlyStopping, init_args: {...}}
// against the options that EarlyStopping registered.
// Source: jsonargparse 4.53, as Lightning 2.6's LightningCLI uses it.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "lightning/cli/config_source.h"
#include "lightning/options.h"
#include "lightning/registry.h"

namespace lightning::cli {

// What may stand at a key.
struct Place {
  enum class Kind {
    kValue,  // read by `check`
    kGroup,  // a map of these `places`, or the name of a file that holds one
    kPart    // the name of one of `parts`, {class_path, init_args}, or whatever `check` takes
  };

  std::string name;
  std::string help;
  std::string type;
  Kind kind = Kind::kValue;
  std::vector<Place> places;
  const RegistryBase* parts = nullptr;
  std::vector<const RegistryBase*> all_parts;  // where parts of several kinds may stand: plugins
  bool is_list = false;                        // of parts

  // The value as the option writes it: 1 becomes 1.0 where numbers are meant.
  // Errors: MisconfigurationError that begins with `path`.
  std::function<Json(const Json& value, const std::string& path)> check;

  // The registry that has the part, the first where none has; the names of all.
  const RegistryBase& registry_of(const std::string& part) const;
  std::vector<std::string> part_names() const;
};

// Reads a map of options, whose place is `path`, into a new object and gives all of its options.
using Trial = std::function<Json(const Json& options, const std::string& path)>;

Json read_and_write(const std::vector<Field>& fields, void* options, const Json& given,
                    const std::string& path);

// The places of an options type.
std::vector<Place> places_of(const std::vector<Field>& fields, const Trial& trial);
std::vector<Place> places_of(const RegistryBase::Entry& entry);
template <class O>
std::vector<Place> places_of() {
  return places_of(O::fields(), [](const Json& given, const std::string& path) {
    return read_and_write(O::fields(), std::make_shared<O>().get(), given, path);
  });
}

// The part's name in the value of a kPart, empty where it names none: what follows the last dot.
std::string part_name(const Json& value);

class ConfigTree {
 public:
  //   defaults   a value for each place
  ConfigTree(std::vector<Place> places, const Json& defaults);

  // A file.
  void apply(const ConfigSource& source);

  // A word of the command line: `key` is "trainer.max_epochs", `text` YAML, or the plain text where
  // an option takes that. A key ending in "+" adds to a list. A value for a group or a part may be
  // the name of a file.
  void set(const std::string& key, const std::string& text);

  // Errors: MisconfigurationError for a key that set() would not know.
  void check_key(const std::string& key) const;

  // Every key with its value: what was given, and the defaults, those of parts too.
  Json values() const;
  // Of these, what differs from the defaults. A part keeps its class_path.
  Json without_defaults(const Json& values) const;
  // What --help says about each key that `values` holds, by its path.
  std::map<std::string, std::string> comments(const Json& values) const;

  const std::vector<Place>& places() const { return places_; }

 private:
  std::vector<Place> places_;
  std::shared_ptr<Json> defaults_;
  std::shared_ptr<Json> values_;
};

}  // namespace lightning::cli
