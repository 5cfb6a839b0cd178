#include "lightning/param/deferred_init.h"

#include <ATen/Context.h>
#include <ATen/core/Generator.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <ATen/core/ivalue.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>
#include <c10/core/DefaultDtype.h>
#include <c10/core/StorageImpl.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/variable.h>
#include <torch/library.h>
#include <torch/nn/module.h>

#include <algorithm>
#include <mutex>
#include <optional>
#include <unordered_map>
#include <unordered_set>
#include <utility>

#include "lightning/errors.h"
#include "lightning/param/operands.h"
#include "lightning/param/touch.h"

namespace lightning {
namespace {

constexpr auto kKey = c10::DispatchKey::DeferredInit;
constexpr c10::DispatchKeySet kBelow(c10::DispatchKeySet::FULL_AFTER, kKey);
constexpr int32_t kNone = -1;

// In the making of a tensor from literals, which writes it by its address.
bool in_literal() {
  using c10::impl::tls_is_dispatch_keyset_excluded;
  return tls_is_dispatch_keyset_excluded(c10::autograd_dispatch_keyset) &&
         !tls_is_dispatch_keyset_excluded(c10::DispatchKeySet(c10::DispatchKey::ADInplaceOrView));
}

// The argument that an in-place or out= operator gives back as its result `index`; none where the
// result is a new tensor.
std::optional<size_t> given_back(const c10::FunctionSchema& schema, size_t index) {
  const auto* const result = schema.returns()[index].alias_info();
  if (result == nullptr || !result->isWrite()) return std::nullopt;
  for (size_t i = 0; i < schema.arguments().size(); ++i) {
    const auto* const argument = schema.arguments()[i].alias_info();
    if (argument != nullptr && argument->beforeSets() == result->beforeSets()) return i;
  }
  return std::nullopt;
}

struct GeneratorState {
  at::Generator generator;
  at::Tensor state;  // where its recorded draws begin
  at::Tensor end;    // once all draws were made

  static GeneratorState now(at::Generator generator) {
    const std::lock_guard<std::mutex> lock(generator.mutex());
    auto state = generator.get_state();
    return {std::move(generator), std::move(state), {}};
  }
  void restore() {
    const std::lock_guard<std::mutex> lock(generator.mutex());
    generator.set_state(state);
  }
};

}  // namespace

// The operators of a construction. A deferred tensor is known by its memory, a meta storage that is
// held here: views, shallow copies and set_data() need no record.
class DeferredInit::Tape {
 public:
  explicit Tape(at::Device device) : device_(device) {}

  void begin();
  void run(const c10::OperatorHandle& op, c10::DispatchKeySet keys, Stack& stack);

  int32_t memory_of(const at::Tensor& tensor) const;
  bool is_pending() const {
    return std::any_of(memories_.begin(), memories_.end(), [](const Memory& memory) {
      return !memory.is_given && memory.meta.use_count() > 1;
    });
  }
  int64_t size() const { return static_cast<int64_t>(steps_.size()); }
  void materialize(const std::vector<at::Tensor>& tensors, const Take& take);

 private:
  struct Memory {
    c10::Storage meta;
    bool is_given = false;  // to who asked for its values: it is no more of ours
  };
  // An argument that is a tensor, in `arguments[argument]` or there in a list.
  struct Place {
    size_t argument;
    int64_t element;  // -1 where it is no list
    int32_t memory;   // kNone for a constant
    std::optional<Shape> shape;
    at::Tensor constant;
    bool is_read;
    bool is_written;
  };
  struct Result {
    size_t index;  // among the tensors that it gives
    int32_t memory;
    Shape shape;
  };
  struct Step {
    c10::OperatorHandle op;
    Stack arguments;  // with undefined tensors
    std::vector<Place> places;
    std::vector<Result> results;  // those with memory of their own
    bool random = false;
    bool empties = false;     // gives memory with nothing in it
    bool overwrites = false;  // all of the memory of its first argument
    bool grad_mode = false;
    caffe2::TypeMeta default_dtype;  // what numbers and integers become
  };
  // What is to be done for some memories.
  struct Plan {
    std::vector<bool> needed;       // steps
    std::vector<int64_t> last_use;  // of each memory, a step that is needed; -1 for none
  };
  using Live = std::vector<c10::Storage>;

