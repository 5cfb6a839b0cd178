#include "lightning/metrics/metric.h"

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/maximum.h>
#include <ATen/ops/minimum.h>
#include <c10/core/InferenceMode.h>

#include <algorithm>
#include <stdexcept>
#include <utility>

#include "lightning/errors.h"
#include "lightning/recording.h"
#include "lightning/scope.h"

namespace lightning {
namespace {

// Validation runs in inference mode, training does not, and a tensor made in the former cannot be
// written in place in the latter. States are therefore always ordinary tensors.
at::Tensor own(const at::Tensor& tensor) {
  const c10::InferenceMode off(false);
  return tensor.detach().clone();
}

ReduceOp across_ranks(int reduction) {
  static const ReduceOp ops[] = {ReduceOp::kSum, ReduceOp::kMin, ReduceOp::kMax};
  return ops[reduction];
}

}  // namespace

void Metric::Entry::reset() {
  list.clear();
  if (reduction != Reduction::kCat) value = own(initial);
}

size_t Metric::add_state(std::string name, at::Tensor initial, Reduction reduction) {
  for (const auto& entry : entries_) {
    if (entry.name == name) {
      throw std::logic_error(str("A metric declares the state \"", name, "\" twice."));
    }
  }
  if (reduction == Reduction::kCat && (initial.dim() == 0 || initial.size(0) != 0)) {
    throw std::logic_error(lightning::str("The state \"", name, "\" grows by rows but starts as ",
                                          initial.sizes(),
                                          "; give it an initial value of 0 rows."));
  }
  entries_.push_back({std::move(name), own(initial), reduction, {}, {}});
  entries_.back().reset();
  return entries_.size() - 1;
}

const at::Tensor& Metric::state(size_t index) const {
  const Entry& entry = entries_.at(index);
  if (entry.reduction == Reduction::kCat) {
    throw std::logic_error(
        str("The state \"", entry.name, "\" is a list: use append() and cat()."));
  }
  return entry.value;
}

at::Tensor& Metric::state(size_t index) {
  auto& value = const_cast<at::Tensor&>(static_cast<const Metric*>(this)->state(index));
  // reset() would put another tensor in its place.
  if (recording() && value.sizes() != entries_[index].initial.sizes()) {
    refuse_in_recording("the state of a metric takes its shape from the first batch");
  }
  return value;
}

void Metric::append(size_t index, const at::Tensor& values) {
  refuse_in_recording("a metric keeps rows of every batch");
  entries_.at(index).list.push_back(values.detach());
}

at::Tensor Metric::cat(size_t index) const {
  const Entry& entry = entries_.at(index);
  return entry.list.empty() ? entry.initial : at::cat(entry.list);
}

void Metric::follow(const at::Tensor& input) {
  if (input.defined() && !entries_.empty() && entries_[0].initial.device() != input.device()) {
    to(input.device());
  }
}

void Metric::to(at::Device device) {
  const c10::InferenceMode off(false);
  // To a GPU without a wait; from one the host needs the values.
  const auto moved = [&](const at::Tensor& tensor) {
    return tensor.to(tensor.options().device(device), /*non_blocking=*/device.is_cuda());
  };
  for (Entry& entry : entries_) {
    entry.initial = moved(entry.initial);
    if (entry.value.defined()) entry.value = moved(entry.value);
    for (auto& part : entry.list) part = moved(part);
  }
}

// In place, so that a captured step finds its states where they were.
void Metric::reset() {
  const at::NoGradGuard no_grad;
  for (Entry& entry : entries_) {
    entry.list.clear();
    if (!entry.value.defined()) continue;
    if (entry.value.sizes() == entry.initial.sizes() &&
        entry.value.scalar_type() == entry.initial.scalar_type()) {
      entry.value.copy_(entry.initial);
    } else {
      entry.reset();
    }
  }
  batch_value_ = at::Tensor();
}

void Metric::merge(Entry& into, Entry& batch) {
  if (into.reduction == Reduction::kCat) {
    into.list.insert(into.list.end(), batch.list.begin(), batch.list.end());
    return;
  }
  if (into.value.sizes() != into.initial.sizes()) {
    refuse_in_recording("the state of a metric takes its shape from the first batch");
  }
  const auto& one = into.value;
  const auto& other = batch.value;
  const at::Tensor joined = into.reduction == Reduction::kSum   ? one + other
                            : into.reduction == Reduction::kMin ? at::minimum(one, other)
                                                                : at::maximum(one, other);
  // A state may take its shape from the first batch.
  if (joined.sizes() == one.sizes() && joined.scalar_type() == one.scalar_type()) {
    into.value.copy_(joined);
  } else {
    into.value = own(joined);
  }
}

at::Tensor Metric::forward(const at::Tensor& first, const at::Tensor& second) {
  const at::NoGradGuard no_grad;
  follow(first);
  std::vector<Entry> before = entries_;
  {
    const Scope restore = scope_exit([&] { std::swap(entries_, before); });
    for (Entry& entry : entries_) entry.reset();
    update(first, second);
    batch_value_ = compute();
  }
  // `before` holds the batch now. A device that changed within update() changes for all.
  for (size_t i = 0; i < entries_.size(); ++i) merge(entries_[i], before[i]);
  return batch_value_;
}

at::Tensor Metric::compute_synced(Collectives& collectives) {
  if (collectives.world_size() == 1) return compute();
  const at::NoGradGuard no_grad;
  std::vector<Entry> local = entries_;
  const Scope restore = scope_exit([&] { std::swap(entries_, local); });
  for (size_t i = 0; i < entries_.size(); ++i) {
    Entry& entry = entries_[i];
    if (entry.reduction == Reduction::kCat) {
      entry.list = {collectives.all_gather_rows(cat(i).contiguous())};
    } else {
      // A collective may write where it reads.
      entry.value =
          collectives.reduce(own(entry.value), across_ranks(static_cast<int>(entry.reduction)));
    }
  }
  return compute();
}

State Metric::state_dict() const {
  State all = State::dict();
  for (const Entry& entry : entries_) {
    if (entry.reduction == Reduction::kCat) {
      State::List parts;
      for (const auto& part : entry.list) parts.emplace_back(part);
      all[entry.name] = std::move(parts);
    } else {
      all[entry.name] = own(entry.value);
    }
  }
  return all;
}

void Metric::load_entry(Entry& entry, const State& saved) const {
  const at::Device device = entry.initial.device();
  if (entry.reduction == Reduction::kCat) {
    entry.list.clear();
    for (const State& part : saved.as_list()) entry.list.push_back(part.as_tensor().to(device));
  } else {
    entry.value = own(saved.as_tensor().to(device));
  }
}

std::vector<Metric::Entry> Metric::loaded_entries(const State& state) const {
  std::vector<std::string> names;
  for (const Entry& entry : entries_) names.push_back(entry.name);
  for (const auto& [key, value] : state.as_dict()) {
    const auto* name = std::get_if<std::string>(&key);
    if (name == nullptr || std::count(names.begin(), names.end(), *name) == 0) {
      throw CheckpointError(str("The state of a metric holds \"", to_string(key),
                                "\", which this metric does not have. Known: ", join(names),
                                ". Load it into a metric of the same type and options."));
    }
  }
  std::vector<Entry> loaded = entries_;
  for (Entry& entry : loaded) load_entry(entry, state.at(entry.name));
  return loaded;
}

void Metric::load_state_dict(const State& state) { entries_ = loaded_entries(state); }

void Metric::join_state_dict(const State& earlier) {
  const at::NoGradGuard no_grad;
  auto joined = loaded_entries(earlier);
  for (size_t i = 0; i < joined.size(); ++i) merge(joined[i], entries_[i]);
  entries_ = std::move(joined);
}

}  // namespace lightning
