// `lightning checkpoint convert`.
#pragma once

#include <ostream>
#include <string>

namespace lightning::tools {

struct ConvertOptions {
  // "ckpt", "state_dict", "safetensors" or "dcp"; empty: by the name of the output.
  std::string format;
  // How a sharded folder names what it holds: "fsdp" (Lightning's FSDPStrategy: model, optimizer_0
  // and meta.pt), "model_parallel" (its ModelParallelStrategy: state_dict, optimizer_0, meta.pt) or
  // "plain" (each weight under its name, as dcp.load(model.state_dict()) asks for it). Empty: fsdp
  // for a Trainer checkpoint, plain for weights alone.
  std::string layout;
  bool weights_only = false;  // leaves out what a Trainer saves for resuming
  bool force = false;         // replaces what is there
};

// Writes the checkpoint in another format. Every CRC of the input is compared; the output is
// complete or not there. What the output cannot hold is left out and said on `notes`, a line each:
//
//   ckpt          a Trainer checkpoint, of an older version brought to today's keys
//   state_dict    the weights, as torch.save(model.state_dict())
//   safetensors   the weights that are tensors; tied ones are written under each name
//   dcp           a folder of torch.distributed.checkpoint with one file
//
// Errors: MisconfigurationError for options that make no sense; CheckpointError for a file that is
// there and not to be replaced, for an input that is broken or has no weights, and for optimizers
// whose parameters cannot be told by name, which a sharded folder needs.
void convert_checkpoint(const std::string& from, const std::string& to,
                        const ConvertOptions& options, std::ostream& notes);

}  // namespace lightning::tools
