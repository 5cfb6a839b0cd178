// A sharded model and its optimizers as state trees, and back from the tree of any run: of one
// process, or of another number of ranks.
#pragma once

#include "lightning/checkpoint/state.h"
#include "lightning/fwd.h"
#include "strategies/shard_keeper.h"

namespace lightning {

enum class StateKind {
  kFull,     // whole tensors in the host memory of rank 0, put together one by one
  kSharded,  // on each rank the chunks that it has
};

// Called by all ranks. Tensors that another rank writes are there without chunks. The sharded state
// of an optimizer goes by the names of parameters, the full one by numbers as in one process.
State model_state_of(const torch::nn::Module& module, ShardKeeper& shards, StateKind kind,
                     bool is_rank_0);
State optimizer_state_of(torch::optim::Optimizer& optimizer, ShardKeeper& shards, StateKind kind,
                         bool is_rank_0);

// Each rank copies its rows. The errors are those of load_module_state_dict() and
// load_optimizer_state_dict().
void load_model_state_of(torch::nn::Module& module, ShardKeeper& shards, const State& state,
                         bool strict);
void load_optimizer_state_of(torch::optim::Optimizer& optimizer, ShardKeeper& shards,
                             const State& state);

// Puts slices in the place of the model's parameters in the optimizer's groups.
// Errors: MisconfigurationError for a parameter that is not of this model, and for an optimizer
// that needs all elements at once (LBFGS) where there are shards.
void give_slices(torch::optim::Optimizer& optimizer, ShardKeeper& shards);

}  // namespace lightning
