#include "lightning/optim/fused_step.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/_foreach_add.h>
#include <ATen/ops/_foreach_sub.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros_like.h>
#include <torch/optim/optimizer.h>

#include <optional>
#include <utility>
#include <vector>

#include "lightning/optim/fused_kernels.h"
#include "lightning/optim/fused_state.h"
#include "lightning/optim/python_step.h"
#include "lightning/optim/recorded_step.h"
#include "lightning/param/working_copy.h"
#include "lightning/recording.h"

namespace lightning {
namespace fused {
namespace {

constexpr const char* kOwnStep = "the optimizer takes a step of its own, with numbers of the host";

// ---- What the kernels take ----------------------------------------------------------------------

bool fits(Kind kind, const Optimizer& optimizer, const at::Tensor& param) {
  const auto is_like_param = [&param](const at::Tensor& tensor) {
    return tensor.layout() == at::kStrided && tensor.device() == param.device() &&
           tensor.scalar_type() == param.scalar_type() && tensor.sizes() == param.sizes();
  };
  if (!param.is_floating_point() || !is_like_param(param) || !is_like_param(param.grad()) ||
      !param.is_non_overlapping_and_dense()) {
    return false;
  }
  auto* const state = state_of(optimizer, param);
  if (state == nullptr) return kind != Kind::kAdagrad;  // which makes its sums when it is built
  for (const auto* moment : moments_of(kind, *state).all) {
    if (moment != nullptr && moment->defined() && !is_like_param(*moment)) return false;
  }
  return true;
}

// Where the operators' bits are those of Python's default.
bool fits_on_cpu(Kind kind, const OptimizerOptions& options, const at::Tensor& param) {
  return kind == Kind::kSGD && moments_wanted(kind, options) == 0 &&
         (param.scalar_type() == at::kFloat || param.scalar_type() == at::kDouble) &&
         param.is_contiguous() && param.grad().is_contiguous();
}

// Whether every parameter that has a gradient can be stepped by a kernel: all on GPUs, or all on
// the CPU.
bool can_fuse(Kind kind, const Optimizer& optimizer, bool on_cuda) {
  if (kind == Kind::kOther) return false;
  bool can = true;
  for_each_gradient(optimizer, [&](const OptimizerOptions& options, const at::Tensor& param) {
    can = can && (on_cuda ? param.is_cuda() : param.is_cpu()) && fits(kind, optimizer, param) &&
          (on_cuda || fits_on_cpu(kind, options, param));
  });
  return can;
}

void unscale(const Optimizer& optimizer, const at::Tensor& grad_scale) {
  if (!grad_scale.defined()) return;
  for_each_gradient(optimizer, [&](const OptimizerOptions&, const at::Tensor& param) {
    param.grad().div_(grad_scale.to(param.device()));
  });
}

// ---- One step -----------------------------------------------------------------------------------

class Step {
 public:
  Step(Optimizer& optimizer, Kind kind, bool recording, const StepAids& aids)
      : optimizer_(optimizer), kind_(kind), recording_(recording), aids_(aids) {}

  void run() {
    prepare_scaler();
    if (recording_) {
      recorded_ = RecordedStep::find(optimizer_);
      if (recorded_ == nullptr) throw CannotRecord("no learning rate was uploaded");
    }
    for (size_t i = 0; i < optimizer_.param_groups().size(); ++i) collect(i);
    for (const auto& bucket : buckets_) step(bucket);
    const bool certain = !aids_.found_inf.defined();
    if (recording_) {
      recorded_->add(kind_, optimizer_, std::move(keys_), certain);
    } else {
      for (auto* count : counts_) count->advance(certain);
    }
  }

 private:
  // The kernels would unscale the copies that they get of gradients in another order of memory.
  void prepare_scaler() {
    if (aids_.found_inf.defined()) aids_.found_inf = aids_.found_inf.reshape({});
    if (!aids_.grad_scale.defined()) return;
    bool ordered = true;
    for_each_gradient(optimizer_, [&](const OptimizerOptions&, const at::Tensor& param) {
      ordered = ordered && param.grad().strides() == param.strides();
    });
    if (ordered) return;
    unscale(optimizer_, aids_.grad_scale);
    aids_.grad_scale.reset();
  }

