// A command line: `program [-c FILE] SUBCOMMAND [-c FILE] [--KEY VALUE] ...`
//
// Files and options count from left to right. "--KEY VALUE" and "--KEY=VALUE" are one;
// "--KEY+=VALUE" adds to a list.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "lightning/cli/config_tree.h"
#include "lightning/cli/help.h"

namespace lightning::cli {

// What a command line asks for.
struct Request {
  std::string subcommand;
  std::shared_ptr<ConfigTree> tree;  // with all that files and options said
  // The options alone, in order: {"model.lr", "1e-3"}.
  std::vector<std::pair<std::string, std::string>> options;
  // To be printed instead of running anything: help, version, configuration.
  std::string output;
};

class CommandLine {
 public:
  using MakeTree = std::function<ConfigTree(const std::string& subcommand)>;

  //   make_tree   the keys of a subcommand with their defaults
  CommandLine(const Program& program, MakeTree make_tree)
      : program_(program), make_tree_(std::move(make_tree)) {}

  // Errors: MisconfigurationError; subcommand() then says how far it came.
  Request read(const std::vector<std::string>& arguments);

  const std::string& subcommand() const { return request_.subcommand; }

 private:
  class Words;

  bool read_before_subcommand(Words& words);
  void choose_subcommand(Words& words);
  void read_option(Words& words);
  std::string print_config() const;
  std::vector<std::string> subcommands() const;

  const Program& program_;
  MakeTree make_tree_;
  Request request_;
  std::vector<ConfigSource> files_;  // given before the subcommand
  std::vector<std::string> flags_;   // of --print_config
  bool prints_ = false;
};

}  // namespace lightning::cli
