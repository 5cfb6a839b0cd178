#include "tools/lightning/command_line.h"

#include <unistd.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <limits>
#include <sstream>

#include "lightning/checkpoint/mapped_file.h"
#include "lightning/errors.h"
#include "lightning/escaped.h"
#include "lightning/version.h"
#include "tools/lightning/convert.h"
#include "tools/lightning/show.h"
#include "tools/lightning/shown_text.h"
#include "tools/lightning/verify.h"
#include "tools/program/program.h"

namespace lightning::tools {
namespace {

struct ShowArguments {
  std::string path;
  ShowOptions options;
  bool all = false;
};

struct ConvertArguments {
  std::string from, to;
  ConvertOptions options;
};

CLI::App* add_show(CLI::App& checkpoint, ShowArguments& into) {
  auto* show = checkpoint.add_subcommand("show", "Prints what a checkpoint holds.");
  show->footer(
      "Prints a summary (versions, epoch and step, weights, optimizers, callbacks,\n"
      "hyper-parameters, the files of a sharded folder) and the tree with shapes,\n"
      "dtypes and sizes. Opens files of any size at once: no tensor is read and no CRC\n"
      "compared. Nothing in the file is run; objects of Python are shown by name.");
  show->add_option("FILE", into.path,
                   "Of torch.save or a Trainer, of safetensors,\n"
                   "or a folder of torch.distributed.checkpoint")
      ->required();
  auto* depth = show->add_option("-d,--depth", into.options.depth,
                                 "Levels of the tree, 0: the summary alone [2]");
  depth->check(CLI::NonNegativeNumber);
  show->add_flag("-a,--all", into.all, "The tree to its leaves")->excludes(depth);
  show->add_flag("--json", into.options.json, "One JSON object, for programs");
  return show;
}

CLI::App* add_convert(CLI::App& checkpoint, ConvertArguments& into) {
  auto* convert = checkpoint.add_subcommand("convert", "Writes a checkpoint in another format.");
  convert->footer(
      "Formats, and the names of OUT that tell them:\n"
      "  ckpt         NAME.ckpt         a Trainer checkpoint\n"
      "  state_dict   NAME.pt NAME.pth  the weights, by torch.save\n"
      "  safetensors  NAME.safetensors  the weights that are tensors\n"
      "  dcp          NAME/             a folder of torch.distributed.checkpoint\n"
      "\n"
      "Layouts of a dcp folder:\n"
      "  fsdp            as Lightning's FSDPStrategy writes it: model, optimizer_0,\n"
      "                  meta.pt (the default for a Trainer checkpoint)\n"
      "  model_parallel  as its ModelParallelStrategy: state_dict, optimizer_0, meta.pt\n"
      "  plain           each weight under its name (the default for weights alone)\n"
      "\n"
      "The CRCs of the input are compared. The output is complete or not there. What it\n"
      "cannot hold is left out, and said on stderr.");
  convert->add_option("IN", into.from, "Whatever `show` reads")->required();
  convert->add_option("OUT", into.to, "A file or a folder")->required();
  convert->add_option("-f,--format", into.options.format, "Where the name of OUT does not tell");
  convert->add_option("--layout", into.options.layout, "The keys of a dcp folder");
  convert->add_flag("--weights-only", into.options.weights_only,
                    "Leaves out optimizers, schedulers and callbacks");
  convert->add_flag("--force", into.options.force, "Replaces an output that is there");
  return convert;
}

CLI::App* add_verify(CLI::App& checkpoint, std::vector<std::string>& paths) {
  auto* verify =
      checkpoint.add_subcommand("verify", "Reads checkpoints whole and tells what is damaged.");
  verify->footer(
      "Compares every CRC and checks the structure and the claims of every tensor. Prints\n"
      "a line for each: ok with size and count, or what is wrong. Of a sharded folder\n"
      "without meta.pt it says whether a Trainer wrote it, which makes it damaged: fit\n"
      "cannot resume from it.\n"
      "Exit status: 0 all are sound, 1 one is damaged or no checkpoint, 2 one cannot be\n"
      "opened.");
  verify->add_option("FILE", paths, "Files and sharded folders")->required();
  return verify;
}

void run_show(const ShowArguments& arguments, std::ostream& out) {
  auto options = arguments.options;
  if (arguments.all) options.depth = std::numeric_limits<int>::max();
  std::ostringstream text;
  show_checkpoint(CheckpointView::open(arguments.path), options, text);
  check_mapped_files();
  out << text.str();
}

int run_verify(const std::vector<std::string>& paths, std::ostream& out) {
  int status = 0;
  for (const auto& path : paths) {
    try {
      const auto found = verify_checkpoint(path);
      out << "ok      " << escaped(path) << "  " << found.format << ", "
          << counted(found.tensors, "tensor") << ", " << bytes_text(found.bytes) << ", "
          << (found.crcs > 0 ? counted(found.crcs, "CRC") : "no CRCs")
          << (found.note.empty() ? "" : ", ") << found.note << std::endl;
    } catch (const std::exception& error) {
      const bool can_open = ::access(path.c_str(), R_OK) == 0;
      out << (can_open ? "broken  " : "absent  ") << escaped(path) << "  " << message_of(error)
          << std::endl;
      status = std::max(status, can_open ? kBroken : kMisused);
    }
  }
  return status;
}

}  // namespace

int run(const std::vector<std::string>& arguments, std::ostream& out, std::ostream& err) {
  CLI::App app("Tools for what Lightning writes.", "lightning");
  app.require_subcommand(1);
  app.set_version_flag("--version", str("lightning ", kVersion));
  auto* checkpoint = app.add_subcommand("checkpoint", "Shows, converts and verifies checkpoints.");
  checkpoint->require_subcommand(1);
  ShowArguments show_arguments;
  ConvertArguments convert_arguments;
  std::vector<std::string> verify_paths;
  auto* show = add_show(*checkpoint, show_arguments);
  auto* convert = add_convert(*checkpoint, convert_arguments);
  auto* verify = add_verify(*checkpoint, verify_paths);

  return run_program(
      app, arguments,
      [&] {
        if (*verify) return run_verify(verify_paths, out);
        if (*show) run_show(show_arguments, out);
        if (*convert) {
          convert_checkpoint(convert_arguments.from, convert_arguments.to,
                             convert_arguments.options, err);
        }
        return 0;
      },
      out, err);
}

}  // namespace lightning::tools
