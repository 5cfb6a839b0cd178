#include "lightning/param/touch.h"

#include <ATen/core/VariableHooksInterface.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/ivalue.h>
#include <ATen/ops/empty.h>
#include <c10/core/InferenceMode.h>
#include <c10/core/StorageImpl.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/function_hook.h>
#include <torch/csrc/autograd/variable.h>
#include <torch/library.h>

#include <typeinfo>
#include <unordered_map>
#include <unordered_set>
#include <utility>

#include "lightning/errors.h"
#include "lightning/param/left_behind.h"

namespace lightning {

// The memory of a backed parameter and of all its views. It always tells its full size, so that
// views can be made of it; its address is null while the parameter is not whole.
class TouchStorage final : public c10::StorageImpl {
 public:
  TouchStorage(size_t bytes, at::Device device, BackedParameter* owner)
      : StorageImpl(use_byte_size_t(), c10::SymInt(static_cast<int64_t>(bytes)),
                    c10::DataPtr(nullptr, device), nullptr, /*resizable=*/false),
        owner_(owner),
        name_(owner->name()) {}

  // Null once the backing has ended.
  BackedParameter* owner() const { return owner_; }
  const std::string& name() const { return name_; }
  void end() { owner_ = nullptr; }

  // For when it has; null for nothing.
  const std::shared_ptr<LeftBehind>& left_behind() const { return left_behind_; }
  void leave_behind(std::shared_ptr<LeftBehind> what) { left_behind_ = std::move(what); }

  bool is_whole() const { return data() != nullptr || nbytes() == 0; }