  void collect(size_t group) {
    const auto& options = optimizer_.param_groups()[group].options();
    const int wanted = moments_wanted(kind_, options);
    for (const at::Tensor& param : optimizer_.param_groups()[group].params()) {
      if (!param.grad().defined()) continue;
      const bool first = kind_ == Kind::kSGD && wanted > 0 && !has_moment(param);
      if (first && is_skipped()) continue;
      add(bucket_for(group, param, first), param, wanted);
    }
  }

  bool has_moment(const at::Tensor& param) const {
    auto* const state = state_of(optimizer_, param);
    return state != nullptr && moments_of(kind_, *state).all[0]->defined();
  }

  // SGD's momentum does not begin with gradients that are not finite. Waits for the device.
  bool is_skipped() {
    refuse_if_recording("momentum begins with this step");
    if (!skipped_) skipped_ = aids_.found_inf.defined() && aids_.found_inf.item<float>() != 0;
    return *skipped_;
  }

  void refuse_if_recording(const char* reason) const {
    if (recording_) throw CannotRecord(reason);
  }

  Bucket& bucket_for(size_t group, const at::Tensor& param, bool first) {
    for (auto bucket = buckets_.rbegin(); bucket != buckets_.rend(); ++bucket) {
      if (bucket->group != group) break;
      if (bucket->first == first && bucket->device == param.device() &&
          bucket->dtype == param.scalar_type()) {
        return *bucket;
      }
    }
    auto& bucket = buckets_.emplace_back();
    bucket.group = group;
    bucket.options = &optimizer_.param_groups()[group].options();
    bucket.device = param.device();
    bucket.dtype = param.scalar_type();
    bucket.first = first;
    return bucket;
  }

  void add(Bucket& bucket, const at::Tensor& param, int wanted) {
    const bool is_empty = param.numel() == 0;  // the kernels refuse those
    if (wanted > 0) add_state(bucket, param, wanted, is_empty);
    if (is_empty) return;
    bucket.params.push_back(param);
    const at::Tensor& grad = param.grad();
    const bool ordered = grad.strides() == param.strides();
    bucket.grads.push_back(ordered ? grad : at::empty_like(param).copy_(grad));
  }

  void add_state(Bucket& bucket, const at::Tensor& param, int wanted, bool is_empty) {
    auto& state = optimizer_.state()[param.unsafeGetTensorImpl()];
    if (state == nullptr) refuse_if_recording("a parameter takes its first step");
    auto* const count = make_count(kind_, state);
    if (count != nullptr) {
      if (!count->is_placed()) {
        refuse_if_recording("the state of a parameter was changed");
        place(*count, param);
      }
      counts_.push_back(count);
      keys_.push_back(param.unsafeGetTensorImpl());
      bucket.counted.push_back(count->on_device());
      if (!is_empty) bucket.steps.push_back(count->on_device());
    }
    const auto moments = moments_of(kind_, *state);
    for (int i = 0; i < wanted; ++i) {
      make_ordered(*moments.all[i], param);
      if (!is_empty) bucket.moments[i].push_back(*moments.all[i]);
    }
  }

  // State that is not there yet, or that was loaded in another order of memory.
  void make_ordered(at::Tensor& moment, const at::Tensor& param) const {
    if (moment.defined() && moment.strides() == param.strides()) return;
    refuse_if_recording("the state of a parameter was changed");
    moment = moment.defined() ? at::empty_like(param).copy_(moment)
                              : at::zeros_like(param, {}, at::MemoryFormat::Preserve);
  }

