// A Trainer checkpoint as a folder that all ranks write together, laid out as Lightning's
// strategies do it: the model and "optimizer_0", "optimizer_1", ... in the files of
// torch.distributed.checkpoint, each rank's part in its own, and all else in meta.pt. States of
// optimizers go by the names of the parameters.
#pragma once

#include <functional>
#include <string>

#include "lightning/checkpoint/state.h"
#include "lightning/distributed/collectives.h"
#include "lightning/distributed/side_channel.h"

namespace lightning {

// A save in two parts. Called by all ranks with their chunks, this one sends what each will write
// to rank 0. All ranks run what it gives, on any thread; no collective is called there. The folder
// is written beside its place and renamed when it is whole; what was there stays until then.
//
//   model_key   under which the weights are: "model", or "state_dict"
// Errors of both parts: CheckpointError of the disk, on all ranks, that of the first rank with one.
std::function<void()> plan_sharded_save(State checkpoint, const std::string& path,
                                        const std::string& model_key, Collectives& ranks,
                                        SideChannel channel);

// Of the ranks among which parameters are cut along dim 0, which one this is.
struct ShardPlace {
  int64_t part = 0;
  int64_t parts = 1;
};

// A folder as CheckpointIO::load() gives it, but tensors have the chunks of the folder, which lie
// in mapped files. Of parameters and of what optimizers keep for each, only what this rank's rows
// need is read and compared with its CRC.
State load_sharded_checkpoint(const std::string& path, const ShardPlace& place);

// A file likewise: mapped, not read. Of its CRCs each rank compares a share, so that a broken file
// is an error of one of them.
State load_file_in_shares(const std::string& path, const Collectives& ranks);

}  // namespace lightning