 private:
  BackedParameter* owner_;
  std::string name_;
  std::shared_ptr<LeftBehind> left_behind_;
};

namespace {

constexpr auto kKey = c10::DispatchKey::Fake;
constexpr c10::DispatchKeySet kBelow(c10::DispatchKeySet::FULL_AFTER, kKey);

TouchStorage* touch_storage(const at::Tensor& tensor) {
  if (!tensor.key_set().has(kKey) || !tensor.has_storage()) return nullptr;
  c10::StorageImpl* const storage = tensor.storage().unsafeGetStorageImpl();
  // The key stays on a tensor whose storage was replaced (Tensor::set_).
  return typeid(*storage) == typeid(TouchStorage) ? static_cast<TouchStorage*>(storage) : nullptr;
}

// ---- What an operator does with its arguments --------------------------------------------------

bool makes_views(const c10::FunctionSchema& schema) {
  bool views = false;
  for (const auto& argument : schema.arguments()) {
    if (argument.alias_info() == nullptr) continue;
    if (argument.alias_info()->isWrite()) return false;
    views = true;
  }
  return views && !schema.returns().empty();
}

// Operators that read no element of a tensor, though their schema does not say so.
bool reads_only_metadata(const std::string& name) {
  static const std::unordered_set<std::string> kNames{
      "aten::size",
      "aten::sym_size",
      "aten::stride",
      "aten::sym_stride",
      "aten::numel",
      "aten::sym_numel",
      "aten::dim",
      "aten::storage_offset",
      "aten::sym_storage_offset",
      "aten::is_same_size",
      "aten::is_floating_point",
      "aten::is_complex",
      "aten::is_signed",
      "aten::is_conj",
      "aten::is_neg",
      "aten::is_inference",
      "aten::is_leaf",
      "aten::result_type",
      "aten::empty_like",
      "aten::zeros_like",
      "aten::ones_like",
      "aten::full_like",
      "aten::rand_like",
      "aten::randn_like",
      "aten::randint_like",
      "aten::new_empty",
      "aten::new_zeros",
      "aten::new_ones",
      "aten::new_full",
      "aten::new_empty_strided",
      "aten::is_contiguous",
      "aten::sym_is_contiguous",
      "aten::is_non_overlapping_and_dense",
  };
  return kNames.count(name) > 0;
}

// Arguments that operators write into without saying so in their schema.
bool is_written_silently(const std::string& argument) {
  return argument == "running_mean" || argument == "running_var" || argument == "dropout_state";
}

// Operators that write each element of their first argument and read none.
bool fills(const std::string& name) {
  static const std::unordered_set<std::string> kNames{
      "aten::uniform_",   "aten::normal_", "aten::fill_",       "aten::zero_",
      "aten::copy_",      "aten::random_", "aten::log_normal_", "aten::exponential_",
      "aten::bernoulli_", "aten::cauchy_", "aten::geometric_"};
  return kNames.count(name) > 0;
}

OperatorTraits find_traits(const c10::OperatorHandle& op) {
  const auto& schema = op.schema();
  OperatorTraits traits;
  traits.views = makes_views(schema);
  traits.only_looks = traits.views || reads_only_metadata(schema.name());
  traits.decomposes = op.hasKernelForDispatchKey(c10::DispatchKey::CompositeImplicitAutograd) &&
                      !op.hasKernelForDispatchKey(c10::DispatchKey::CPU) &&
                      !op.hasKernelForDispatchKey(c10::DispatchKey::CUDA);
  traits.random = op.hasTag(at::Tag::nondeterministic_seeded);
  const auto& arguments = schema.arguments();
  TORCH_CHECK(arguments.size() <= 64, schema.name(), " has more than 64 arguments");
  for (size_t i = 0; i < arguments.size(); ++i) {
    const auto& argument = arguments[i];
    const bool written = argument.alias_info() != nullptr && argument.alias_info()->isWrite();
    const auto type = argument.type()->str();
    // Tensor, Tensor?, Tensor[] and Tensor?[] have it in their name, and so has no other type.
    const bool tensors = type.find("Tensor") != std::string::npos;
    traits.random |= type.find("Generator") != std::string::npos;
    traits.tensors |= uint64_t{tensors} << i;
    const bool filled = argument.is_out() || (i == 0 && fills(schema.name()));
    traits.written |= uint64_t{written || is_written_silently(argument.name())} << i;
    traits.overwritten |= uint64_t{written && filled} << i;
  }
  return traits;
}

}  // namespace

const OperatorTraits& operator_traits(const c10::OperatorHandle& op) {
  thread_local std::unordered_map<c10::OperatorHandle, OperatorTraits> known;
  const auto found = known.find(op);
  if (found != known.end()) return found->second;
  return known.emplace(op, find_traits(op)).first->second;
}

namespace {

thread_local OperatorWatch* watching = nullptr;

// ---- The touch ---------------------------------------------------------------------------------

[[noreturn]] void refuse_ended(const TouchStorage& storage, const std::string& op) {
  throw MisconfigurationError(str(
      "Parameter \"", storage.name(), "\" was read by ", op,
      " after the run that kept it in parts had ended, and it was not whole then. Read it while "
      "the run lasts, or load the model from its checkpoint."));
}

void tell_before(Touch& touch) {
  // The backing's own operators are no part of the model's forward, nor of its autocast.
  const c10::impl::ExcludeDispatchKeyGuard below(
      c10::autograd_dispatch_keyset_with_ADInplaceOrView | c10::autocast_dispatch_keyset);
  struct Unwatched {
    OperatorWatch* const before = std::exchange(watching, nullptr);
    ~Unwatched() { watching = before; }
  } unwatched;
  touch.parameter.backing().before(touch);
  TORCH_INTERNAL_ASSERT(touch.parameter.is_whole(), touch.parameter.name(),
                        " is not whole after its backing was told");
}

// What the touches of one operator leave behind.
struct Touched {
  uint64_t serial = 0;                 // 0 while no backing was told
  c10::SmallVector<Touch, 2> waiting;  // for the operator's results
  c10::SmallVector<TouchStorage*, 4> storages;
};

uint64_t next_serial() {
  static std::atomic<uint64_t> serial{0};
  return ++serial;
}

void touch_tensor(const at::Tensor& tensor, const c10::OperatorHandle& op,
                  std::vector<c10::IValue>* stack, bool writes, Touched& touched) {
  TouchStorage* const storage = touch_storage(tensor);
  if (storage == nullptr) return;
  BackedParameter* const owner = storage->owner();
  if (owner == nullptr) {
    if (storage->is_whole()) return;
    refuse_ended(*storage, op.operator_name().name);
  }
  if (owner->listener() != nullptr) owner->listener()->touched(*owner);
  touched.storages.push_back(storage);
  const auto& backing = owner->backing();
  const bool tell = !backing.asleep() || writes;
  if (!tell && !backing.wants_results()) return;
  if (touched.serial == 0) touched.serial = next_serial();
  Touch touch{*owner, tensor, &op, stack, writes, touched.serial};
  if (tell) tell_before(touch);
  if (backing.wants_results()) touched.waiting.push_back(std::move(touch));
}

// An operator may read parameters of several backings, of which one releases what the other made
// whole before it knows better.
void touch_again(const c10::OperatorHandle& op, std::vector<c10::IValue>* stack, Touched& touched) {
  const auto count = touched.storages.size();
  for (size_t round = 0; round < count; ++round) {
    bool all = true;
    for (auto* const storage : touched.storages) {
      if (storage->is_whole()) continue;
      all = false;
      auto& owner = *storage->owner();
      Touch touch{owner, owner.parameter(), &op, stack, /*writes=*/false, touched.serial};
      tell_before(touch);
    }
    if (all) return;
  }
}

void touch_arguments(const c10::OperatorHandle& op, const OperatorTraits& traits,
                     std::vector<c10::IValue>* stack, Touched& touched) {
  const size_t count = op.schema().arguments().size();
  const size_t first = stack->size() - count;
  for (size_t i = 0; i < count; ++i) {
    if ((traits.tensors >> i & 1) == 0) continue;
    const bool writes = (traits.written >> i & 1) != 0;
    const c10::IValue& value = (*stack)[first + i];
    if (value.isTensor()) {
      touch_tensor(value.toTensor(), op, stack, writes, touched);
    } else if (value.isList()) {
      for (const c10::IValue& element : value.toListRef()) {
        if (element.isTensor()) touch_tensor(element.toTensor(), op, stack, writes, touched);
      }
    }
  }
}

void on_operator(const c10::OperatorHandle& op, c10::DispatchKeySet keys,
                 std::vector<c10::IValue>* stack) {
  const OperatorTraits& traits = operator_traits(op);
  if (traits.decomposes) {
    op.redispatchBoxed(keys & kBelow, stack);
    return;
  }
  Touched touched;
  if (!traits.only_looks) {
    touch_arguments(op, traits, stack, touched);
    if (touched.serial != 0 && touched.storages.size() > 1) touch_again(op, stack, touched);
  }
  OperatorWatch* const watch = watching;
  if (watch != nullptr) watch->before(op, *stack);
  {
    const c10::impl::ExcludeDispatchKeyGuard seen(kKey);
    op.redispatchBoxed(keys & kBelow, stack);
  }
  for (auto& touch : touched.waiting) touch.parameter.backing().after(touch);
  if (watch != nullptr && watch == watching) watch->after(op, *stack);
}

TORCH_LIBRARY_IMPL(_, Fake, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&on_operator>());
}

// ---- Gradients ---------------------------------------------------------------------------------

class GradientHook : public torch::autograd::PostAccumulateGradHook {
 public:
  GradientHook(std::function<void()> hook,
               std::unique_ptr<torch::autograd::PostAccumulateGradHook> before)
      : hook_(std::move(hook)), before_(std::move(before)) {}