  Scalars scalars_for(const Bucket& bucket) const {
    const auto here = [&bucket](const at::Tensor& tensor) -> std::optional<at::Tensor> {
      if (!tensor.defined()) return std::nullopt;
      return tensor.to(bucket.device);
    };
    Scalars scalars;
    scalars.lr = bucket.options->get_lr();
    // As a recorded step reads it, which then computes the same.
    if (bucket.device.is_cuda() && bucket.dtype != at::kDouble) {
      scalars.lr = static_cast<float>(scalars.lr);
    }
    if (recorded_ != nullptr) scalars.lr_on_device = recorded_->rate(bucket.group, bucket.device);
    scalars.grad_scale = here(aids_.grad_scale);
    scalars.found_inf = here(aids_.found_inf);
    // The kernels look for a 1, and several devices may have added up to more.
    if (scalars.found_inf && several_devices()) scalars.found_inf = scalars.found_inf->clamp_max(1);
    return scalars;
  }

  bool several_devices() const {
    for (const auto& bucket : buckets_) {
      if (bucket.device != buckets_[0].device) return true;
    }
    return false;
  }

  void step(const Bucket& bucket) {
    const auto scalars = scalars_for(bucket);
    if (!bucket.counted.empty()) at::_foreach_add_(bucket.counted, 1);
    if (!bucket.params.empty()) fused::step(kind_, bucket, scalars, aids_.copies);
    if (!bucket.counted.empty() && scalars.found_inf) {
      at::_foreach_sub_(bucket.counted,
                        std::vector<at::Tensor>(bucket.counted.size(), *scalars.found_inf));
    }
  }

  Optimizer& optimizer_;
  const Kind kind_;
  const bool recording_;
  StepAids aids_;
  std::vector<Bucket> buckets_;
  std::vector<StepCount*> counts_;
  std::vector<void*> keys_;
  std::optional<bool> skipped_;
  std::shared_ptr<RecordedStep> recorded_;
};

// Copies that no kernel wrote on the way.
void refresh(WorkingCopies& copies, const Optimizer& optimizer) {
  std::vector<at::Tensor> old;
  for (const auto& group : optimizer.param_groups()) {
    for (const at::Tensor& param : group.params()) {
      if (!copies.current(param).defined()) old.push_back(param);
    }
  }
  copies.refresh(old);
}

at::Tensor run_closure(const std::function<at::Tensor()>& closure) {
  if (closure == nullptr) return {};
  const at::AutoGradMode with_grad(true);
  return closure();
}

void update(Optimizer& optimizer, Kind kind, const StepAids& aids) {
  const bool on_cuda = uses_cuda(optimizer);
  const bool fused = can_fuse(kind, optimizer, on_cuda);
  if (fused && on_cuda) return Step(optimizer, kind, recording(), aids).run();
  // A host decides, with numbers of the host.
  if (on_cuda) refuse_in_recording(kOwnStep);
  if (aids.found_inf.defined() && aids.found_inf.item<float>() != 0) return;
  unscale(optimizer, aids.grad_scale);
  if (fused) return Step(optimizer, kind, /*recording=*/false, {}).run();
  if (on_cuda) settle_steps(optimizer);
  python_step(optimizer);
}

}  // namespace
}  // namespace fused

at::Tensor fused_step(torch::optim::Optimizer& optimizer,
                      const std::function<at::Tensor()>& closure, const StepAids& aids) {
  const at::NoGradGuard no_grad;
  const auto kind = fused::kind_of(optimizer);
  const bool has_scaler = aids.grad_scale.defined() || aids.found_inf.defined();
  at::Tensor loss;
  if (kind == fused::Kind::kOther && !has_scaler) {
    if (fused::uses_cuda(optimizer)) refuse_in_recording(fused::kOwnStep);
    loss = python_step(optimizer, closure);  // which may run the closure more than once
  } else {
    loss = fused::run_closure(closure);
    fused::update(optimizer, kind, aids);
  }
  if (aids.copies != nullptr) fused::refresh(*aids.copies, optimizer);
  return loss;
}

}  // namespace lightning
