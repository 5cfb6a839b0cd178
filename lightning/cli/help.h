// What --help prints.
#pragma once

#include <string>
#include <vector>

#include "lightning/cli/config_tree.h"

namespace lightning::cli {

// A program's name and words for people.
struct Program {
  std::string name;
  std::string description;
  std::string version;
  std::string config_header;  // the first line of configurations that it writes
  std::vector<std::pair<std::string, std::string>> subcommands;  // with their help
};

// "usage: ..." and a line break; `subcommand` may be empty.
std::string usage(const Program& program, const std::string& subcommand);

std::string program_help(const Program& program);

// All options, with their types and the values they have in `values`.
std::string subcommand_help(const Program& program, const std::string& subcommand,
                            const ConfigTree& tree);

// The options of the part `name` that `key` takes; without a name, the parts there are.
// Errors: MisconfigurationError for a key that takes no parts, or an unknown name.
std::string part_help(const ConfigTree& tree, const std::string& key, const std::string& name);

}  // namespace lightning::cli