  void operator()(const at::Tensor& parameter) override {
    if (before_ != nullptr) (*before_)(parameter);
    hook_();
  }
  std::unique_ptr<torch::autograd::PostAccumulateGradHook> take_before() {
    return std::move(before_);
  }

 private:
  std::function<void()> hook_;
  std::unique_ptr<torch::autograd::PostAccumulateGradHook> before_;
};

// Dense, and each row of dim 0 in one piece after the other.
bool rows_lie_together(const at::Tensor& data) {
  if (data.dim() == 0) return true;
  // Also where there is one row, which others may be added to.
  return data.is_non_overlapping_and_dense() && data.stride(0) * data.size(0) == data.numel();
}

std::vector<int64_t> contiguous_strides(at::IntArrayRef sizes) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t i = sizes.size(); i-- > 1;)
    strides[i - 1] = strides[i] * std::max<int64_t>(sizes[i], 1);
  return strides;
}

at::Tensor tensor_over(const c10::Storage& storage, at::ScalarType dtype, bool with_key,
                       at::IntArrayRef sizes, at::IntArrayRef strides) {
  c10::DispatchKeySet keys(c10::computeDispatchKey(dtype, at::kStrided, storage.device()));
  if (with_key) keys = keys.add(kKey);
  auto tensor = at::detail::make_tensor<c10::TensorImpl>(c10::Storage(storage), keys,
                                                         c10::scalarTypeToTypeMeta(dtype));
  tensor.unsafeGetTensorImpl()->set_sizes_and_strides(sizes, strides);
  return tensor;
}

}  // namespace

