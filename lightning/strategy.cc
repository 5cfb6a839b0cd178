#include "lightning/strategy.h"

#include <ATen/Functions.h>
#include <ATen/core/grad_mode.h>
#include <torch/nn/module.h>
#include <torch/optim/optimizer.h>

#include <utility>

#include "lightning/accelerator.h"
#include "lightning/checkpoint/module_state.h"
#include "lightning/data/loader.h"
#include "lightning/distributed/cluster_environment.h"
#include "lightning/errors.h"
#include "lightning/nn/sync_batch_norm.h"
#include "lightning/optim/optimizer_state.h"
#include "lightning/param/deferred_init.h"
#include "lightning/param/left_behind.h"
#include "lightning/param/touch.h"
#include "lightning/param/units.h"

namespace lightning {
namespace {

// Gradients of an optimizer's parameters, in lists of one device and dtype, for which foreach
// operators have one kernel. In the order of the first of each.
using GradientLists = std::vector<std::vector<at::Tensor>>;

GradientLists gradients(torch::optim::Optimizer& optimizer) {
  GradientLists lists;
  const auto list_for = [&lists](const at::Tensor& gradient) -> std::vector<at::Tensor>& {
    for (auto& list : lists) {
      if (list[0].device() == gradient.device() &&
          list[0].scalar_type() == gradient.scalar_type()) {
        return list;
      }
    }
    return lists.emplace_back();
  };
  for (auto& group : optimizer.param_groups()) {
    for (auto& parameter : group.params()) {
      const auto& gradient = parameter.grad();
      if (gradient.defined()) list_for(gradient).push_back(gradient);
    }
  }
  return lists;
}

// Another Trainer's strategy may have the model in parts, as fsdp does, or have left it so.
void refuse_parts(const torch::nn::Module& module) {
  for (const auto& item : module.named_parameters()) {
    if (left_behind(item.value()) != nullptr) {
      throw MisconfigurationError(str(
          "Parameter \"", item.key(),
          "\" was left in parts by a Trainer with the strategy fsdp, and this Trainer's strategy "
          "needs it whole. Give this one strategy=\"fsdp\" too, which takes the parts over; or "
          "load a checkpoint into a module of its own."));
    }
    const auto* const backed = backed_parameter(item.value());
    const auto* const unit =
        backed == nullptr ? nullptr : dynamic_cast<const Unit*>(&backed->backing());
    if (unit == nullptr) continue;
    throw MisconfigurationError(str(
        "Parameter \"", item.key(),
        "\" is kept by another Trainer, whose strategy fsdp has the model in parts, and this "
        "Trainer's strategy needs it whole. Give this one strategy=\"fsdp\" too, which takes the "
        "parts over; or save a checkpoint with the other and load it into a module of its own."));
  }
}

// Of all gradients, on the device of the first.
at::Tensor norm_of(const GradientLists& lists) {
  std::vector<at::Tensor> norms;
  for (const auto& list : lists) {
    for (const auto& norm : at::_foreach_norm(list)) {
      norms.push_back(norm.to(lists[0][0].device()));
    }
  }
  return at::linalg_vector_norm(at::stack(norms), 2);
}

}  // namespace

void Strategy::connect(std::shared_ptr<Accelerator> accelerator,
                       std::shared_ptr<Precision> precision, std::vector<c10::Device> devices,
                       std::shared_ptr<CheckpointIO> checkpoint_io) {
  accelerator_ = std::move(accelerator);
  precision_ = std::move(precision);
  devices_ = std::move(devices);
  checkpoint_io_ = std::move(checkpoint_io);
  precision_->set_device(root_device());
}

void Strategy::connect_processes(std::shared_ptr<ClusterEnvironment>, int64_t num_nodes) {
  const auto processes = static_cast<int64_t>(devices_.size()) * num_nodes;
  if (processes == 1 || has_processes() || world_size() > 1) return;
  throw MisconfigurationError(
      str("Trainer got devices=", devices_.size(), " and num_nodes=", num_nodes,
          " with a strategy that works on one device. Give strategy=\"ddp\" or \"auto\", or "
          "devices=1."));
}

void Strategy::setup_environment() { accelerator_->setup_device(root_device()); }

Strategy::Strategy() = default;
Strategy::~Strategy() = default;

Scope Strategy::module_init_context(std::optional<bool> empty_init) {
  auto dtype = precision_->module_init_context();
  if (!empty_init.value_or(false)) return dtype;
  return both(record_construction(), std::move(dtype));
}

Scope Strategy::record_construction() {
  if (deferred_init_ == nullptr) deferred_init_ = std::make_unique<DeferredInit>(root_device());
  return deferred_init_->record();
}

void Strategy::end_construction() {
  if (deferred_init_ != nullptr && !deferred_init_->is_pending()) deferred_init_.reset();
}

void Strategy::materialize(torch::nn::Module& module) {
  if (deferred_init_ == nullptr) return;
  deferred_init_->materialize(module);
  end_construction();
}

Batch Strategy::materialized(Batch tree) {
  return tree.apply([this](const at::Tensor& tensor) {
    if (deferred_init_ == nullptr || !deferred_init_->is_deferred(tensor)) return tensor;
    at::Tensor value;
    deferred_init_->materialize({tensor},
                                [&](const at::Tensor&, at::Tensor made) { value = made; });
    end_construction();
    return value;
  });
}

Scope Strategy::tensor_init_context() { return precision_->tensor_init_context(); }

void Strategy::setup(torch::nn::Module& module, const ConfigureOptimizers& configure_optimizers) {
  refuse_parts(module);
  materialize(module);
  precision_->convert_module(module);
  module.to(root_device());
  if (!configure_optimizers) return;
  configure_optimizers();
}

Scope Strategy::batch_norm_scope() {
  const bool on = sync_batchnorm_ && world_size() > 1 && at::GradMode::is_enabled();
  return on ? sync_batch_norm(*this) : nullptr;
}

void Strategy::backward(const at::Tensor& loss,
                        const std::function<void(const at::Tensor&)>& run_backward) {
  run_backward(loss);
}

at::Tensor Strategy::optimizer_step(const OptimizerStep& step) {
  return precision_->optimizer_step(step);
}

at::Tensor Strategy::gradient_norm(torch::optim::Optimizer& optimizer) {
  const at::NoGradGuard no_grad;
  const auto lists = gradients(optimizer);
  if (lists.empty()) return at::zeros({}, at::TensorOptions().device(root_device()));
  return norm_of(lists);
}

// As torch.nn.utils.clip_grad_norm_ and clip_grad_value_ do, to the bit: the factor is on the
// device, so that nothing waits for the norm.
void Strategy::clip_gradients(torch::optim::Optimizer& optimizer, double limit,
                              ClipAlgorithm algorithm) {
  const at::NoGradGuard no_grad;
  const auto lists = gradients(optimizer);
  if (lists.empty()) return;
  if (algorithm == ClipAlgorithm::kValue) {
    for (const auto& list : lists) {
      at::_foreach_clamp_min_(list, -limit);
      at::_foreach_clamp_max_(list, limit);
    }
    return;
  }
  const auto factor = gradient_norm(optimizer).add(1e-6).reciprocal().mul(limit).clamp_max(1.0);
  for (const auto& list : lists) {
    at::_foreach_mul_(list, factor.to(list[0].device()));
  }
}

std::shared_ptr<Loader> Strategy::process_dataloader(std::shared_ptr<Loader> loader) {
  return loader;
}

State Strategy::model_state(const torch::nn::Module& module) { return module_state_dict(module); }

void Strategy::load_model_state(torch::nn::Module& module, const State& state, bool strict) {
  materialize(module);
  load_module_state_dict(module, state, strict);
}

State Strategy::optimizer_state(torch::optim::Optimizer& optimizer, const torch::nn::Module&) {
  return optimizer_state_dict(optimizer);
}

void Strategy::load_optimizer_state(torch::optim::Optimizer& optimizer, const torch::nn::Module&,
                                    const State& state) {
  load_optimizer_state_dict(optimizer, state);
}

void Strategy::save_checkpoint(const State& checkpoint, const std::string& path) {
  if (is_global_zero()) checkpoint_io_->save(checkpoint, path);
}

State Strategy::load_checkpoint(const std::string& path) { return checkpoint_io_->load(path); }

void Strategy::remove_checkpoint(const std::string& path) {
  if (is_global_zero()) checkpoint_io_->remove(path);
}

void Strategy::teardown(torch::nn::Module* module,
                        const std::vector<torch::optim::Optimizer*>& optimizers) {
  if (module != nullptr && !root_device().is_cpu()) {
    module->to(at::kCPU);
    // State beside the parameters follows them when it is loaded.
    for (auto* optimizer : optimizers) {
      load_optimizer_state(*optimizer, *module, optimizer_state(*optimizer, *module));
    }
  }
  precision_->teardown();
  accelerator_->teardown();
  checkpoint_io_->teardown();
}

}  // namespace lightning