  bool is_deferred_call(const Stack& stack, size_t first) const;
  static void copy_constants(Step& step);
  void check_no_draw(const c10::OperatorHandle& op) const;
  Step make_step(const c10::OperatorHandle& op, const Stack& stack, size_t first) const;
  static Stack on_meta(const c10::OperatorHandle& op, const Stack& stack, size_t first);
  void note_generator(const Stack& stack, size_t first);
  void add_results(Step& step, const Stack& results);
  void run_for_values(Step& step, Stack& stack, size_t first, size_t returns);
  Plan plan(const std::vector<int32_t>& wanted) const;
  void replay_step(const Step& step, Live& live) const;
  void draw_only(const Step& step) const;
  Stack stack_of(const Step& step, Live& live) const;
  void note_state(const GeneratorState& state);
  std::vector<GeneratorState> states_now() const;
  void replay(const Plan& plan, Live& live,
              const std::function<void(int64_t step)>& after_step) const;

  at::Device device_;
  std::vector<Memory> memories_;
  std::unordered_map<const void*, int32_t> memory_at_;
  std::vector<Step> steps_;
  std::vector<GeneratorState> generators_;
  // From which step on a generator draws from which state.
  std::vector<std::pair<size_t, GeneratorState>> starts_;
};

namespace {

thread_local DeferredInit::Tape* recording = nullptr;
thread_local std::optional<at::Device> default_device;

// Gives a factory that was told no device this one.
void place(const c10::OperatorHandle& op, Stack& stack, at::Device device) {
  const auto& arguments = op.schema().arguments();
  const size_t first = stack.size() - arguments.size();
  for (size_t i = 0; i < arguments.size(); ++i) {
    const auto& value = stack[first + i];
    bool any = false;
    visit_tensors(value, [&](const at::Tensor&, int64_t) { any = true; });
    if (any) return;
    if (arguments[i].name() == "device" && value.isNone()) stack[first + i] = c10::IValue(device);
  }
}

// While alive operators of this thread come by here.
Scope listen() {
  const bool before = c10::impl::tls_is_dispatch_key_included(kKey);
  c10::impl::tls_set_dispatch_key_included(kKey, true);
  return scope_exit([before] { c10::impl::tls_set_dispatch_key_included(kKey, before); });
}

// No operator in here is recorded.
class Unrecorded {
 public:
  Unrecorded() { recording = nullptr; }
  ~Unrecorded() {
    recording = tape_;
    c10::set_default_dtype(default_dtype_);
  }
  Unrecorded(const Unrecorded&) = delete;

 private:
  DeferredInit::Tape* const tape_ = recording;
  const caffe2::TypeMeta default_dtype_ = c10::get_default_dtype();  // steps set their own
  c10::impl::ExcludeDispatchKeyGuard seen_{kKey};
  at::NoGradGuard no_grad_;
};

void on_operator(const c10::OperatorHandle& op, c10::DispatchKeySet keys, Stack* stack) {
  if (recording == nullptr) {
    if (default_device) place(op, *stack, *default_device);
    const c10::impl::ExcludeDispatchKeyGuard seen(kKey);
    op.redispatchBoxed(keys & kBelow, stack);
    return;
  }
  recording->run(op, keys, *stack);
}

TORCH_LIBRARY_IMPL(_, DeferredInit, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&on_operator>());
}

}  // namespace

// ---- Recording ---------------------------------------------------------------------------------

void DeferredInit::Tape::begin() {
  for (auto& each : generators_) {
    const auto now = GeneratorState::now(each.generator);
    const auto is = [&](const at::Tensor& state) {
      return state.defined() && now.state.equal(state);
    };
    if (is(each.state) || is(each.end)) continue;
    each = now;  // seeded or used since
    starts_.emplace_back(steps_.size(), now);
  }
  if (!generators_.empty()) return;
  note_state(GeneratorState::now(at::globalContext().defaultGenerator(at::kCPU)));
  if (!device_.is_cpu() && !device_.is_meta()) {
    note_state(GeneratorState::now(at::globalContext().defaultGenerator(device_)));
  }
}

