// A model whose parameters are kept in shards, all of them in this process: what a sharding
// strategy does, without its messages. For tests of what stands behind a parameter.
#pragma once

#include <torch/torch.h>

#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "lightning/param/units.h"

namespace lightning {

class Shards : public UnitKeeper {
 public:
  //   dtype   of the gathered parameters; shards stay as the model has them
  explicit Shards(int64_t world, std::optional<at::ScalarType> dtype = std::nullopt)
      : world_(world), dtype_(dtype) {}

  // The values of a parameter that is on the meta device.
  void born(const std::string& name, const at::Tensor& values) { values_[name] = values; }

  BackedOptions look(const std::string& name, const at::Tensor& parameter) override {
    originals[name] = parameter.scalar_type();
    BackedOptions options;
    if (parameter.is_meta()) {
      options.device = at::kCPU;
    } else {
      // The optimizer's values in full precision, which a gathered parameter may not have.
      values_[name] = parameter.detach().clone();
    }
    options.dtype = dtype_;
    if (parameter.dim() > 0) options.padded_rows = rows_each(parameter) * world_;
    return options;
  }

  void take(Unit& unit) override {
    for (const auto& parameter : unit.parameters()) {
      auto& shards = shards_[parameter.get()];
      const auto given = values_.find(parameter->name());
      const at::Tensor values = given == values_.end() ? valid(*parameter) : given->second;
      for (int64_t rank = 0; rank < world_; ++rank) {
        const auto slice = rows(values, rank).to(originals.at(parameter->name()));
        if (static_cast<int64_t>(shards.size()) > rank) {
          shards[static_cast<size_t>(rank)].data().copy_(slice);
        } else {
          shards.push_back(slice.clone().requires_grad_(parameter->parameter().requires_grad()));
        }
      }
      values_.erase(parameter->name());
    }
  }

  void gather(Unit& unit) override {
    events += " +" + std::to_string(unit.index());
    gathered_.push_back(unit.index());
    const at::NoGradGuard no_grad;
    for (const auto& parameter : unit.parameters()) {
      parameter->allocate();
      auto memory = valid(*parameter);
      for (int64_t rank = 0; rank < world_; ++rank) {
        rows(memory, rank).copy_(shards_.at(parameter.get())[static_cast<size_t>(rank)]);
      }
    }
  }

  void wait(Unit& unit) override { events += " w" + std::to_string(unit.index()); }

  void release(Unit& unit) override {
    events += " -" + std::to_string(unit.index());
    UnitKeeper::release(unit);
  }

  void reduce(Unit& unit, const std::vector<BackedParameter*>& arrived) override {
    events += " g" + std::to_string(unit.index());
    reduced.push_back({unit.index(), arrived.size()});
    for (auto* const parameter : arrived) {
      const auto gradient = parameter->take_gradient();
      for (int64_t rank = 0; rank < world_; ++rank) {
        auto& shard = shards_.at(parameter)[static_cast<size_t>(rank)];
        auto part = rows(gradient, rank).to(shard.scalar_type(), false, /*copy=*/true);
        shard.mutable_grad() = shard.grad().defined() ? shard.grad() + part : part;
      }
    }
  }

  std::string placement() const override { return "in " + std::to_string(world_) + " shards"; }

  // For the optimizer.
  std::vector<at::Tensor> all() const {
    std::vector<at::Tensor> all;
    for (const auto& [parameter, shards] : shards_) {
      for (const auto& shard : shards) {
        if (shard.numel() > 0) all.push_back(shard);
      }
    }
    return all;
  }
  at::Tensor value(const BackedParameter& parameter) const {
    return joined(parameter, [](const at::Tensor& shard) { return shard.detach(); });
  }
  // Undefined where there is none.
  at::Tensor gradient(const BackedParameter& parameter) const {
    return joined(parameter, [](const at::Tensor& shard) { return shard.grad(); });
  }

  // Units in the order in which they were gathered since the last call.
  std::vector<int64_t> take_gathered() { return std::exchange(gathered_, {}); }

  std::string events;  // " +1 w1 g1 -1": gather, wait, reduce and release of unit 1
  std::vector<std::pair<int64_t, size_t>> reduced;  // unit, number of gradients
  std::map<std::string, at::ScalarType> originals;

 private:
  int64_t rows_each(const at::Tensor& parameter) const {
    return (parameter.size(0) + world_ - 1) / world_;
  }
  at::Tensor rows(const at::Tensor& values, int64_t rank) const {
    if (values.dim() == 0) return rank == 0 ? values.view({1}) : values.view({1}).narrow(0, 0, 0);
    const auto each = rows_each(values);
    const auto from = std::min(rank * each, values.size(0));
    return values.narrow(0, from, std::min(each, values.size(0) - from));
  }
  static at::Tensor valid(const BackedParameter& parameter) {
    const auto& shown = parameter.parameter();
    return shown.dim() == 0 ? parameter.memory() : parameter.memory().narrow(0, 0, shown.size(0));
  }
  template <class Part>
  at::Tensor joined(const BackedParameter& parameter, Part part) const {
    std::vector<at::Tensor> parts;
    for (const auto& shard : shards_.at(&parameter)) {
      if (!part(shard).defined()) return {};
      parts.push_back(part(shard));
    }
    return at::cat(parts).view(parameter.parameter().sizes());
  }

  std::vector<int64_t> gathered_;
  int64_t world_;
  std::optional<at::ScalarType> dtype_;
  std::map<std::string, at::Tensor> values_;
  std::map<const BackedParameter*, std::vector<at::Tensor>> shards_;
};

}  // namespace lightning