std::string Touch::operator_name() const {
  return op == nullptr ? "whole()" : op->operator_name().name;
}

BackedParameter::BackedParameter(std::string name, at::Tensor parameter, Backing& backing,
                                 const BackedOptions& options)
    : name_(std::move(name)), parameter_(std::move(parameter)), backing_(backing) {
  if (backed_parameter(parameter_) != nullptr) {
    throw MisconfigurationError(str("Parameter \"", name_, "\" has a backing already, as \"",
                                    backed_parameter(parameter_)->name(),
                                    "\". Give a parameter that is used under two names one "
                                    "backing, or call restore() on the first."));
  }
  if (parameter_.layout() != at::kStrided || parameter_.is_quantized()) {
    throw MisconfigurationError(str("Parameter \"", name_, "\" is ", parameter_.toString(),
                                    "; only dense parameters can be kept in parts. Leave it out, "
                                    "or make it dense."));
  }
  const c10::InferenceMode ordinary(false);
  show(parameter_.detach(), options);
}

void BackedParameter::show(const at::Tensor& data, const BackedOptions& options) {
  const auto dtype = options.dtype.value_or(data.scalar_type());
  const auto device = options.device.value_or(data.device());
  const auto sizes = data.sizes().vec();
  const bool keep = rows_lie_together(data);
  const auto strides = keep ? data.strides().vec() : contiguous_strides(sizes);

  auto padded = sizes;
  if (!padded.empty()) padded[0] = std::max(padded[0], options.padded_rows);
  const auto bytes = c10::multiply_integers(padded) * static_cast<int64_t>(c10::elementSize(dtype));
  auto storage = c10::make_intrusive<TouchStorage>(static_cast<size_t>(bytes), device, this);
  storage_ = storage.get();
  const c10::Storage memory(std::move(storage));
  memory_ = tensor_over(memory, dtype, /*with_key=*/false, padded, strides);
  auto shown = tensor_over(memory, dtype, /*with_key=*/true, sizes, strides);

  if (!data.is_meta()) take_values(data);
  if (data.is_meta()) {
    // set_data() takes no data of another kind of device.
    parameter_.unsafeGetTensorImpl()->shallow_copy_from(shown.getIntrusivePtr());
    if (torch::autograd::impl::get_autograd_meta(parameter_) != nullptr) {
      torch::autograd::impl::set_grad_accumulator(parameter_, {});
    }
  } else {
    parameter_.set_data(shown);
  }
}

void BackedParameter::take_values(const at::Tensor& data) {
  const bool as_it_is = data.scalar_type() == memory_.scalar_type() &&
                        data.device() == memory_.device() && data.sizes() == memory_.sizes() &&
                        data.strides() == memory_.strides();
  if (as_it_is) {
    auto* const owner = new c10::Storage(data.storage());
    storage_->set_data_ptr_noswap(c10::DataPtr(
        data.mutable_data_ptr(), owner,
        [](void* storage) { delete static_cast<c10::Storage*>(storage); }, data.device()));
    return;
  }
  allocate();
  auto values = memory_;
  if (memory_.sizes() != data.sizes()) {
    memory_.zero_();
    values = memory_.narrow(0, 0, data.size(0));
  }
  values.copy_(data);
}