void DeferredInit::Tape::note_state(const GeneratorState& state) {
  generators_.push_back(state);
  starts_.emplace_back(steps_.size(), state);
}

int32_t DeferredInit::Tape::memory_of(const at::Tensor& tensor) const {
  if (!tensor.defined() || !tensor.is_meta() || !tensor.has_storage()) return kNone;
  const auto found = memory_at_.find(tensor.storage().unsafeGetStorageImpl());
  return found == memory_at_.end() ? kNone : found->second;
}

// A call that is told to go to the meta device has that from a deferred tensor's options().
bool DeferredInit::Tape::is_deferred_call(const Stack& stack, size_t first) const {
  bool any = false, deferred = false;
  for (size_t i = first; i < stack.size(); ++i) {
    if (stack[i].isDevice() && stack[i].toDevice().is_meta()) return true;
    visit_tensors(stack[i], [&](const at::Tensor& tensor, int64_t) {
      any = true;
      deferred |= memory_of(tensor) != kNone;
    });
  }
  return any ? deferred : !in_literal();
}

void DeferredInit::Tape::note_generator(const Stack& stack, size_t first) {
  for (size_t i = first; i < stack.size(); ++i) {
    if (!stack[i].isGenerator() || !stack[i].toGenerator().defined()) continue;
    const auto generator = stack[i].toGenerator();
    for (const auto& known : generators_) {
      if (known.generator == generator) return;
    }
    const Unrecorded unrecorded;
    note_state(GeneratorState::now(generator));
  }
}

// A constant that moves to where the model will be is read again by each replay: what is made of it
// shall not share its memory.
void DeferredInit::Tape::copy_constants(Step& step) {
  for (const auto& place : step.places) {
    if (place.memory != kNone) return;
  }
  const auto& arguments = step.op.schema().arguments();
  for (size_t i = 0; i < arguments.size(); ++i) {
    if (arguments[i].name() == "copy") step.arguments[i] = c10::IValue(true);
  }
}

DeferredInit::Tape::Step DeferredInit::Tape::make_step(const c10::OperatorHandle& op,
                                                       const Stack& stack, size_t first) const {
  const Unrecorded unrecorded;
  const auto& schema = op.schema();
  const auto& traits = operator_traits(op);
  Step step{op, {}, {}, {}, false, false, false, false, c10::get_default_dtype()};
  step.random = traits.random;
  step.empties =
      schema.name().rfind("aten::empty", 0) == 0 || schema.name().rfind("aten::new_empty", 0) == 0;
  for (size_t i = 0; i < schema.arguments().size(); ++i) {
    const auto& value = stack[first + i];
    const bool written = (traits.written >> i & 1) != 0;
    const bool only_written = (traits.overwritten >> i & 1) != 0;
    const auto places = step.places.size();
    visit_tensors(value, [&](const at::Tensor& tensor, int64_t element) {
      Place place{i, element, memory_of(tensor), std::nullopt, {}, !only_written, written};
      if (place.memory == kNone) {
        if (written) {
          throw MisconfigurationError(
              str("A constructor under deferred initialisation writes with ", schema.name(),
                  " into a ", tensor.toString(), " of shape ", tensor.sizes(),
                  " that was made before it, or from literals. Make the tensor in the "
                  "constructor, by an operator."));
        }
        place.constant = tensor.detach();
      } else {
        place.shape.emplace(tensor);
      }
      step.places.push_back(std::move(place));
    });
    if (step.places.size() == places) {
      step.arguments.push_back(value);
    } else if (value.isTensor()) {
      step.arguments.emplace_back(at::Tensor());
    } else {
      auto list = value.toList().copy();
      for (auto at = places; at < step.places.size(); ++at) {
        list.set(static_cast<size_t>(step.places[at].element), c10::IValue(at::Tensor()));
      }
      step.arguments.emplace_back(std::move(list));
    }
  }
  copy_constants(step);
  step.overwrites = (traits.overwritten & 1) != 0 && !step.places.empty() &&
                    step.places[0].argument == 0 && step.places[0].shape.has_value() &&
                    step.places[0].shape->is_all;
  return step;
}

