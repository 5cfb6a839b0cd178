#include "lightning/param/replay.h"

#include <ATen/SequenceNumber.h>
#include <torch/csrc/autograd/engine.h>
#include <torch/csrc/autograd/saved_variable_hooks.h>
#include <torch/csrc/autograd/variable.h>

#include <algorithm>
#include <atomic>
#include <stdexcept>
#include <utility>
#include <vector>

#include "lightning/param/region.h"
#include "lightning/param/touch.h"

namespace lightning {

// ---- What autograd saves -----------------------------------------------------------------------

namespace {

constexpr int32_t kNone = Region::kNone;

std::atomic<int64_t> count_recorded{0}, count_dropped{0}, count_kept{0};

class SavedOfRegion;

// The thread's.
class Recorder : public OperatorWatch {
 public:
  void before(const c10::OperatorHandle& op, Stack& stack) override { region->before(op, stack); }
  void after(const c10::OperatorHandle& op, Stack& stack) override {
    region->after(op, stack);
    operator_ran();
  }

  // Autograd saves what an operator reads before the operator runs, when it has made its node, and
  // by a touch of the same operator the region may end: those values belong to what follows.
  void operator_ran() {
    early_.clear();
    nodes_ = at::sequence_number::peek();
  }
  void saved(SavedOfRegion& saved, const at::Tensor& tensor) {
    if (at::sequence_number::peek() != nodes_) early_.emplace_back(&saved, held(tensor));
  }
  void gone(const SavedOfRegion& saved) {
    const auto is_it = [&](const auto& each) { return each.first == &saved; };
    early_.erase(std::remove_if(early_.begin(), early_.end(), is_it), early_.end());
  }
  void hold_early();

  std::shared_ptr<Region> region;  // null while nothing is recorded

 private:
  std::vector<std::pair<SavedOfRegion*, at::Tensor>> early_;
  uint64_t nodes_ = 0;  // of autograd, when the last operator had run
};

Recorder& recorder() {
  thread_local Recorder recorder;
  return recorder;
}

class SavedOfRegion : public torch::autograd::SavedVariableHooks {
 public:
  explicit SavedOfRegion(std::shared_ptr<Region> region) : region_(std::move(region)) {}
  ~SavedOfRegion() override {
    if (value_ == kNone) return;
    if (recorder().region == region_) recorder().gone(*this);
    region_->forget(value_);
  }

  void call_pack_hook(const at::Tensor& tensor) override {
    counter_ = torch::autograd::impl::version_counter(tensor);
    version_ = counter_.current_version();
    value_ = region_->made_value(tensor);
    if (value_ == kNone) {
      ++count_kept;
      kept_ = held(tensor);
      return;
    }
    ++count_dropped;
    region_->want(value_, tensor);
    recorder().saved(*this, tensor);
  }
  at::Tensor call_unpack_hook() override {
    auto tensor = value_ == kNone ? kept_ : region_->get(value_);
    const auto version = counter_.current_version();
    if (version != version_) {
      throw std::runtime_error(modified(region_->name(), tensor, version, version_));
    }
    return tensor;
  }

  // As if it came from outside.
  void hold(at::Tensor tensor) {
    --count_dropped;
    ++count_kept;
    region_->forget(std::exchange(value_, kNone));
    kept_ = std::move(tensor);
  }

 private:
  std::shared_ptr<Region> region_;
  int32_t value_ = kNone;
  at::Tensor kept_;
  c10::VariableVersion counter_{uint32_t{0}};
  uint32_t version_ = 0;
};

void Recorder::hold_early() {
  for (auto& [saved, tensor] : std::exchange(early_, {})) saved->hold(std::move(tensor));
}

// LibTorch's engine, which asks itself for the hooks of what it saves.
class Engine : public torch::autograd::Engine {
 public:
  std::unique_ptr<torch::autograd::SavedVariableHooks> get_default_saved_variable_hooks() override {
    const auto& region = recorder().region;
    if (region == nullptr) return nullptr;
    return std::make_unique<SavedOfRegion>(region);
  }
  torch::autograd::variable_list execute(const torch::autograd::edge_list& roots,
                                         const torch::autograd::variable_list& inputs,
                                         bool keep_graph, bool create_graph, bool accumulate_grad,
                                         const torch::autograd::edge_list& outputs) override {
    end_region();
    return torch::autograd::Engine::execute(roots, inputs, keep_graph, create_graph,
                                            accumulate_grad, outputs);
  }

  static torch::autograd::Engine& instance() {
    static auto* const engine = [] {
      auto* const made = new Engine;  // outlives the threads that use it
      // LibTorch starts the threads of devices once in a process, for the engine that asks first:
      // its own engine asks here, and this one starts some for itself.
      get_base_engine().initialize_device_threads_pool();
      made->start_device_threads();
      return made;
    }();
    return *engine;
  }

 private:
  Engine() = default;
};

void use_engine() {
  static const bool once = [] {
    torch::autograd::set_default_engine_stub(&Engine::instance);
    return true;
  }();
  (void)once;
}

}  // namespace

bool recording_region() { return recorder().region != nullptr; }

void begin_region(const std::string& name) {
  auto& here = recorder();
  if (here.region != nullptr) return;
  use_engine();
  here.region = std::make_shared<Region>(name);
  here.operator_ran();
  watch_operators(&here);
  ++count_recorded;
}

void end_region() {
  auto& here = recorder();
  if (here.region == nullptr) return;
  watch_operators(nullptr);
  here.hold_early();
  const auto region = std::exchange(here.region, nullptr);
  region->finish();
}

Scope region_scope(const std::string& name) {
  if (recording_region()) return nullptr;
  begin_region(name);
  return scope_exit([region = std::weak_ptr<Region>(recorder().region)] {
    if (recorder().region != nullptr && recorder().region == region.lock()) end_region();
  });
}

void keep_for_replay(const at::Tensor& tensor) {
  if (recording_region() && tensor.defined()) recorder().region->keep(tensor);
}

std::vector<at::Tensor> replayable(const std::vector<at::Tensor>& inputs,
                                   const Region::Function& function) {
  auto& here = recorder();
  if (here.region == nullptr) return function(inputs);
  auto results = here.region->run(inputs, function);
  here.operator_ran();
  return results;
}

void replayable(const std::vector<at::Tensor>& inputs, const std::vector<at::Tensor>& outputs,
                const FillingFunction& function) {
  auto& here = recorder();
  if (here.region == nullptr) return function(inputs, outputs);
  here.region->fill(inputs, outputs, function);
  here.operator_ran();
}

RegionCounts take_region_counts() {
  return {count_recorded.exchange(0), count_dropped.exchange(0), count_kept.exchange(0),
          Region::take_replayed()};
}

}  // namespace lightning
