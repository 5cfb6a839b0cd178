// `lightning checkpoint show`.
#pragma once

#include <ostream>

#include "tools/lightning/checkpoint_view.h"

namespace lightning::tools {

struct ShowOptions {
  int depth = 2;  // levels of the tree; 0: the summary alone
  bool json = false;
};

// Prints what a checkpoint holds: a summary (versions, epoch and step, weights, optimizers,
// callbacks, hyper-parameters, the files of a sharded one) and the tree with shapes, dtypes and
// sizes. Everything that comes from the file is escaped().
//
// As JSON one object: path, format, bytes, metadata, files, totals, and `tree`, whose nodes have
// `key`, `type` and, as fits, `value`, `dtype`, `shape`, `bytes`, `shares` (the path of the tensor
// whose memory it is), `chunks`, `entries`. `entries` are left out below the depth.
void show_checkpoint(const CheckpointView& view, const ShowOptions& options, std::ostream& out);

}  // namespace lightning::tools