// The arguments with everything on the meta device.
Stack DeferredInit::Tape::on_meta(const c10::OperatorHandle& op, const Stack& stack, size_t first) {
  const auto meta = [](const at::Tensor& tensor) {
    if (tensor.is_meta()) return tensor;
    return at::empty_strided(tensor.sizes(), tensor.strides(),
                             tensor.options().device(at::kMeta).requires_grad(false));
  };
  Stack arguments;
  const auto& schema = op.schema();
  bool any = false;
  for (size_t i = 0; i < schema.arguments().size(); ++i) {
    const auto& value = stack[first + i];
    if (value.isTensor() && value.toTensor().defined()) {
      any = true;
      arguments.emplace_back(meta(value.toTensor()));
    } else if (value.isList()) {
      auto list = value.toList().copy();
      visit_tensors(value, [&](const at::Tensor& tensor, int64_t element) {
        any = true;
        list.set(static_cast<size_t>(element), c10::IValue(meta(tensor)));
      });
      arguments.emplace_back(std::move(list));
    } else {
      arguments.push_back(value);
    }
  }
  for (size_t i = 0; i < arguments.size(); ++i) {
    const auto& name = schema.arguments()[i].name();
    if (arguments[i].isDevice() || (name == "device" && !any)) {
      arguments[i] = c10::IValue(at::Device(at::kMeta));
    } else if (name == "pin_memory" && arguments[i].isBool()) {
      arguments[i] = c10::IValue(false);
    }
  }
  return arguments;
}

void DeferredInit::Tape::add_results(Step& step, const Stack& results) {
  size_t index = 0;
  for (const auto& value : results) {
    visit_tensors(value, [&](const at::Tensor& tensor, int64_t) {
      const auto at = index++;
      if (memory_of(tensor) != kNone || !tensor.has_storage()) return;  // an argument's own
      const auto memory = static_cast<int32_t>(memories_.size());
      memories_.push_back({tensor.storage()});
      memory_at_[tensor.storage().unsafeGetStorageImpl()] = memory;
      step.results.push_back({at, memory, Shape(tensor)});
    });
  }
}

// A draw that is made now would come before those that are not made yet.
void DeferredInit::Tape::check_no_draw(const c10::OperatorHandle& op) const {
  if (!operator_traits(op).random) return;
  throw MisconfigurationError(str(
      "A constructor under deferred initialisation draws random numbers with ", op.schema().name(),
      " for a tensor that was made before it, or from literals. Draw for a "
      "tensor that the constructor makes by an operator, or construct the model in the "
      "ordinary way."));
}

void DeferredInit::Tape::run(const c10::OperatorHandle& op, c10::DispatchKeySet keys,
                             Stack& stack) {
  const auto count = op.schema().arguments().size();
  const auto returns = op.schema().returns().size();
  const size_t first = stack.size() - count;
  if (!is_deferred_call(stack, first)) {
    check_no_draw(op);
    const c10::impl::ExcludeDispatchKeyGuard seen(kKey);
    op.redispatchBoxed(keys & kBelow, &stack);
    return;
  }
  note_generator(stack, first);
  if (operator_traits(op).random) begin();  // the constructor may have seeded
  auto step = make_step(op, stack, first);
  step.grad_mode = at::GradMode::is_enabled();
  Stack results;
  bool known = true;
  {
    const c10::impl::ExcludeDispatchKeyGuard seen(kKey);
    results = on_meta(op, stack, first);
    try {
      op.callBoxed(results);
    } catch (const c10::Error&) {
      known = false;  // its result, or its shape, depends on values
    }
  }
  if (!known) {
    run_for_values(step, stack, first, returns);
    return;
  }
  add_results(step, results);
  const bool writes = operator_traits(op).written != 0;
  if (!step.results.empty() || writes) steps_.push_back(std::move(step));
  stack.resize(first);
  for (auto& result : results) stack.push_back(std::move(result));
}

