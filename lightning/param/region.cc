#include "lightning/param/region.h"

#include <ATen/Context.h>
#include <ATen/ops/empty.h>
#include <c10/core/StorageImpl.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <atomic>
#include <stdexcept>
#include <unordered_set>
#include <utility>

#include "lightning/errors.h"
#include "lightning/scope.h"

namespace lightning {
namespace {

std::atomic<int64_t> count_replayed{0};

// Operators of ours in here are neither seen nor recorded.
class Unseen {
 public:
  Unseen() : watch_(watch_operators(nullptr)) {}
  ~Unseen() { watch_operators(watch_); }
  Unseen(const Unseen&) = delete;

 private:
  OperatorWatch* watch_;
  c10::impl::ExcludeDispatchKeyGuard below_{c10::autograd_dispatch_keyset_with_ADInplaceOrView |
                                            c10::autocast_dispatch_keyset};
};

c10::StorageImpl* storage_of(const at::Tensor& tensor) {
  return tensor.has_storage() ? tensor.storage().unsafeGetStorageImpl() : nullptr;
}

at::Tensor bytes_of(const c10::Storage& storage) {
  const auto options = at::TensorOptions().dtype(at::kByte).device(storage.device());
  auto bytes = at::empty({0}, options);
  bytes.set_(storage, 0, {static_cast<int64_t>(storage.nbytes())}, {1});
  return bytes;
}

}  // namespace

at::Tensor held(const at::Tensor& tensor) { return tensor.tensor_data(); }

std::string modified(const std::string& region, const at::Tensor& tensor, int64_t version,
                     int64_t expected) {
  return str("A ", tensor.toString(), " of shape ", tensor.sizes(), " that backward needs from ",
             region, " has been modified by an inplace operation: it is at version ", version,
             ", expected version ", expected,
             ". Write a copy instead (x = x + y in place of x += y), or run backward before.");
}

int64_t Region::take_replayed() { return count_replayed.exchange(0); }

// ---- Recording ---------------------------------------------------------------------------------

int32_t Region::memory_of(const at::Tensor& tensor, bool made) {
  auto* const storage = storage_of(tensor);
  if (storage == nullptr) return kNone;
  const auto [found, is_new] = memory_at_.emplace(storage, static_cast<int32_t>(memories_.size()));
  if (is_new) {
    memories_.emplace_back();
    memories_.back().original = WeakStorage(tensor.storage().getWeakStorageImpl());
    memories_.back().made = made;
  }
  return found->second;
}

int32_t Region::new_value(const at::Tensor& tensor, int32_t memory) {
  const auto id = static_cast<int32_t>(values_.size());
  values_.emplace_back();
  values_.back().original = WeakTensor(tensor.getIntrusivePtr());
  values_.back().memory = memory;
  value_at_[tensor.unsafeGetTensorImpl()] = id;
  if (memory != kNone && memories_[static_cast<size_t>(memory)].base == kNone) {
    memories_[static_cast<size_t>(memory)].base = id;
  }
  return id;
}

// A value known already, or a shallow copy of one; kNone for a tensor from outside.
int32_t Region::find(const at::Tensor& tensor) {
  const auto found = value_at_.find(tensor.unsafeGetTensorImpl());
  if (found != value_at_.end()) return found->second;
  const auto memory_found = memory_at_.find(storage_of(tensor));
  if (memory_found == memory_at_.end()) return kNone;
  const auto& memory = memories_[static_cast<size_t>(memory_found->second)];
  if (!memory.made) return kNone;
  const auto base = memory.base;
  const auto id = new_value(tensor, memory_found->second);
  auto& value = values_[static_cast<size_t>(id)];
  value.base = base;
  value.shape.emplace(tensor);
  return id;
}

int32_t Region::find_or_hold(const at::Tensor& tensor) {
  const auto known = find(tensor);
  if (known != kNone) return known;
  const auto id = new_value(tensor, memory_of(tensor, /*made=*/false));
  values_[static_cast<size_t>(id)].outside = held(tensor);
  return id;
}

// What it holds was put there by no operator: a replay could not.
void Region::hold_unwritten(int32_t memory) {
  auto& at = memories_[static_cast<size_t>(memory)];
  if (!at.unwritten) return;
  at.unwritten = false;
  at.made = false;
  for (auto& value : values_) {
    if (value.memory != memory) continue;
    auto alive = value.original->lock();
    if (alive) value.outside = held(at::Tensor(std::move(alive)));
    value.base = kNone;
  }
}

void Region::save_before_write(int32_t memory, const at::Tensor& tensor) {
  auto& at = memories_[static_cast<size_t>(memory)];
  if (at.made || at.before.defined()) return;
  const Unseen unseen;
  at.before = bytes_of(tensor.storage()).clone();
}

void Region::note_generator(const Stack& stack, size_t first) {
  std::optional<at::Generator> generator;
  std::optional<at::Device> device;
  for (size_t i = first; i < stack.size(); ++i) {
    const auto& value = stack[i];
    if (value.isGenerator()) generator = value.toGenerator();
    if (value.isDevice()) device = value.toDevice();
    visit_tensors(value, [&](const at::Tensor& tensor, int64_t) {
      if (!device.has_value() && !tensor.is_meta()) device = tensor.device();
    });
  }
  if (!generator.has_value() || !generator->defined()) {
    generator = at::globalContext().defaultGenerator(device.value_or(at::kCPU));
  }
  for (const auto& known : generators_) {
    if (known.generator == *generator) return;
  }
  const Unseen unseen;
  const std::lock_guard<std::mutex> lock(generator->mutex());
  generators_.push_back({*generator, generator->get_state()});
}

// A tensor that a factory made on the CPU may be filled by its address next.
bool Region::is_kept_from_birth(const OperatorTraits& traits, const Stack& stack,
                                size_t first) const {
  if (traits.views) return false;
  bool takes_tensors = false;
  for (size_t i = first; i < stack.size(); ++i) {
    visit_tensors(stack[i], [&](const at::Tensor&, int64_t) { takes_tensors = true; });
  }
  return !takes_tensors || traits.only_looks;
}

void Region::add_argument(Step& step, size_t argument, int64_t element, const at::Tensor& tensor,
                          bool written) {
  const auto value = find_or_hold(tensor);
  step.places.push_back({argument, element, value});
  const auto memory = values_[static_cast<size_t>(value)].memory;
  if (memory == kNone) return;
  if (written) {
    save_before_write(memory, tensor);
    memories_[static_cast<size_t>(memory)].unwritten = false;
    step.written.push_back(memory);
  }
}

void Region::before(const c10::OperatorHandle& op, Stack& stack) {
  const auto& traits = operator_traits(op);
  const size_t count = op.schema().arguments().size();
  const size_t first = stack.size() - count;
  Step step;
  step.op = op;
  step.random = traits.random;
  if (traits.random) note_generator(stack, first);
  running_keeps_ = is_kept_from_birth(traits, stack, first);
  for (size_t i = 0; i < count && !traits.only_looks; ++i) {
    // Before any of the arguments counts as written: it may be read by another.
    const bool overwritten = (traits.overwritten >> i & 1) != 0;
    visit_tensors(stack[first + i], [&](const at::Tensor& tensor, int64_t) {
      if (overwritten && Shape(tensor).is_all) return;
      const auto found = memory_at_.find(storage_of(tensor));
      if (found != memory_at_.end()) hold_unwritten(found->second);
    });
  }
  for (size_t i = 0; i < count; ++i) {
    const auto& value = stack[first + i];
    const bool written = (traits.written >> i & 1) != 0;
    const auto places = step.places.size();
    visit_tensors(value, [&](const at::Tensor& tensor, int64_t element) {
      add_argument(step, i, element, tensor, written);
    });
    if (step.places.size() == places) {
      step.arguments.push_back(value);
    } else if (value.isTensor()) {
      step.arguments.emplace_back(at::Tensor());
    } else {
      // The list without its tensors.
      auto list = value.toList().copy();
      for (auto at = places; at < step.places.size(); ++at) {
        const auto element = static_cast<size_t>(step.places[at].element);
        list.set(element, c10::IValue(at::Tensor()));
      }
      step.arguments.emplace_back(std::move(list));
    }
  }
  running_ = std::move(step);
}

void Region::add_result(Step& step, const at::Tensor& tensor, bool keep, bool unwritten) {
  if (value_at_.count(tensor.unsafeGetTensorImpl()) > 0) {
    step.results.push_back(kNone);  // an argument, written in place
    return;
  }
  const bool is_new = memory_at_.count(storage_of(tensor)) == 0;
  const auto memory = memory_of(tensor, /*made=*/!keep);
  const auto id = new_value(tensor, memory);
  step.results.push_back(id);
  if (memory == kNone || !memories_[static_cast<size_t>(memory)].made) {
    // A view of what comes from outside is made anew for a replay all the same: in one, that may be
    // a copy. Without memory of its own it costs nothing.
    if (keep) values_[static_cast<size_t>(id)].outside = held(tensor);
    return;
  }
  if (is_new && unwritten) memories_[static_cast<size_t>(memory)].unwritten = true;
}

void Region::after(const c10::OperatorHandle& op, Stack& stack) {
  if (!running_.has_value()) return;
  auto step = std::move(*running_);
  running_.reset();
  const auto& name = op.schema().name();
  const bool empties = name.rfind("aten::empty", 0) == 0 || name.rfind("aten::new_empty", 0) == 0;
  bool any = !step.written.empty();
  const size_t count = op.schema().returns().size();
  for (size_t i = stack.size() - count; i < stack.size(); ++i) {
    if (stack[i].isTensor() && !stack[i].toTensor().defined()) step.results.push_back(kNone);
    visit_tensors(stack[i], [&](const at::Tensor& tensor, int64_t) {
      const bool like = empties && !step.places.empty();
      add_result(step, tensor, running_keeps_ && tensor.is_cpu() && !like, empties);
      any = true;
    });
  }
  if (any) steps_.push_back(std::move(step));
}

void Region::add_read(Step& step, const at::Tensor& tensor) {
  step.arguments.emplace_back(at::Tensor());
  if (!tensor.defined()) return;
  const auto found = memory_at_.find(storage_of(tensor));
  if (found != memory_at_.end()) hold_unwritten(found->second);
  add_argument(step, step.arguments.size() - 1, -1, tensor, /*written=*/false);
}

void Region::add_filled(Step& step, const at::Tensor& tensor) {
  step.arguments.emplace_back(at::Tensor());
  if (!tensor.defined()) return;
  const auto found = memory_at_.find(storage_of(tensor));
  if (found != memory_at_.end() && !Shape(tensor).is_all) hold_unwritten(found->second);
  add_argument(step, step.arguments.size() - 1, -1, tensor, /*written=*/true);
}

void Region::fill(const std::vector<at::Tensor>& inputs, const std::vector<at::Tensor>& outputs,
                  const Filling& function) {
  Step step;
  step.function = [function, count = static_cast<int64_t>(inputs.size())](const auto& all) {
    function({all.begin(), all.begin() + count}, {all.begin() + count, all.end()});
    return std::vector<at::Tensor>();
  };
  for (const auto& input : inputs) add_read(step, input);
  for (const auto& output : outputs) add_filled(step, output);
  {
    auto* const watch = watch_operators(nullptr);
    const auto back = scope_exit([&] { watch_operators(watch); });
    function(inputs, outputs);
  }
  steps_.push_back(std::move(step));
}

std::vector<at::Tensor> Region::run(const std::vector<at::Tensor>& inputs,
                                    const Function& function) {
  Step step;
  step.function = function;
  for (const auto& input : inputs) add_read(step, input);
  std::vector<at::Tensor> results;
  {
    auto* const watch = watch_operators(nullptr);
    const auto back = scope_exit([&] { watch_operators(watch); });
    results = function(inputs);
  }
  for (const auto& result : results) {
    if (result.defined()) {
      add_result(step, result, /*keep=*/false, /*unwritten=*/false);
    } else {
      step.results.push_back(kNone);
    }
  }
  steps_.push_back(std::move(step));
  return results;
}

void Region::keep(const at::Tensor& tensor) {
  const auto found = memory_at_.find(storage_of(tensor));
  if (found == memory_at_.end()) return;
  memories_[static_cast<size_t>(found->second)].unwritten = true;
  hold_unwritten(found->second);
}

int32_t Region::made_value(const at::Tensor& tensor) {
  const auto memory = memory_at_.find(storage_of(tensor));
  if (memory == memory_at_.end()) return kNone;
  const auto& at = memories_[static_cast<size_t>(memory->second)];
  return at.made && !at.unwritten ? find(tensor) : kNone;
}

// ---- The end of recording ----------------------------------------------------------------------

// What must run again for the values that are wanted, from the last step to the first.
std::vector<bool> Region::needed_steps() const {
  std::vector<bool> needed(steps_.size(), false), value(values_.size(), false),
      memory(memories_.size(), false);
  const auto want_value = [&](int32_t id) {
    value[static_cast<size_t>(id)] = true;
    const auto& at = values_[static_cast<size_t>(id)];
    if (at.base != kNone) value[static_cast<size_t>(at.base)] = true;
    if (at.memory != kNone) memory[static_cast<size_t>(at.memory)] = true;
  };
  for (size_t i = 0; i < values_.size(); ++i) {
    if (values_[i].wanted > 0) want_value(static_cast<int32_t>(i));
  }
  bool draws = false;  // a later step that runs draws from a generator, so all before do
  for (size_t i = steps_.size(); i-- > 0;) {
    const auto& step = steps_[i];
    bool run = step.random && draws;
    for (const auto id : step.results) {
      run |= id != kNone && value[static_cast<size_t>(id)] &&
             !values_[static_cast<size_t>(id)].outside.defined();
    }
    for (const auto id : step.written) run |= memory[static_cast<size_t>(id)];
    if (!run) continue;
    needed[i] = true;
    draws |= step.random;
    for (const auto& place : step.places) want_value(place.value);
  }
  return needed;
}

void Region::drop_unneeded(const std::vector<bool>& needed) {
  std::vector<Step> steps;
  std::unordered_set<int32_t> used;
  for (size_t i = 0; i < steps_.size(); ++i) {
    if (!needed[i]) continue;
    const auto at = static_cast<int32_t>(steps.size());
    for (const auto& place : steps_[i].places) {
      auto& value = values_[static_cast<size_t>(place.value)];
      value.last_use = at;
      used.insert(place.value);
      if (value.base != kNone) values_[static_cast<size_t>(value.base)].last_use = at;
    }
    steps.push_back(std::move(steps_[i]));
  }
  steps_ = std::move(steps);
  std::vector<bool> memory_used(memories_.size(), false);
  for (size_t i = 0; i < values_.size(); ++i) {
    auto& value = values_[i];
    if (used.count(static_cast<int32_t>(i)) == 0 && value.wanted == 0) value.outside.reset();
    if (value.memory != kNone && value.outside.defined()) {
      memory_used[static_cast<size_t>(value.memory)] = true;
    }
    if (value.outside.defined()) value.version = value.outside._version();
  }
  for (size_t i = 0; i < memories_.size(); ++i) {
    if (!memory_used[i]) memories_[i].before.reset();
  }
}

void Region::finish() {
  running_.reset();
  const auto needed = needed_steps();
  drop_unneeded(needed);
  bool draws = false;
  for (const auto& step : steps_) draws |= step.random;
  if (!draws) generators_.clear();
  memory_at_.clear();
  value_at_.clear();
  for (auto& memory : memories_) memory.original.reset();
  for (auto& value : values_) {
    if (value.wanted == 0) value.original.reset();
  }
}

// ---- Replay ------------------------------------------------------------------------------------

void Region::want(int32_t value, const at::Tensor& tensor) {
  const std::lock_guard<std::mutex> lock(mutex_);
  auto& at = values_[static_cast<size_t>(value)];
  ++at.wanted;
  if (at.storage.has_value() || !tensor.has_storage()) return;
  at.storage = WeakStorage(tensor.storage().getWeakStorageImpl());
  if (!at.shape.has_value()) at.shape.emplace(tensor);
}

void Region::forget(int32_t value) {
  at::Tensor last;  // freed without the lock
  const std::lock_guard<std::mutex> lock(mutex_);
  auto& at = values_[static_cast<size_t>(value)];
  if (--at.wanted > 0) return;
  at.storage.reset();
  if (replayed_) last = std::move(live_[static_cast<size_t>(value)]);
}

at::Tensor Region::get(int32_t value) {
  const std::lock_guard<std::mutex> lock(mutex_);
  auto& at = values_[static_cast<size_t>(value)];
  if (at.outside.defined()) return at.outside;
  if (auto tensor = alive(at); tensor.defined()) return tensor;
  if (!replayed_) replay();
  return live_[static_cast<size_t>(value)];
}

// Where somebody holds it or its memory: the region's output, as the input of what follows.
at::Tensor Region::alive(const Value& value) const {
  if (auto tensor = value.original->lock()) return held(at::Tensor(std::move(tensor)));
  if (!value.storage.has_value()) return {};
  auto storage = value.storage->lock();
  return storage ? value.shape->over(c10::Storage(std::move(storage))) : at::Tensor();
}

void Region::check_versions() const {
  for (const auto& value : values_) {
    if (!value.outside.defined() || value.memory == kNone) continue;
    if (memories_[static_cast<size_t>(value.memory)].before.defined()) continue;
    const auto version = value.outside._version();
    if (version == value.version) continue;
    throw std::runtime_error(modified(name_, value.outside, version, value.version));
  }
}

at::Tensor Region::resolve(int32_t id) {
  auto& live = live_[static_cast<size_t>(id)];
  if (live.defined()) return live;
  const auto& value = values_[static_cast<size_t>(id)];
  if (value.base != kNone) {
    live = value.shape->over(live_[static_cast<size_t>(value.base)].storage());
    return live;
  }
  TORCH_INTERNAL_ASSERT(value.outside.defined(), name_, " lost a tensor that its replay needs");
  if (value.memory == kNone) return value.outside;
  const auto& before = memories_[static_cast<size_t>(value.memory)].before;
  if (!before.defined()) return value.outside;
  auto& copy = copies_[value.memory];
  if (!copy) copy = before.clone().storage();
  live = Shape(value.outside).over(copy);
  return live;
}

Stack Region::stack_of(const Step& step) {
  Stack stack;
  for (const auto& argument : step.arguments) {
    stack.push_back(argument.isList() ? c10::IValue(argument.toList().copy()) : argument);
  }
  for (const auto& place : step.places) {
    auto tensor = resolve(place.value);
    if (place.element < 0) {
      stack[place.argument] = std::move(tensor);
    } else {
      stack[place.argument].toList().set(static_cast<size_t>(place.element), std::move(tensor));
    }
  }
  return stack;
}

void Region::run_step(const Step& step) {
  const at::AutoGradMode grad_mode(step.grad_mode);
  auto stack = stack_of(step);
  std::vector<at::Tensor> results;
  if (step.op.has_value()) {
    step.op->callBoxed(stack);
    for (const auto& value : stack) {
      if (value.isTensor() && !value.toTensor().defined()) results.emplace_back();
      visit_tensors(value, [&](const at::Tensor& tensor, int64_t) { results.push_back(tensor); });
    }
  } else {
    std::vector<at::Tensor> inputs;
    for (const auto& value : stack) inputs.push_back(whole(value.toTensor()));
    results = step.function(inputs);
  }
  TORCH_CHECK(results.size() == step.results.size(), name_, ": ",
              step.op.has_value() ? step.op->schema().name() : "a replayable function", " gave ",
              results.size(), " tensors in forward's replay, ", step.results.size(), " in forward");
  for (size_t i = 0; i < results.size(); ++i) {
    const auto id = step.results[i];
    if (id == kNone || values_[static_cast<size_t>(id)].outside.defined()) continue;
    live_[static_cast<size_t>(id)] = results[i];
  }
}

void Region::replay() {
  check_versions();
  const Unseen unseen;
  live_.assign(values_.size(), at::Tensor());
  std::vector<GeneratorState> now;
  for (auto& each : generators_) {
    const std::lock_guard<std::mutex> lock(each.generator.mutex());
    now.push_back({each.generator, each.generator.get_state()});
    each.generator.set_state(each.state);
  }
  const auto back = scope_exit([&] {
    for (auto& each : now) {
      const std::lock_guard<std::mutex> lock(each.generator.mutex());
      each.generator.set_state(each.state);
    }
    copies_.clear();
  });
  std::vector<std::vector<int32_t>> ends(steps_.size() + 1);
  for (size_t i = 0; i < values_.size(); ++i) {
    if (values_[i].last_use != kNone) {
      ends[static_cast<size_t>(values_[i].last_use)].push_back(static_cast<int32_t>(i));
    }
  }
  std::vector<bool> stays(values_.size(), false);
  for (size_t i = 0; i < values_.size(); ++i) {
    if (values_[i].wanted == 0) continue;
    stays[i] = true;
    // Shallow copies are made at the end, over the memory of their base.
    if (values_[i].base != kNone) stays[static_cast<size_t>(values_[i].base)] = true;
  }
  const auto drop = [&](int32_t id) {
    if (!stays[static_cast<size_t>(id)]) live_[static_cast<size_t>(id)].reset();
  };
  // Less than at the end of forward: some of it was alive when it was asked for.
  const auto needed = needed_steps();
  for (size_t i = 0; i < steps_.size(); ++i) {
    if (needed[i]) run_step(steps_[i]);
    for (const auto id : ends[i]) drop(id);
    for (const auto id : steps_[i].results) {
      if (id != kNone && values_[static_cast<size_t>(id)].last_use == kNone) drop(id);
    }
  }
  for (size_t i = 0; i < values_.size(); ++i) {
    if (values_[i].wanted > 0) live_[i] = resolve(static_cast<int32_t>(i));
  }
  for (size_t i = 0; i < values_.size(); ++i) {
    if (values_[i].wanted == 0) live_[i].reset();
  }
  // Nothing of it is needed again: a second backward finds the values in live_.
  replayed_ = true;
  steps_.clear();
  generators_.clear();
  for (auto& memory : memories_) memory.before.reset();
  for (auto& value : values_) {
    if (value.wanted == 0) value.outside.reset();
  }
  ++count_replayed;
}

}  // namespace lightning
