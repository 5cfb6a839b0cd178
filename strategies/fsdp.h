// The model in shards: each rank keeps a part of every parameter, of its gradient and of the
// optimizer's state, and parameters are whole only while they are used. No module is wrapped; what
// happens when is told by the model's own operators (lightning/param/units.h). Any LightningModule
// that trains under ddp trains here, with tied, frozen and twice-used parameters.
//
// A parameter is cut along its dim 0 into as many parts of equal size as there are ranks; the last
// ranks may have fewer rows, or none. The optimizer holds the slices, so one that looks at a whole
// parameter at a time (a norm over it, a matrix factorisation) computes with this rank's rows.
// All ranks must use the same parameters in the same order.
//
// Price for P bytes of parameters in the dtype they compute in, on N ranks, FULL_SHARD: each step
// two gathers and one reduce-scatter of P (N-1)/N bytes; memory for 1/N of parameters, gradients
// and optimizer state, the root unit and two more units. SHARD_GRAD_OP: one gather less, P bytes of
// parameters from forward to backward. NO_SHARD: ddp's price.
//
// With cpu_offload (the strategy fsdp_cpu_offload) a GPU holds the root unit and two or three more,
// whatever the size of the model: shards, gradients and optimizer state are in the host's memory
// (shards and gradients pinned), and the optimizer steps there. Each step every rank's shard goes
// to the GPU twice, and its gradients come back once, beside what the GPU computes. Gradients of an
// accumulation stay on the GPU, whole, until its last batch.
//
// Under bf16-mixed and 16-mixed the optimizer has slices in float32; matrices are gathered, and
// their gradients reduced, in 16 bits. Parameters of one dim and buffers stay in float32. A step of
// 16-mixed whose gradients are not finite on one rank is left out on all.
//
// Outside of steps a parameter's elements cannot be read: whole_parameters() opens them. Gradients
// are in the slices of the optimizer's param_groups(), and grad() of the model's own parameters is
// undefined. Buffers that a step changes are each rank's own (running statistics: sync_batchnorm).
//
// Shards go with the model: another Trainer of this strategy takes them over, on all ranks, also
// where the one that made them is gone. The optimizer's state stays with its Trainer.
//
// Source: Lightning 2.6, `FSDPStrategy`.
#pragma once

#include <string>
#include <vector>

#include "lightning/duration.h"
#include "lightning/fwd.h"
#include "lightning/options.h"
#include "lightning/scope.h"

namespace lightning {

struct FSDPStrategyOptions : Options<FSDPStrategyOptions> {
  OPTION(
      std::string, sharding_strategy, "FULL_SHARD",
      "FULL_SHARD: parameters, gradients and optimizer state in shards; SHARD_GRAD_OP: likewise, "
      "parameters whole from forward to backward; NO_SHARD: each rank has all; HYBRID_SHARD: "
      "FULL_SHARD in groups of ranks, which are replicas.");
  OPTION(std::vector<int64_t>, device_mesh, {},
         "For HYBRID_SHARD: the number of groups and the number of ranks of each; ranks of a group "
         "follow each other.");
  OPTION(std::vector<std::string>, auto_wrap_policy, {},
         "Types or names of modules whose parameters are gathered together; the model's own "
         "repeated blocks if not given.");
  OPTION(std::vector<std::string>, activation_checkpointing_policy, {},
         "Types or names of modules whose activations are computed anew in backward.");
  OPTION(
      std::string, state_dict_type, "full",
      "full: checkpoints are one file, put together on rank 0; sharded: a folder into which each "
      "rank writes its part.");
  OPTION(bool, cpu_offload, false,
         "Keeps shards, their gradients and the optimizer's state in host memory, where the "
         "optimizer steps. No effect where the device is the CPU.");
  OPTION(std::string, checkpoint_layout, "fsdp",
         "How a sharded checkpoint names the model, for Python to read: fsdp: \"model\", as "
         "Lightning's FSDPStrategy; model_parallel: \"state_dict\", as its ModelParallelStrategy. "
         "Both are read.");
  OPTION(std::string, process_group_backend, "", "gloo or nccl; that of the device if not given.");
  OPTION(Duration, timeout, std::string("00:00:30:00"),
         "After what time a collective is an error: DD:HH:MM:SS.");
};

// Makes all parameters of the strategy's model whole while it lives, in the dtype they compute in.
// Called by all ranks at the same time; there must be memory for the whole model. No effect under
// strategies that keep parameters whole.
//
//   write   what is written into parameters meanwhile counts
Scope whole_parameters(Strategy& strategy, bool write = false);

}  // namespace lightning