// Computes what the operator reads. Numbers are given as they are; tensors stay deferred, in the
// shape that they turned out to have.
void DeferredInit::Tape::run_for_values(Step& step, Stack& stack, size_t first, size_t returns) {
  const Unrecorded unrecorded;
  auto after = states_now();
  Stack results;
  {
    const auto back = scope_exit([&] {
      for (auto& each : after) each.restore();
    });
    std::vector<int32_t> wanted;
    for (const auto& place : step.places) {
      if (place.memory != kNone) wanted.push_back(place.memory);
    }
    Live live(memories_.size());
    replay(plan(wanted), live, [](int64_t) {});
    results = stack_of(step, live);
    c10::set_default_dtype(step.default_dtype);
    const at::AutoGradMode grad_mode(step.grad_mode);
    step.op.callBoxed(results);
  }
  TORCH_INTERNAL_ASSERT(results.size() == returns);
  for (size_t i = 0; i < returns; ++i) {
    auto& value = results[i];
    const auto argument = given_back(step.op.schema(), i);
    if (argument.has_value()) {
      value = stack[first + *argument];
    } else if (value.isTensor() && value.toTensor().defined()) {
      const auto& real = value.toTensor();
      value = at::empty_strided(real.sizes(), real.strides(), real.options().device(at::kMeta));
    } else if (value.isList()) {
      auto list = value.toList().copy();
      visit_tensors(value, [&](const at::Tensor& real, int64_t element) {
        list.set(static_cast<size_t>(element),
                 c10::IValue(at::empty_strided(real.sizes(), real.strides(),
                                               real.options().device(at::kMeta))));
      });
      value = std::move(list);
    }
  }
  add_results(step, results);
  const bool writes = operator_traits(step.op).written != 0;
  if (!step.results.empty() || writes) steps_.push_back(std::move(step));
  stack.resize(first);
  for (auto& result : results) stack.push_back(std::move(result));
}

// ---- Doing what was recorded -------------------------------------------------------------------

// From the last step to the first: what the wanted memories depend on.
DeferredInit::Tape::Plan DeferredInit::Tape::plan(const std::vector<int32_t>& wanted) const {
  Plan plan{std::vector<bool>(steps_.size(), false), std::vector<int64_t>(memories_.size(), -1)};
  std::vector<bool> need(memories_.size(), false);
  for (const auto memory : wanted) need[static_cast<size_t>(memory)] = true;
  const auto use = [&](int32_t memory, size_t step) {
    auto& last = plan.last_use[static_cast<size_t>(memory)];
    if (last < 0) last = static_cast<int64_t>(step);
  };
  for (size_t i = steps_.size(); i-- > 0;) {
    const auto& step = steps_[i];
    bool run = false, other_tensors = false;
    for (const auto& result : step.results) run |= need[static_cast<size_t>(result.memory)];
    for (const auto& place : step.places) {
      if (place.is_written) run |= need[static_cast<size_t>(place.memory)];
      other_tensors |= !place.is_written;
    }
    // How much is drawn may depend on what is read.
    run |= step.random && other_tensors;
    if (!run || (step.empties && !step.random)) {
      // Memory with nothing in it is made when it is used first.
      continue;
    }
    plan.needed[i] = true;
    for (const auto& result : step.results) {
      use(result.memory, i);
      need[static_cast<size_t>(result.memory)] = false;  // it begins here
    }
    for (const auto& place : step.places) {
      if (place.memory == kNone) continue;
      use(place.memory, i);
      if (step.overwrites && place.argument == 0) need[static_cast<size_t>(place.memory)] = false;
    }
    for (const auto& place : step.places) {
      if (place.memory != kNone && place.is_read) need[static_cast<size_t>(place.memory)] = true;
    }
  }
  return plan;
}

