#include "lightning/optim/recorded_step.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <torch/optim/adagrad.h>
#include <torch/optim/adam.h>
#include <torch/optim/adamw.h>
#include <torch/optim/sgd.h>

#include <algorithm>
#include <mutex>
#include <unordered_map>
#include <utility>

#include "lightning/optim/fused_step.h"

namespace lightning {
namespace fused {
namespace {

using namespace torch::optim;

template <class AnyAdamOptions>
std::vector<double> adam_options(const OptimizerOptions& options) {
  const auto& o = static_cast<const AnyAdamOptions&>(options);
  return {std::get<0>(o.betas()), std::get<1>(o.betas()), o.eps(), o.weight_decay(),
          static_cast<double>(o.amsgrad())};
}

std::vector<double> options_of(Kind kind, const OptimizerOptions& options) {
  if (kind == Kind::kSGD) {
    const auto& o = static_cast<const SGDOptions&>(options);
    return {o.momentum(), o.dampening(), o.weight_decay(), static_cast<double>(o.nesterov())};
  }
  if (kind == Kind::kAdagrad) {
    const auto& o = static_cast<const AdagradOptions&>(options);
    return {o.lr_decay(), o.weight_decay(), o.eps()};
  }
  return kind == Kind::kAdam ? adam_options<AdamOptions>(options)
                             : adam_options<AdamWOptions>(options);
}

std::vector<double> options_of(Kind kind, const Optimizer& optimizer) {
  std::vector<double> all;
  for (const auto& group : optimizer.param_groups()) {
    const auto some = options_of(kind, group.options());
    all.insert(all.end(), some.begin(), some.end());
  }
  return all;
}

const void* address_of(const at::Tensor& tensor) {
  return tensor.defined() ? tensor.const_data_ptr() : nullptr;
}

std::vector<const void*> addresses_of(Kind kind, const Optimizer& optimizer) {
  std::vector<const void*> all;
  for (const auto& group : optimizer.param_groups()) {
    all.reserve(all.size() + 7 * group.params().size());
    for (const at::Tensor& param : group.params()) {
      auto* const state = state_of(optimizer, param);
      all.insert(all.end(), {param.unsafeGetTensorImpl(), address_of(param), state});
      if (state == nullptr) continue;
      for (const auto* moment : moments_of(kind, *state).all) {
        if (moment != nullptr) all.push_back(address_of(*moment));
      }
      if (const auto* count = count_of(kind, state)) all.push_back(address_of(count->on_device()));
    }
  }
  return all;
}

const at::Tensor& first_parameter(const Optimizer& optimizer) {
  for (const auto& group : optimizer.param_groups()) {
    if (!group.params().empty()) return group.params()[0];
  }
  static const at::Tensor none;
  return none;
}

// By optimizer. One cannot be asked when it ends, so its entry goes when its first parameter does,
// or is seen in another optimizer. One that finds the entry of another, which was at its address,
// finds other addresses in it too.
class Table {
 public:
  std::shared_ptr<RecordedStep> find(const Optimizer& optimizer) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = entries_.find(&optimizer);
    return found == entries_.end() ? nullptr : found->second.step;
  }

  std::shared_ptr<RecordedStep> make(const Optimizer& optimizer) {
    const auto& first = first_parameter(optimizer);
    const std::lock_guard<std::mutex> lock(mutex_);
    for (auto entry = entries_.begin(); entry != entries_.end();) {
      const auto owner = entry->second.owner.lock();
      const bool is_owner = owner.get() == first.unsafeGetTensorImpl();
      const bool gone = !owner || is_owner != (entry->first == &optimizer);
      entry = gone ? entries_.erase(entry) : std::next(entry);
    }
    const auto found = entries_.find(&optimizer);
    if (found != entries_.end()) return found->second.step;
    auto step = std::make_shared<RecordedStep>();
    entries_.emplace(&optimizer, Entry{Owner(first.getIntrusivePtr()), step});
    return step;
  }