BackedParameter::~BackedParameter() {
  on_gradient(nullptr);
  if (storage_ != nullptr) storage_->end();
}

bool BackedParameter::is_whole() const { return storage_ == nullptr || storage_->is_whole(); }

size_t BackedParameter::allocated_bytes() const { return memory_.storage().nbytes(); }

void BackedParameter::allocate() {
  const c10::InferenceMode ordinary(false);
  give(at::empty({static_cast<int64_t>(allocated_bytes())},
                 at::TensorOptions().dtype(at::kByte).device(memory_.device())));
}

void BackedParameter::give(at::Tensor memory) {
  TORCH_CHECK(memory.storage().nbytes() >= allocated_bytes() && memory.storage_offset() == 0 &&
                  memory.device() == memory_.device(),
              "give(): ", name_, " needs ", allocated_bytes(), " bytes on ", memory_.device(),
              ", got ", memory.storage().nbytes(), " on ", memory.device());
  auto* const from = memory.storage().unsafeGetStorageImpl();
  storage_->set_data_ptr_noswap(std::move(from->_mutable_data_ptr_no_checks()));
}

void BackedParameter::release() {
  storage_->set_data_ptr_noswap(c10::DataPtr(nullptr, memory_.device()));
}

void BackedParameter::restore(at::Tensor data) {
  if (storage_ == nullptr) return;
  on_gradient(nullptr);
  parameter_.set_data(data);
  storage_->end();
  storage_ = nullptr;
  memory_ = data;
}

bool BackedParameter::is_in_place() const {
  return storage_ == nullptr || touch_storage(parameter_) == storage_;
}

void BackedParameter::mark_changed() { parameter_.unsafeGetTensorImpl()->bump_version(); }

void BackedParameter::on_gradient(std::function<void()> hook) {
  namespace impl = torch::autograd::impl;
  if (hook == nullptr && impl::get_autograd_meta(parameter_) == nullptr) return;
  impl::materialize_autograd_meta(parameter_);
  auto& current = impl::post_acc_grad_hooks(parameter_);
  auto others = std::move(current);
  if (auto* const ours = dynamic_cast<GradientHook*>(others.get())) others = ours->take_before();
  if (hook != nullptr) others = std::make_unique<GradientHook>(std::move(hook), std::move(others));
  current = std::move(others);
}

at::Tensor BackedParameter::take_gradient() {
  return std::exchange(parameter_.mutable_grad(), at::Tensor());
}

BackedParameter* backed_parameter(const at::Tensor& tensor) {
  if (!tensor.defined()) return nullptr;
  const TouchStorage* const storage = touch_storage(tensor);
  return storage == nullptr ? nullptr : storage->owner();
}

void leave_behind(const at::Tensor& parameter, std::shared_ptr<LeftBehind> what) {
  if (auto* const storage = touch_storage(parameter)) storage->leave_behind(std::move(what));
}

std::shared_ptr<LeftBehind> left_behind(const at::Tensor& parameter) {
  const auto* const storage = parameter.defined() ? touch_storage(parameter) : nullptr;
  return storage == nullptr || storage->owner() != nullptr ? nullptr : storage->left_behind();
}

OperatorWatch* watch_operators(OperatorWatch* watch) {
  c10::impl::tls_set_dispatch_key_included(kKey, watch != nullptr);
  return std::exchange(watching, watch);
}

const at::Tensor& whole(const at::Tensor& tensor) {
  if (!tensor.defined()) return tensor;
  const TouchStorage* const storage = touch_storage(tensor);
  if (storage == nullptr) return tensor;
  BackedParameter* const owner = storage->owner();
  if (owner == nullptr) {
    if (!storage->is_whole()) refuse_ended(*storage, "whole()");
    return tensor;
  }
  if (owner->listener() != nullptr) owner->listener()->touched(*owner);
  if (owner->backing().asleep()) return tensor;
  Touch touch{*owner, tensor, nullptr, nullptr, false, next_serial()};
  tell_before(touch);
  return tensor;
}

}  // namespace lightning
