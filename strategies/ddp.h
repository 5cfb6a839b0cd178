// A replica of the model on each device; gradients are averaged while backward runs.
//
// Price for P bytes of trained parameters on N ranks: each step an all-reduce of P bytes in buckets
// of bucket_cap_mb, in backward's shadow; memory for the parameters, their gradients, the
// optimizer's state and one copy of the gradients in buckets (none with gradient_as_bucket_view).
// Source: Lightning 2.6, `DDPStrategy`; torch 2.11, `DistributedDataParallel`, whose Reducer this
// drives.
#pragma once

#include <string>

#include "lightning/duration.h"
#include "lightning/options.h"

namespace lightning {

struct DDPStrategyOptions : Options<DDPStrategyOptions> {
  OPTION(bool, find_unused_parameters, false,
         "Whether a step may leave trained parameters out; costs a walk over the graph.");
  OPTION(bool, static_graph, false,
         "Promises that every step uses the same parameters in the same way.");
  OPTION(bool, gradient_as_bucket_view, false,
         "Whether gradients lie in the buckets that are reduced, which saves a copy.");
  OPTION(bool, broadcast_buffers, true,
         "Whether rank 0's buffers go to all ranks before each training step that reduces.");
  OPTION(double, bucket_cap_mb, 25.0, "Size of a bucket of gradients that go together, in MiB.");
  OPTION(std::string, ddp_comm_hook, "",
         "How gradients travel: as they are, or as fp16_compress or bf16_compress.");
  OPTION(std::string, process_group_backend, "", "gloo or nccl; that of the device if not given.");
  OPTION(Duration, timeout, std::string("00:00:30:00"),
         "After what time a collective is an error: DD:HH:MM:SS.");
};

}  // namespace lightning
