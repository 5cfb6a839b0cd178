#include "strategies/shard_state.h"

#include <ATen/core/grad_mode.h>
#include <torch/nn/module.h>
#include <torch/optim/lbfgs.h>

#include <algorithm>
#include <unordered_map>

#include "lightning/checkpoint/module_state.h"
#include "lightning/errors.h"
#include "lightning/optim/optimizer_state.h"
#include "strategies/bulk_copy.h"
#include "strategies/parallel.h"

namespace lightning {
namespace {

TensorState without_chunks(std::vector<int64_t> sizes, at::ScalarType dtype) {
  TensorState state;
  state.sizes = std::move(sizes);
  state.dtype = dtype;
  return state;
}

// `rows` is of the shard's shape.
State shown(const ShardKeeper& shards, const Shard& shard, const at::Tensor& rows, StateKind kind,
            bool is_rank_0) {
  auto state = without_chunks(shard.sizes, rows.scalar_type());
  const bool is_whole = shards.parts() == 1;
  if (kind == StateKind::kFull || is_whole || shard.sizes.empty()) {
    const auto whole = shards.collect(shard, rows);
    if (!is_rank_0) return state;
    return State(whole.detach());
  }
  if (!shards.writes() || shard.rows == 0) return state;
  std::vector<int64_t> offsets(shard.sizes.size(), 0);
  offsets[0] = shard.first_row;
  auto sizes = shard.sizes;
  sizes[0] = shard.rows;
  state.chunks.push_back({std::move(offsets), std::move(sizes), rows.detach()});
  return state;
}

// The box of `to`, which begins at `offsets` of the whole tensor.
// Errors: CheckpointError where the chunks that are here do not cover it.
void copy_box(at::Tensor to, const std::vector<int64_t>& offsets, const TensorState& from,
              BulkCopy& copies) {
  int64_t copied = 0;
  for (const auto& chunk : from.chunks) {
    auto target = to, source = chunk.tensor;
    bool meets = true;
    for (size_t dim = 0; dim < offsets.size() && meets; ++dim) {
      const auto d = static_cast<int64_t>(dim);
      const auto begin = std::max(offsets[dim], chunk.offsets[dim]);
      const auto end =
          std::min(offsets[dim] + to.size(d), chunk.offsets[dim] + chunk.tensor.size(d));
      meets = begin < end;
      if (!meets) break;
      target = target.narrow(d, begin - offsets[dim], end - begin);
      source = source.narrow(d, begin - chunk.offsets[dim], end - begin);
    }
    if (!meets) continue;
    copied += target.numel();
    copies.add(target, source);
  }
  if (copied == to.numel()) return;
  throw CheckpointError(str("The checkpoint's tensor of shape ", c10::IntArrayRef(from.sizes),
                            " was read in parts, of which ", copied, " elements of a box of ",
                            to.sizes(), " at ", c10::IntArrayRef(offsets),
                            " are here: it is a parameter in the checkpoint and another thing in "
                            "this module. Build the module as it was when it was saved."));
}

void copy_rows(const Shard& shard, at::Tensor rows, const TensorState& from, BulkCopy& copies) {
  if (rows.numel() == 0) return;
  std::vector<int64_t> offsets(shard.sizes.size(), 0);
  if (shard.sizes.empty()) {
    rows = rows.view(at::IntArrayRef());
  } else {
    offsets[0] = shard.first_row;
  }
  copy_box(rows, offsets, from, copies);
}

// Calls `f` with each tensor of the optimizer's state that is cut as its parameter is.
template <class F>
void for_each_cut(State& state, const torch::optim::Optimizer& optimizer, ShardKeeper& shards,
                  F&& f) {
  std::vector<const Shard*> by_number;
  for (const auto& group : optimizer.param_groups()) {
    for (const auto& param : group.params()) by_number.push_back(shards.find(param));
  }
  const auto& groups = state.at("param_groups").as_list();
  std::vector<int64_t> numbers;  // of the file
  for (const auto& group : groups) {
    for (const auto& number : group.at("params").as_list()) numbers.push_back(number.as_int());
  }
  if (numbers.size() != by_number.size()) return;  // an error, later
  for (auto& [number, entry] : state.as_dict()["state"].as_dict()) {
    const auto found = std::find(
        numbers.begin(), numbers.end(),
        std::holds_alternative<int64_t>(number) ? std::get<int64_t>(number) : int64_t{-1});
    if (found == numbers.end()) continue;
    const auto* shard = by_number[static_cast<size_t>(found - numbers.begin())];
    for (auto& [key, value] : entry.as_dict()) {
      if (shard == nullptr || !value.template is<TensorState>() || to_string(key) == "step") {
        continue;
      }
      f(*shard, number, key, value);
    }
  }
}

// Numbers in the order of the groups become the parameters' names.
void name_parameters(State& state, const torch::optim::Optimizer& optimizer, ShardKeeper& shards) {
  State::List names;
  for (const auto& group : optimizer.param_groups()) {
    for (const auto& param : group.params()) {
      names.emplace_back(shards.find(param)->parameter->name());
    }
  }
  const auto name_of = [&names](int64_t number) { return names[static_cast<size_t>(number)]; };
  auto states = State::dict();
  for (auto& [number, entry] : state["state"].as_dict()) {
    states[name_of(std::get<int64_t>(number)).as_string()] = std::move(entry);
  }
  state["state"] = std::move(states);
  State::List groups;
  for (auto group : state.at("param_groups").as_list()) {
    State::List params;
    for (const auto& number : group.at("params").as_list()) {
      params.push_back(name_of(number.as_int()));
    }
    group["params"] = std::move(params);
    groups.push_back(std::move(group));
  }
  state["param_groups"] = std::move(groups);
}

using OptimizerStates =
    std::vector<std::pair<void*, std::unique_ptr<torch::optim::OptimizerParamState>>>;

OptimizerStates take_state_of_slices(torch::optim::Optimizer& optimizer,
                                     const ShardKeeper& shards) {
  OptimizerStates taken;
  for (const auto& shard : shards.all()) {
    void* const slice = shard->slice.unsafeGetTensorImpl();
    const auto found = optimizer.state().find(slice);
    if (found == optimizer.state().end()) continue;
    taken.emplace_back(slice, std::move(found->second));
    optimizer.state().erase(slice);
  }
  return taken;
}

}  // namespace

State model_state_of(const torch::nn::Module& module, ShardKeeper& shards, StateKind kind,
                     bool is_rank_0) {
  auto state = module_state_dict(module);
  std::unordered_map<const void*, State> seen;  // tied parameters are gathered once
  const auto names = module.named_parameters();
  for (const auto& item : names) {
    auto* const shard = shards.find(item.value());
    if (shard == nullptr) continue;
    auto& once = seen[shard];
    if (once.is_none()) once = shown(shards, *shard, shard->slice.detach(), kind, is_rank_0);
    state[item.key()] = once;
  }
  if (is_rank_0) return state;
  for (auto& [key, value] : state.as_dict()) {
    const auto& tensor = value.as_tensor_state();
    const bool is_parameter = names.contains(to_string(key));
    if (!is_parameter) value = without_chunks(tensor.sizes, tensor.dtype);
  }
  return state;
}

State optimizer_state_of(torch::optim::Optimizer& optimizer, ShardKeeper& shards, StateKind kind,
                         bool is_rank_0) {
  auto state = optimizer_state_dict(optimizer);
  for_each_cut(state, optimizer, shards,
               [&](const Shard& shard, const auto&, const auto&, State& value) {
                 const auto& rows = value.as_tensor();
                 if (rows.sizes() != shard.slice.sizes()) return;
                 value = shown(shards, shard, rows, kind, is_rank_0);
               });
  if (kind == StateKind::kFull) return state;
  name_parameters(state, optimizer, shards);
  if (is_rank_0) return state;
  for (auto& entry : state["state"].as_dict()) {  // counts of steps, the same on all ranks
    for (auto& [key, value] : entry.second.as_dict()) {
      if (to_string(key) == "step") value = without_chunks({}, value.as_tensor_state().dtype);
    }
  }
  return state;
}

void load_model_state_of(torch::nn::Module& module, ShardKeeper& shards, const State& state,
                         bool strict) {
  BulkCopy copies;
  load_module_state_dict(module, state, strict, [&](const at::Tensor& to, const TensorState& from) {
    if (const auto* shard = shards.find(to)) {
      return copy_rows(*shard, shard->slice.detach(), from, copies);
    }
    copy_box(to.detach(), std::vector<int64_t>(static_cast<size_t>(to.dim()), 0), from, copies);
  });
  copies.run();
}

void load_optimizer_state_of(torch::optim::Optimizer& optimizer, ShardKeeper& shards,
                             const State& state) {
  const at::NoGradGuard no_grad;
  auto own = state;
  BulkCopy copies;
  for_each_cut(own, optimizer, shards,
               [&copies](const Shard& shard, const auto& number, const auto& key, State& value) {
                 const auto& from = value.as_tensor_state();
                 if (from.sizes != shard.sizes) {
                   throw CheckpointError(
                       str("The optimizer state's parameter ", to_string(number), " holds \"",
                           to_string(key), "\" of shape ", c10::IntArrayRef(from.sizes),
                           " for a parameter of shape ", c10::IntArrayRef(shard.sizes),
                           ". Build the model and the optimizer as they were when it was saved."));
                 }
                 auto rows = at::empty_like(shard.slice, shard.slice.options().dtype(from.dtype));
                 copy_rows(shard, rows, from, copies);
                 value = rows;
               });
  copies.run();
  load_optimizer_state_dict(optimizer, own);
}

void give_slices(torch::optim::Optimizer& optimizer, ShardKeeper& shards) {
  bool complete = true;
  int64_t number = 0;
  for (const auto& group : optimizer.param_groups()) {
    for (const auto& param : group.params()) {
      const auto* shard = shards.find(param);
      if (shard == nullptr) {
        refuse_foreign_parameter(number, param,
                                 "the strategy fsdp does not know where its parts are");
      }
      complete = complete && shard->slice.is_same(param);
      ++number;
    }
  }
  if (complete) return;
  if (shards.parts() > 1 && dynamic_cast<const torch::optim::LBFGS*>(&optimizer) != nullptr) {
    throw MisconfigurationError(
        "The optimizer LBFGS computes with all elements of the model at once, which are in shards "
        "here. Use another optimizer, strategy=\"ddp\", or sharding_strategy=\"NO_SHARD\".");
  }
  // Some have state from their construction on, of whole parameters; that of slices holds where
  // parameters were added in the middle of a run.
  auto of_slices = take_state_of_slices(optimizer, shards);
  const auto state = optimizer.state().empty() ? State() : optimizer_state_dict(optimizer);
  optimizer.state().clear();
  for (auto& group : optimizer.param_groups()) {
    for (auto& param : group.params()) param = shards.find(param)->slice;
  }
  if (!state.is_none()) load_optimizer_state_of(optimizer, shards, state);
  for (auto& [slice, of_slice] : of_slices) optimizer.state()[slice] = std::move(of_slice);
}

}  // namespace lightning
