#include "lightning/module.h"

#include <torch/optim/optimizer.h>

#include <unordered_set>

#include "lightning/errors.h"
#include "lightning/log.h"

namespace lightning {
namespace {

[[noreturn]] void not_defined(const char* step) {
  throw MisconfigurationError(str("The module defines no ", step, ". Override it."));
}

}  // namespace

// ---- The steps ----------------------------------------------------------------------------------

StepOutput LightningModule::training_step(const Batch&, int64_t) { not_defined("training_step"); }
StepOutput LightningModule::validation_step(const Batch&, int64_t) {
  not_defined("validation_step");
}
StepOutput LightningModule::validation_step(const Batch& batch, int64_t batch_idx, int64_t) {
  return validation_step(batch, batch_idx);
}
StepOutput LightningModule::test_step(const Batch&, int64_t) { not_defined("test_step"); }
StepOutput LightningModule::test_step(const Batch& batch, int64_t batch_idx, int64_t) {
  return test_step(batch, batch_idx);
}
Batch LightningModule::predict_step(const Batch& batch, int64_t) { return predict_forward(batch); }
Batch LightningModule::predict_step(const Batch& batch, int64_t batch_idx, int64_t) {
  return predict_step(batch, batch_idx);
}
Batch LightningModule::predict_forward(const Batch&) {
  not_defined("predict_step or predict_forward");
}

// ---- Defaults of the hooks ----------------------------------------------------------------------

void LightningModule::on_validation_model_zero_grad() { zero_grad(); }

void LightningModule::optimizer_zero_grad(int64_t, int64_t, torch::optim::Optimizer& optimizer) {
  drop_gradients(optimizer);
}

void LightningModule::backward(const at::Tensor& loss) {
  if (!loss.requires_grad()) {
    throw MisconfigurationError(
        "The loss does not depend on a parameter that is trained: it was computed under no_grad, "
        "detached, or from frozen parameters alone. Return the loss itself, or lightning::skip for "
        "a batch that trains nothing.");
  }
  loss.backward();
}

void LightningModule::configure_gradient_clipping(torch::optim::Optimizer& optimizer,
                                                  std::optional<double> gradient_clip_val,
                                                  const std::optional<std::string>& algorithm) {
  clip_gradients(optimizer, gradient_clip_val, algorithm);
}

void LightningModule::optimizer_step(int64_t, int64_t, LightningOptimizer& optimizer,
                                     const LightningOptimizer::Closure& closure) {
  optimizer.step(closure);
}

void LightningModule::lr_scheduler_step(LRScheduler& scheduler, std::optional<double> metric) {
  metric ? scheduler.step(*metric) : scheduler.step();
}

// ---- What a module may do -----------------------------------------------------------------------

ModuleHost& LightningModule::host(const char* wanted) const {
  if (host_ == nullptr) {
    throw std::runtime_error(
        str(wanted, " was asked of a module that no Trainer runs. Pass it to fit first."));
  }
  return *host_;
}

void LightningModule::log(const std::string& name, const LogValue& value,
                          const LogOptions& options) {
  if (host_ == nullptr) {
    warn_once("log(...) has no effect on a module that no Trainer runs.");
    return;
  }
  host_->log(name, value, options);
}

void LightningModule::log_dict(const std::vector<std::pair<std::string, LogValue>>& values,
                               const LogOptions& options) {
  for (const auto& [name, value] : values) log(name, value, options);
}

void LightningModule::register_metric(const std::string& name, Metric& metric) {
  for (const auto& [known, other] : metrics_) {
    if (known != name || other == &metric) continue;
    throw MisconfigurationError(str("register_metric(\"", name,
                                    "\") got a second metric of this name. Give each its own, for "
                                    "checkpoints find them by it."));
  }
  metrics_.emplace_back(name, &metric);
}

void LightningModule::print_line(const std::string& line) { host("print").print(line); }

at::Tensor LightningModule::all_gather(const at::Tensor& tensor) {
  return host("all_gather").strategy().all_gather(tensor);
}

void LightningModule::manual_backward(const at::Tensor& loss) {
  host("manual_backward").manual_backward(loss);
}

LightningOptimizer& LightningModule::optimizer() {
  const auto all = optimizers();
  if (all.size() != 1) {
    throw MisconfigurationError(str("optimizer() was asked of a module with ", all.size(),
                                    " optimizers. Call optimizers()."));
  }
  return *all[0];
}

std::vector<std::shared_ptr<LightningOptimizer>> LightningModule::optimizers() {
  return host("optimizers").optimizers();
}

std::vector<std::shared_ptr<LRScheduler>> LightningModule::lr_schedulers() {
  return host("lr_schedulers").lr_schedulers();
}

void LightningModule::toggle_optimizer(LightningOptimizer& optimizer) {
  std::unordered_map<const void*, bool> before;
  const auto parameters_of = [](LightningOptimizer& one, auto&& f) {
    for (auto& group : one.optimizer().param_groups()) {
      for (auto& parameter : group.params()) f(parameter);
    }
  };
  for (const auto& other : optimizers()) {
    if (other.get() == &optimizer) continue;
    parameters_of(*other, [&](at::Tensor& parameter) {
      before.emplace(parameter.unsafeGetTensorImpl(), parameter.requires_grad());
      parameter.requires_grad_(false);
    });
  }
  // Parameters that this optimizer shares with another get their own flag back.
  parameters_of(optimizer, [&](at::Tensor& parameter) {
    const auto found = before.find(parameter.unsafeGetTensorImpl());
    if (found != before.end()) parameter.requires_grad_(found->second);
  });
  toggled_ = std::move(before);
}

void LightningModule::untoggle_optimizer(LightningOptimizer& optimizer) {
  for (const auto& other : optimizers()) {
    if (other.get() == &optimizer) continue;
    for (auto& group : other->optimizer().param_groups()) {
      for (auto& parameter : group.params()) {
        const auto found = toggled_.find(parameter.unsafeGetTensorImpl());
        if (found != toggled_.end()) parameter.requires_grad_(found->second);
      }
    }
  }
  toggled_.clear();
}

void LightningModule::clip_gradients(torch::optim::Optimizer& optimizer,
                                     std::optional<double> gradient_clip_val,
                                     const std::optional<std::string>& algorithm) {
  host("clip_gradients").clip_gradients(optimizer, gradient_clip_val, algorithm);
}

void LightningModule::freeze() {
  for (auto& parameter : parameters()) parameter.requires_grad_(false);
  eval();
}

void LightningModule::unfreeze() {
  for (auto& parameter : parameters()) parameter.requires_grad_(true);
  train();
}

// ---- What a module knows ------------------------------------------------------------------------

Trainer& LightningModule::trainer() const {
  auto* trainer = host("trainer()").trainer();
  if (trainer == nullptr) throw std::runtime_error("The module runs without a Trainer.");
  return *trainer;
}

int64_t LightningModule::current_epoch() const {
  return host_ == nullptr ? 0 : host_->current_epoch();
}
int64_t LightningModule::global_step() const { return host_ == nullptr ? 0 : host_->global_step(); }
int64_t LightningModule::global_rank() const {
  return host_ == nullptr ? 0 : host_->strategy().global_rank();
}
int64_t LightningModule::local_rank() const {
  return host_ == nullptr ? 0 : host_->strategy().local_rank();
}

at::Device LightningModule::device() const {
  if (host_ != nullptr) return host_->strategy().root_device();
  const auto all = parameters();
  return all.empty() ? at::Device(at::kCPU) : all[0].device();
}

at::ScalarType LightningModule::dtype() const {
  for (const auto& parameter : parameters()) {
    if (parameter.is_floating_point()) return parameter.scalar_type();
  }
  return c10::typeMetaToScalarType(at::get_default_dtype());
}

std::vector<std::shared_ptr<Logger>> LightningModule::loggers() const {
  return host_ == nullptr ? std::vector<std::shared_ptr<Logger>>() : host_->loggers();
}

std::shared_ptr<DeviceMesh> LightningModule::device_mesh() const {
  return host_ == nullptr ? nullptr : host_->strategy().device_mesh();
}

Optimizers LightningModule::make_optimizers() {
  return optimizer_factory_ ? optimizer_factory_(*this) : configure_optimizers();
}

void LightningModule::ensure_configured() {
  if (configured_) return;
  configure_model();
  configured_ = true;
}

}  // namespace lightning
