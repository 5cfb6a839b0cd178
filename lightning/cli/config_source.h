// A configuration as somebody wrote it: a YAML or JSON file, or a word of the command line.
//
// Typed as the original's command line types it: YAML 1.1 as PyYAML reads it, and "1e-3" a number.
// Unlike there, a key that is written twice is an error, and "10:30:00" is text, not base 60.
#pragma once

#include <map>
#include <memory>
#include <string>

#include "lightning/options.h"

namespace lightning::cli {

struct ConfigSource {
  std::string name;    // for errors, "config.yaml"; empty for the command line
  std::string folder;  // where files that it names are looked for
  std::shared_ptr<const Json> value;
  // Where each key stands, by its path: {"trainer.callbacks[0].class_path", 7}.
  std::map<std::string, int> lines;
  // What numbers look like that PyYAML would take as text: {"model.name", "1e-3"}. An option that
  // takes text and no number gets this.
  std::map<std::string, std::string> texts;

  // "config.yaml:7: " for the key or for the nearest one above it; empty for the command line.
  std::string place(const std::string& path) const;
};

// Errors: MisconfigurationError that begins with NAME:LINE, for bad YAML, for a key written twice,
// for a tag that stands for an object.
ConfigSource parse_config(const std::string& text, const std::string& name = "");
// Errors: as above, and for a file that is missing or cannot be read.
ConfigSource read_config(const std::string& path);

// `value` as YAML in the order of its keys, as PyYAML writes it.
//   comments   lines to set above keys, by their path
std::string write_config(const Json& value,
                         const std::map<std::string, std::string>& comments = {});

}  // namespace lightning::cli