Stack DeferredInit::Tape::stack_of(const Step& step, Live& live) const {
  Stack stack;
  for (const auto& argument : step.arguments) {
    stack.push_back(argument.isList() ? c10::IValue(argument.toList().copy()) : argument);
  }
  for (size_t i = 0; i < stack.size(); ++i) {
    const auto& name = step.op.schema().arguments()[i].name();
    const bool factory = step.places.empty() && name == "device";
    if (stack[i].isDevice() || factory) stack[i] = c10::IValue(device_);
    if (name == "pin_memory" && !device_.is_cpu()) stack[i] = c10::IValue();
  }
  for (const auto& place : step.places) {
    at::Tensor tensor;
    if (place.memory == kNone) {
      const auto& constant = place.constant;
      // Indices and the like may stay where they are; what is combined with tensors may not.
      tensor = constant.dim() == 0 ? constant : constant.to(device_);
    } else {
      auto& storage = live[static_cast<size_t>(place.memory)];
      if (!storage) {
        const auto bytes = memories_[static_cast<size_t>(place.memory)].meta.nbytes();
        storage = at::empty({static_cast<int64_t>(bytes)},
                            at::TensorOptions().dtype(at::kByte).device(device_))
                      .storage();
      }
      tensor = place.shape->over(storage);
    }
    if (place.element < 0) {
      stack[place.argument] = std::move(tensor);
    } else {
      stack[place.argument].toList().set(static_cast<size_t>(place.element), std::move(tensor));
    }
  }
  return stack;
}

void DeferredInit::Tape::replay_step(const Step& step, Live& live) const {
  if (c10::get_default_dtype() != step.default_dtype) c10::set_default_dtype(step.default_dtype);
  auto stack = stack_of(step, live);
  {
    const at::AutoGradMode grad_mode(step.grad_mode && !operator_traits(step.op).written);
    step.op.callBoxed(stack);
  }
  std::vector<at::Tensor> tensors;
  for (const auto& value : stack) {
    visit_tensors(value, [&](const at::Tensor& each, int64_t) { tensors.push_back(each); });
  }
  for (const auto& result : step.results) {
    auto tensor = tensors.at(result.index).detach();
    TORCH_CHECK(tensor.sizes() == at::IntArrayRef(result.shape.sizes), step.op.schema().name(),
                " gave shape ", tensor.sizes(), " where a model is materialized, and ",
                at::IntArrayRef(result.shape.sizes), " where it was constructed");
    const bool as_recorded = tensor.strides() == at::IntArrayRef(result.shape.strides) &&
                             tensor.storage_offset() == result.shape.offset;
    if (!as_recorded) {
      auto copy = at::empty_strided(result.shape.sizes, result.shape.strides, tensor.options());
      copy.copy_(tensor);
      tensor = copy;
    }
    live[static_cast<size_t>(result.memory)] = tensor.storage();
  }
}

// Nobody wants what it draws; what is drawn after it depends on that it drew.
void DeferredInit::Tape::draw_only(const Step& step) const {
  Live scratch(memories_.size());
  replay_step(step, scratch);
}

std::vector<GeneratorState> DeferredInit::Tape::states_now() const {
  std::vector<GeneratorState> now;
  for (const auto& each : generators_) now.push_back(GeneratorState::now(each.generator));
  return now;
}

void DeferredInit::Tape::replay(const Plan& plan, Live& live,
                                const std::function<void(int64_t step)>& after_step) const {
  auto start = starts_.begin();
  const auto set_generators = [&](size_t step) {
    for (; start != starts_.end() && start->first <= step; ++start) {
      GeneratorState(start->second).restore();
    }
  };
  for (size_t i = 0; i < steps_.size(); ++i) {
    set_generators(i);
    if (plan.needed[i]) {
      replay_step(steps_[i], live);
    } else if (steps_[i].random) {
      draw_only(steps_[i]);
    }
    after_step(static_cast<int64_t>(i));
  }
  set_generators(steps_.size());
}