 private:
  using Owner = c10::weak_intrusive_ptr<c10::TensorImpl, c10::UndefinedTensorImpl>;
  struct Entry {
    Owner owner;
    std::shared_ptr<RecordedStep> step;
  };
  std::mutex mutex_;
  std::unordered_map<const Optimizer*, Entry> entries_;
};

Table& table() {
  static Table table;
  return table;
}

// Puts the counts of all states there are on the device.
void place_counts(Kind kind, Optimizer& optimizer) {
  if (kind == Kind::kSGD) return;
  for (const auto& group : optimizer.param_groups()) {
    for (const at::Tensor& param : group.params()) {
      const auto found = optimizer.state().find(param.unsafeGetTensorImpl());
      if (found == optimizer.state().end()) continue;
      auto* const count = make_count(kind, found->second);
      if (!count->is_placed()) place(*count, param);
    }
  }
}

void upload(RecordedStep& recorded, size_t group, double lr, c10::Device device) {
  for (auto& rate : recorded.rates) {
    if (rate.group != group || rate.on_device.device() != device) continue;
    if (rate.uploaded != lr) rate.on_device.fill_(lr);
    rate.uploaded = lr;
    return;
  }
  const auto made = at::empty({}, at::TensorOptions(device).dtype(at::kFloat));
  recorded.rates.push_back({group, made.fill_(lr), lr});
}

}  // namespace

at::Tensor RecordedStep::rate(size_t group, c10::Device device) const {
  for (const auto& one : rates) {
    if (one.group == group && one.on_device.device() == device) return one.on_device;
  }
  return {};
}

void RecordedStep::add(Kind kind, const Optimizer& optimizer, std::vector<void*> keys,
                       bool is_certain) {
  if (any) {
    differs = differs || !holds(kind, optimizer);
    certain = certain && is_certain && keys == stepped;
    // A state that only one of the recordings counts in is read from the device when it is asked
    // for.
    for (void* const key : keys) {
      if (std::find(stepped.begin(), stepped.end(), key) == stepped.end()) stepped.push_back(key);
    }
    return;
  }
  any = true;
  certain = is_certain;
  options = options_of(kind, optimizer);
  addresses = addresses_of(kind, optimizer);
  stepped = std::move(keys);
}

bool RecordedStep::holds(Kind kind, const Optimizer& optimizer) const {
  return !differs && options == options_of(kind, optimizer) &&
         addresses == addresses_of(kind, optimizer);
}

std::shared_ptr<RecordedStep> RecordedStep::find(const Optimizer& optimizer) {
  return table().find(optimizer);
}

}  // namespace fused

bool upload_options(torch::optim::Optimizer& optimizer) {
  using namespace fused;
  const Kind kind = kind_of(optimizer);
  if (kind == Kind::kOther || !uses_cuda(optimizer)) return true;
  const at::NoGradGuard no_grad;
  const auto before = table().find(optimizer);
  const auto recorded = table().make(optimizer);
  const bool replaced = before != nullptr && before != recorded;
  place_counts(kind, optimizer);
  for (size_t i = 0; i < optimizer.param_groups().size(); ++i) {
    auto& group = optimizer.param_groups()[i];
    const at::Tensor* last = nullptr;
    for (const at::Tensor& param : group.params()) {
      if (!param.is_cuda() || (last != nullptr && last->device() == param.device())) continue;
      upload(*recorded, i, group.options().get_lr(), param.device());
      last = &param;
    }
  }
  if (!recorded->any || recorded->holds(kind, optimizer)) return !replaced;
  // What is recorded from now on is compared with itself.
  auto rates = std::move(recorded->rates);
  *recorded = RecordedStep();
  recorded->rates = std::move(rates);
  return false;
}

void count_step(torch::optim::Optimizer& optimizer) {
  using namespace fused;
  const auto recorded = RecordedStep::find(optimizer);
  if (recorded == nullptr || !recorded->any) return;
  const Kind kind = kind_of(optimizer);
  for (void* const key : recorded->stepped) {
    const auto found = optimizer.state().find(key);
    auto* const count =
        found == optimizer.state().end() ? nullptr : count_of(kind, found->second.get());
    if (count != nullptr) count->advance(recorded->certain);
  }
}

}  // namespace lightning
