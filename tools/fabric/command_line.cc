#include "tools/fabric/command_line.h"

#include <CLI/CLI.hpp>

#include "lightning/checkpoint/consolidate.h"
#include "lightning/escaped.h"
#include "lightning/version.h"
#include "tools/program/program.h"

namespace lightning::tools {
namespace {

struct ConsolidateArguments {
  std::string folder, file;
  ConsolidateOptions options;
};

CLI::App* add_consolidate(CLI::App& app, ConsolidateArguments& into) {
  auto* consolidate =
      app.add_subcommand("consolidate", "Turns a sharded checkpoint into one file.");
  consolidate->footer(
      "The file is one that torch.load() reads. Tensors are copied a few MB at a time, so\n"
      "that a checkpoint may be larger than the memory. The CRCs of the folder are\n"
      "compared. The file is complete or not there.");
  consolidate
      ->add_option("CHECKPOINT_FOLDER", into.folder,
                   "That torch.distributed.checkpoint or a sharded run wrote")
      ->required();
  consolidate->add_option("--output_file,-o", into.file, "[CHECKPOINT_FOLDER.consolidated]");
  consolidate->add_flag("--trainer", into.options.as_trainer,
                        "With the keys of a Trainer checkpoint: state_dict, optimizer_states");
  consolidate->add_flag("--overwrite", into.options.overwrite, "Replaces a file that is there");
  return consolidate;
}

int run_consolidate(ConsolidateArguments arguments, std::ostream& out) {
  if (arguments.file.empty()) arguments.file = consolidated_name(arguments.folder);
  consolidate_checkpoint(arguments.folder, arguments.file, arguments.options);
  out << escaped(arguments.file) << std::endl;
  return 0;
}

}  // namespace

int run_fabric(const std::vector<std::string>& arguments, std::ostream& out, std::ostream& err) {
  CLI::App app("Tools for what many processes write.", "fabric");
  app.require_subcommand(1);
  app.set_version_flag("--version", std::string("fabric ") + kVersion);
  ConsolidateArguments consolidate;
  add_consolidate(app, consolidate);
  return run_program(
      app, arguments, [&] { return run_consolidate(consolidate, out); }, out, err);
}

}  // namespace lightning::tools