void DeferredInit::Tape::materialize(const std::vector<at::Tensor>& tensors, const Take& take) {
  const Unrecorded unrecorded;
  std::vector<int32_t> wanted;
  std::unordered_map<int32_t, std::vector<at::Tensor>> of_memory;
  std::unordered_set<const void*> seen;
  for (const auto& tensor : tensors) {
    const auto memory = memory_of(tensor);
    if (memory == kNone || memories_[static_cast<size_t>(memory)].is_given) continue;
    if (!seen.insert(tensor.unsafeGetTensorImpl()).second) continue;
    wanted.push_back(memory);
    of_memory[memory].push_back(tensor);
  }
  const auto plan = this->plan(wanted);
  std::vector<std::vector<int32_t>> ends(steps_.size() + 1);
  for (size_t i = 0; i < memories_.size(); ++i) {
    const bool is_wanted = of_memory.count(static_cast<int32_t>(i)) > 0;
    // What nothing was ever done to is complete at the end.
    if (plan.last_use[i] >= 0) {
      ends[static_cast<size_t>(plan.last_use[i])].push_back(static_cast<int32_t>(i));
    } else if (is_wanted) {
      ends.back().push_back(static_cast<int32_t>(i));
    }
  }
  Live live(memories_.size());
  const auto give = [&](int64_t step) {
    for (const auto memory : ends[static_cast<size_t>(step)]) {
      auto storage = std::exchange(live[static_cast<size_t>(memory)], c10::Storage());
      const auto found = of_memory.find(memory);
      if (found == of_memory.end()) continue;
      if (!storage) {
        const auto bytes = memories_[static_cast<size_t>(memory)].meta.nbytes();
        storage = at::empty({static_cast<int64_t>(bytes)},
                            at::TensorOptions().dtype(at::kByte).device(device_))
                      .storage();
      }
      for (const auto& tensor : found->second) take(tensor, Shape(tensor).over(storage));
      memories_[static_cast<size_t>(memory)].is_given = true;
    }
  };
  auto now = states_now();
  const auto back = scope_exit([&] {
    for (size_t i = 0; i < now.size(); ++i) {
      auto& ours = generators_[i];
      ours.end = GeneratorState::now(ours.generator).state;
      // One that was used or seeded since is not ours to move.
      if (!now[i].state.equal(ours.state)) now[i].restore();
    }
  });
  replay(plan, live, give);
  give(static_cast<int64_t>(steps_.size()));
}

// ---- The interface -----------------------------------------------------------------------------

DeferredInit::DeferredInit(at::Device device) : tape_(std::make_unique<Tape>(device)) {}
DeferredInit::~DeferredInit() = default;

Scope DeferredInit::record() {
  if (recording != nullptr) {
    throw MisconfigurationError(
        "Deferred initialisation was begun inside of another. Construct the model in one scope.");
  }
  tape_->begin();
  recording = tape_.get();
  return scope_exit([listening = listen()] { recording = nullptr; });
}

bool DeferredInit::is_deferred(const at::Tensor& tensor) const {
  return tape_->memory_of(tensor) != kNone;
}

bool DeferredInit::is_pending() const { return tape_->is_pending(); }

void DeferredInit::materialize(const std::vector<at::Tensor>& tensors, const Take& take) {
  tape_->materialize(tensors, take);
}

void DeferredInit::materialize(torch::nn::Module& module) {
  std::vector<at::Tensor> tensors;
  const auto add = [&](const auto& items) {
    for (const auto& item : items) {
      const auto& tensor = item.value();
      if (tensor.defined() && tensor.is_meta() && !is_deferred(tensor)) {
        throw MisconfigurationError(
            str("\"", item.key(),
                "\" is on the meta device, but not as deferred initialisation "
                "recorded it. Convert a model that is born empty (Module::to) where it is "
                "constructed, inside of the recording."));
      }
      tensors.push_back(tensor);
    }
  };
  add(module.named_parameters());
  add(module.named_buffers());
  materialize(tensors, [](const at::Tensor& tensor, const at::Tensor& values) {
    tensor.unsafeGetTensorImpl()->shallow_copy_from(values.getIntrusivePtr());
    if (torch::autograd::impl::get_autograd_meta(tensor) != nullptr) {
      // Made for a gradient on the meta device.
      torch::autograd::impl::set_grad_accumulator(tensor, {});
    }
  });
}

int64_t DeferredInit::size() const { return tape_->size(); }

Scope default_device_scope(at::Device device) {
  const auto before = std::exchange(default_device, device);
  return scope_exit([before, listening = listen()] { default_device = before; });
}

}  // namespace lightning
