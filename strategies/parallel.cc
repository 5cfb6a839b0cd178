#include "strategies/parallel.h"

#include <ATen/core/grad_mode.h>
#include <torch/nn/module.h>

#include <algorithm>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>
#include <torch/csrc/distributed/c10d/comm.hpp>
#include <utility>

#include "lightning/accelerator.h"
#include "lightning/distributed/collective_wait.h"
#include "lightning/errors.h"
#include "lightning/log.h"

namespace lightning {
namespace {

// As torch's DistributedDataParallel.
constexpr size_t kBroadcastBytes = 250 * 1024 * 1024;

// Name, shape, dtype and whether it is trained, of each parameter and buffer.
State description(const torch::nn::Module& module) {
  State::List all;
  const auto add = [&](const char* kind, const auto& items) {
    for (const auto& item : items) {
      const auto& tensor = item.value();
      if (!tensor.defined()) continue;
      const bool trained = tensor.requires_grad();
      all.emplace_back(
          State::List{State(item.key()), State(str(kind, " ", tensor.sizes(), " of ",
                                                   tensor.dtype(), trained ? ", trained" : ""))});
    }
  };
  add("a parameter", module.named_parameters());
  add("a buffer", module.named_buffers());
  return all;
}

// What the first difference is; empty for none.
std::string difference(const State::List& own, const State::List& of_rank_0) {
  const auto text = [](const State& one, size_t i) { return one.as_list()[i].as_string(); };
  for (size_t i = 0; i < std::max(own.size(), of_rank_0.size()); ++i) {
    if (i >= own.size()) return str("lacks \"", text(of_rank_0[i], 0), "\", which rank 0 has");
    if (i >= of_rank_0.size()) return str("has \"", text(own[i], 0), "\", which rank 0 has not");
    if (text(own[i], 0) != text(of_rank_0[i], 0)) {
      return str("has \"", text(own[i], 0), "\" where rank 0 has \"", text(of_rank_0[i], 0), "\"");
    }
    if (text(own[i], 1) != text(of_rank_0[i], 1)) {
      return str("has \"", text(own[i], 0), "\" as ", text(own[i], 1), ", rank 0 as ",
                 text(of_rank_0[i], 1));
    }
  }
  return "";
}

}  // namespace

ParallelStrategy::ParallelStrategy(std::string backend, const Duration& timeout,
                                   const std::string& option)
    : backend_(std::move(backend)),
      timeout_(
          std::chrono::duration_cast<std::chrono::milliseconds>(parse_duration(timeout, option))) {
  if (timeout_.count() > 0) return;
  throw MisconfigurationError(option + " got no time, expected at least a second.");
}

void ParallelStrategy::connect_processes(std::shared_ptr<ClusterEnvironment> environment,
                                         int64_t num_nodes) {
  environment_ = std::move(environment);
  num_nodes_ = num_nodes;
  place_ = environment_->place(static_cast<int64_t>(devices_.size()), num_nodes);
  if (place_.world_size > 1) World::check(place_);
  precision_->set_device(root_device());
  set_log_rank(static_cast<int>(place_.global_rank));
}

c10::Device ParallelStrategy::root_device() const {
  return devices_.at(static_cast<size_t>(place_.local_rank) % devices_.size());
}

void ParallelStrategy::setup_environment() {
  Strategy::setup_environment();
  if (place_.world_size == 1) return;
  WorldOptions options;
  options.place = place_;
  options.num_nodes = num_nodes_;
  options.processes_per_node = static_cast<int64_t>(devices_.size());
  options.environment = environment_;
  options.device = root_device();
  options.backend = backend_;
  options.timeout = timeout_;
  world_ = &World::join(options);
}

std::optional<SamplerArguments> ParallelStrategy::sampler_arguments() const {
  if (place_.world_size == 1) return std::nullopt;
  return SamplerArguments{place_.world_size, place_.global_rank};
}

// As the original, which has seen Gloo fail on tensors of inference mode.
bool ParallelStrategy::supports_inference_mode() const {
  return world_ == nullptr || !world_->uses_gloo();
}

at::Tensor ParallelStrategy::reduce(const at::Tensor& tensor, ReduceOp op) {
  return world_ ? world_->reduce(tensor, op) : Strategy::reduce(tensor, op);
}
at::Tensor ParallelStrategy::all_gather(const at::Tensor& tensor) {
  return world_ ? world_->all_gather(tensor) : Strategy::all_gather(tensor);
}
at::Tensor ParallelStrategy::all_gather_rows(const at::Tensor& tensor) {
  return world_ ? world_->all_gather_rows(tensor) : Strategy::all_gather_rows(tensor);
}
State ParallelStrategy::broadcast(State value, int64_t source_rank) {
  return world_ ? world_->broadcast(std::move(value), source_rank)
                : Strategy::broadcast(std::move(value), source_rank);
}
std::vector<State> ParallelStrategy::all_gather_states(State value) {
  return world_ ? world_->all_gather_states(std::move(value))
                : Strategy::all_gather_states(std::move(value));
}
void ParallelStrategy::barrier(const std::string& name) {
  if (world_) world_->barrier(name);
}
void ParallelStrategy::wait_for_all(const std::string& name) {
  if (world_) world_->wait_for_all(name);
}
bool ParallelStrategy::reduce_any(bool value) { return world_ ? world_->reduce_any(value) : value; }
bool ParallelStrategy::reduce_all(bool value) { return world_ ? world_->reduce_all(value) : value; }

void ParallelStrategy::continue_alone() {
  world_ = nullptr;
  place_.global_rank = 0;
  place_.world_size = 1;
  set_log_rank(0);
}

void ParallelStrategy::verify_same_module(const torch::nn::Module& module) {
  if (world_ == nullptr) return;
  const Scope call = in_call("the set-up of the strategy");
  const auto own = description(module);
  const auto first = world_->broadcast(own);
  const auto differences =
      world_->all_gather_states(State(difference(own.as_list(), first.as_list())));
  for (size_t rank = 0; rank < differences.size(); ++rank) {
    const auto& text = differences[rank].as_string();
    if (text.empty()) continue;
    throw MisconfigurationError(str("The model of rank ", rank, " ", text,
                                    ". All ranks train one model: build it alike on each."));
  }
}

void ParallelStrategy::broadcast_module(torch::nn::Module& module) {
  std::vector<at::Tensor> tensors;
  for (const auto& tensor : module.parameters()) tensors.push_back(tensor.detach());
  for (const auto& tensor : module.buffers()) {
    if (tensor.defined()) tensors.push_back(tensor.detach());
  }
  broadcast_tensors(tensors);
}

void ParallelStrategy::broadcast_tensors(const std::vector<at::Tensor>& tensors) {
  if (world_ == nullptr || tensors.empty()) return;
  const at::NoGradGuard no_grad;
  wait_together("broadcast of tensors",
                [&] { c10d::broadcast_coalesced(world_->group(), tensors, kBroadcastBytes, 0); });
}

void refuse_foreign_parameter(int64_t number, const at::Tensor& parameter,
                              const std::string& consequence) {
  throw MisconfigurationError(
      str("The optimizer's parameter ", number, " of shape ", parameter.sizes(),
          " is not one of this model, so ", consequence,
          ". Give the optimizer parameters() of the module that is trained."));
}

}  // namespace lightning
