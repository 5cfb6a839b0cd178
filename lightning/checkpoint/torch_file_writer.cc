// write_torch_file(): a tree becomes a pickle and the bytes of its storages. The order of the
// opcodes is that of Python's pickle module, so that equal trees give equal files.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <c10/core/Storage.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <algorithm>
#include <iomanip>
#include <limits>
#include <memory>
#include <set>
#include <unordered_map>

#include "lightning/checkpoint/crc32.h"
#include "lightning/checkpoint/known_objects.h"
#include "lightning/checkpoint/pickle_writer.h"
#include "lightning/checkpoint/scalar_type.h"
#include "lightning/checkpoint/torch_file.h"
#include "lightning/errors.h"

namespace lightning {
namespace {

using How = State::Object::How;

// Python's own pickle module gives up at about as many.
constexpr size_t kMostNested = 1000;

// The way from the root of the tree.
class Way {
 public:
  void enter() { steps_.emplace_back(); }
  void leave() { steps_.pop_back(); }
  void at(const State::Key& key) { steps_.back() = {&key, nullptr, 0}; }
  void at(const char* attribute) { steps_.back() = {nullptr, attribute, 0}; }
  void at(size_t index) { steps_.back() = {nullptr, nullptr, index}; }
  size_t depth() const { return steps_.size(); }

  // "optimizer_states.0.state.3.exp_avg"
  std::string text() const {
    std::string text;
    for (const Step& step : steps_) {
      if (text.size() > 300) return text + "...";
      text += text.empty() ? "" : ".";
      text += step.key != nullptr         ? to_string(*step.key).substr(0, 200)
              : step.attribute != nullptr ? step.attribute
                                          : std::to_string(step.index);
    }
    return text;
  }

 private:
  struct Step {
    const State::Key* key = nullptr;
    const char* attribute = nullptr;
    size_t index = 0;
  };
  std::vector<Step> steps_;
};

// Walks a tree; what is done at each value is the derived class's.
class Walker {
 protected:
  [[noreturn]] void refuse(const std::string& what) const {
    throw CheckpointError(way_.depth() == 0 ? str("Cannot save the state: it ", what)
                                            : str("Cannot save \"", way_.text(), "\": it ", what));
  }

  void enter() {
    way_.enter();
    if (way_.depth() > kMostNested) {
      refuse(str("is nested more than ", kMostNested, " deep. Save less deeply nested values."));
    }
  }

  Way way_;
};

// A storage, and the part of it that tensors of the tree use.
struct Use {
  c10::Storage storage;
  c10::ScalarType dtype = c10::ScalarType::Undefined;  // of its first tensor
  bool mixed = false;                                  // tensors of several dtypes share it
  uint64_t begin = std::numeric_limits<uint64_t>::max();
  uint64_t end = 0;
  uint64_t widest = 1;  // bytes of the largest element
  int64_t key = -1;     // data/<key>, once it is written
  uint32_t key_memo = 0;

  uint64_t bytes() const { return end > begin ? end - begin : 0; }
};

using Uses = std::unordered_map<const c10::StorageImpl*, Use>;

const c10::StorageImpl* storage_of(const at::Tensor& tensor) {
  return tensor.storage().unsafeGetStorageImpl();
}

// Finds the storages, and the tensors that cannot be saved.
class Collector : Walker {
 public:
  Uses collect(const State& state) {
    visit(state);
    for (auto& [storage, use] : uses_) {
      // Offsets count elements of each dtype.
      use.begin -= use.begin % use.widest;
      if (use.begin >= use.end) use.begin = use.end = 0;
    }
    return std::move(uses_);
  }

 private:
  void visit(const State& state) {
    if (state.is<TensorState>()) {
      visit_tensor(state.as_tensor_state());
    } else if (state.is<State::List>() || state.is<State::Tuple>()) {
      visit_items(state.as_list());
    } else if (state.is<State::Set>()) {
      visit_items(state.as_set().items);
    } else if (state.is_dict()) {
      enter();
      for (const auto& [key, value] : state.as_dict()) {
        way_.at(key);
        const auto* other = std::get_if<State::OtherKey>(&key);
        if (other != nullptr && other->value != nullptr) visit(*other->value);
        visit(value);
      }
      const auto& type = state.as_dict().python_class();
      if (type != nullptr) visit_inside("its attributes", type->attributes);
      way_.leave();
    } else if (state.is_object()) {
      visit_items(state.as_object().arguments);
      enter();
      visit_inside("its attributes", state.as_object().attributes);
      way_.leave();
    }
  }

  void visit_inside(const char* name, const State& state) {
    way_.at(name);
    visit(state);
  }

  void visit_items(const State::List& items) {
    enter();
    for (size_t i = 0; i < items.size(); ++i) {
      way_.at(i);
      visit(items[i]);
    }
    way_.leave();
  }

  void visit_tensor(const TensorState& state) {
    if (state.python_class != nullptr) {
      enter();
      visit_inside("its attributes", state.python_class->as_object().attributes);
      way_.leave();
    }
    if (state.chunks.size() != 1 || state.chunks[0].sizes != state.sizes) {
      refuse(str("is a tensor of shape ", c10::IntArrayRef(state.sizes), " of which ",
                 state.chunks.size(),
                 " chunks are here. Gather it, or save a sharded checkpoint."));
    }
    const at::Tensor& tensor = state.chunks[0].tensor;
    check(tensor);
    add(tensor);
  }

  void check(const at::Tensor& tensor) const {
    if (!tensor.defined()) refuse("is an undefined tensor. Leave it out, or save None.");
    if (tensor.is_meta()) {
      refuse("is a tensor of the meta device, without values. Materialize it first.");
    }
    if (tensor.is_quantized()) refuse("is a quantized tensor. Save it dequantized.");
    if (tensor.layout() != c10::kStrided || tensor.is_nested() || !tensor.has_storage()) {
      refuse(str("is a tensor of layout ", tensor.layout(), tensor.is_nested() ? " (nested)" : "",
                 ". Save it dense, or in its parts."));
    }
    if (!dtype_of(tensor.scalar_type())) {
      refuse(str("is a tensor of ", tensor.scalar_type(), ", which cannot be saved. Convert it."));
    }
  }

  void add(const at::Tensor& tensor) {
    Use& use = uses_[storage_of(tensor)];
    const uint64_t element = tensor.element_size();
    if (use.dtype == c10::ScalarType::Undefined) {
      use.storage = tensor.storage();
      use.dtype = tensor.scalar_type();
    }
    use.mixed |= use.dtype != tensor.scalar_type();
    use.widest = std::max(use.widest, element);
    if (tensor.numel() == 0) return;
    int64_t last = tensor.storage_offset();
    for (int64_t dim = 0; dim < tensor.dim(); ++dim) {
      last += (tensor.size(dim) - 1) * tensor.stride(dim);
    }
    const uint64_t end = (static_cast<uint64_t>(last) + 1) * element;
    if (end > tensor.storage().nbytes()) {
      refuse(str("is a tensor that ends at byte ", end, " of its storage, which has ",
                 tensor.storage().nbytes(), ". Was its memory freed? Gather it first."));
    }
    use.begin = std::min(use.begin, static_cast<uint64_t>(tensor.storage_offset()) * element);
    use.end = std::max(use.end, end);
  }

  Uses uses_;
};

// Writes the pickle and gives the storages their keys.
class TreeWriter : Walker {
 public:
  explicit TreeWriter(Uses& uses) : uses_(uses) {
    storages_.reserve(uses.size());
    written_.reserve(uses.size());
  }

  std::string write(const State& state) {
    visit(state);
    return out_.finish();
  }
  // In the order of their keys.
  const std::vector<const Use*>& storages() const { return storages_; }

 private:
  void visit(const State& state);
  void text(const std::string& value);
  void key(const State::Key& key);
  void list(const State::List& items);
  void tuple(const State::List& items);
  void set(const State::Set& set);
  void dict(const State::Dict& dict);
  void entries(const State::Dict& dict);
  void entries_of_subclass(const State::Dict& dict);
  void ordered_dict();
  void object(const State::Object& object);
  void build(const State& attributes);
  void tensor(const TensorState& state);
  void plain_tensor(const at::Tensor& tensor, Use& use, bool requires_grad);
  void tensor_function(const Use& use);
  void tensor_arguments(const at::Tensor& tensor, Use& use, bool requires_grad);
  void metadata(const at::Tensor& tensor);
  void storage(Use& use, bool untyped);
  void integers(c10::IntArrayRef values);

  Uses& uses_;
  PickleWriter out_;
  std::vector<const Use*> storages_;
  // A tensor that the tree holds twice is one in Python too.
  std::unordered_map<const c10::TensorImpl*, std::pair<const TensorState*, uint32_t>> written_;
};

void TreeWriter::visit(const State& state) {
  if (state.is_none()) {
    out_.none();
  } else if (state.is<bool>()) {
    out_.boolean(state.as_bool());
  } else if (state.is<int64_t>()) {
    out_.integer(state.as_int());
  } else if (state.is<double>()) {
    out_.number(state.as_double());
  } else if (state.is<std::string>()) {
    text(state.as_string());
  } else if (state.is<TensorState>()) {
    tensor(state.as_tensor_state());
  } else if (state.is_dict()) {
    dict(state.as_dict());
  } else if (state.is<State::List>()) {
    list(state.as_list());
  } else if (state.is<State::Tuple>()) {
    tuple(state.as_list());
  } else if (state.is<State::Set>()) {
    set(state.as_set());
  } else if (state.is<State::BigInt>()) {
    out_.big_integer(state.as_big_int().bytes);
  } else if (state.is<State::Bytes>()) {
    const auto& bytes = state.as_bytes();
    bytes.is_array ? out_.byte_array(bytes.value) : out_.bytes(bytes.value);
  } else if (state.is<std::complex<double>>()) {
    const auto value = state.as_complex();
    out_.global("builtins", "complex");
    out_.begin_tuple(2);
    out_.number(value.real());
    out_.number(value.imag());
    out_.end_tuple();
    out_.call();
  } else {
    object(state.as_object());
  }
}

void TreeWriter::text(const std::string& value) {
  try {
    out_.text(value);
  } catch (const CheckpointError& error) {
    refuse(str("holds text that no pickle takes. ", error.what()));
  }
}

void TreeWriter::key(const State::Key& key) {
  way_.at(key);
  if (const auto* number = std::get_if<int64_t>(&key)) {
    out_.integer(*number);
  } else if (const auto* name = std::get_if<std::string>(&key)) {
    text(*name);
  } else {
    const auto& value = std::get<State::OtherKey>(key).value;
    if (value == nullptr) refuse("is the entry of a key without a value.");
    visit(*value);
  }
}

void TreeWriter::list(const State::List& items) {
  enter();
  out_.empty_list();
  for (size_t i = 0; i < items.size(); ++i) {
    if (items.size() > 1 && i % PickleWriter::kBatch == 0) out_.begin_items();
    way_.at(i);
    visit(items[i]);
    const bool last = i + 1 == items.size();
    if (items.size() == 1) {
      out_.append();
    } else if (last || (i + 1) % PickleWriter::kBatch == 0) {
      out_.end_appends();
    }
  }
  way_.leave();
}

void TreeWriter::tuple(const State::List& items) {
  enter();
  out_.begin_tuple(items.size());
  for (size_t i = 0; i < items.size(); ++i) {
    way_.at(i);
    visit(items[i]);
  }
  out_.end_tuple();
  way_.leave();
}

void TreeWriter::set(const State::Set& set) {
  out_.global("builtins", set.frozen ? "frozenset" : "set");
  out_.begin_tuple(1);
  list(set.items);
  out_.end_tuple();
  out_.call();
}

void TreeWriter::ordered_dict() {
  out_.global("collections", "OrderedDict");
  out_.begin_tuple(0);
  out_.end_tuple();
  out_.call();
}

void TreeWriter::dict(const State::Dict& dict) {
  enter();
  const auto& type = dict.python_class();
  const std::string name = type == nullptr ? "" : type->full_name();
  // Lightning's, under one of several modules, is written as Lightning writes it.
  if (type == nullptr || type->name == "AttributeDict") {
    entries(dict);
  } else if (name == "collections.OrderedDict") {
    ordered_dict();
    entries_of_subclass(dict);
    build(type->attributes);
  } else if (name == "collections.Counter") {
    out_.global("collections", "Counter");
    out_.begin_tuple(1);
    entries(dict);
    out_.end_tuple();
    out_.call();
    build(type->attributes);
  } else {
    way_.leave();
    refuse(str("is a ", name,
               ", which torch.load(weights_only=True) refuses. Save it as a dict: "
               "set_python_class(nullptr)."));
  }
  way_.leave();
}

void TreeWriter::entries(const State::Dict& dict) {
  out_.empty_dict();
  size_t i = 0;
  for (const auto& [name, value] : dict) {
    if (dict.size() > 1 && i % PickleWriter::kBatch == 0) out_.begin_items();
    key(name);
    visit(value);
    ++i;
    if (dict.size() == 1) {
      out_.setitem();
    } else if (i == dict.size() || i % PickleWriter::kBatch == 0) {
      out_.end_setitems();
    }
  }
  // Python sees that no batch is left only after it has begun one.
  if (dict.size() > 1 && dict.size() % PickleWriter::kBatch == 0) {
    out_.begin_items();
    out_.end_setitems();
  }
}

// Here a batch of one has no MARK, wherever it is.
void TreeWriter::entries_of_subclass(const State::Dict& dict) {
  size_t i = 0;
  bool single = false;
  for (const auto& [name, value] : dict) {
    if (i % PickleWriter::kBatch == 0) {
      single = i + 1 == dict.size();
      if (!single) out_.begin_items();
    }
    key(name);
    visit(value);
    ++i;
    if (single) {
      out_.setitem();
    } else if (i == dict.size() || i % PickleWriter::kBatch == 0) {
      out_.end_setitems();
    }
  }
}

void TreeWriter::build(const State& attributes) {
  if (attributes.is_none()) return;
  way_.at("its attributes");
  visit(attributes);
  out_.build();
}

void TreeWriter::object(const State::Object& object) {
  if (!torch_load_takes(object)) {
    refuse(str("is ",
               object.how == How::kGlobal ? "the Python object " : "a Python object made by ",
               object.full_name().substr(0, 200),
               ", which torch.load(weights_only=True) refuses. Save numbers, texts, lists, dicts "
               "and tensors instead."));
  }
  out_.global(object.module, object.name);
  if (object.how == How::kGlobal) return;
  tuple(object.arguments);
  out_.call();
  enter();
  build(object.attributes);
  way_.leave();
}

void TreeWriter::integers(c10::IntArrayRef values) {
  out_.begin_tuple(values.size());
  for (const int64_t value : values) out_.integer(value);
  out_.end_tuple();
}

void TreeWriter::storage(Use& use, bool untyped) {
  const DTypeInfo& type = info(*dtype_of(use.dtype));
  out_.begin_tuple(5);
  out_.text("storage");
  untyped ? out_.global("torch.storage", "UntypedStorage") : out_.global("torch", type.storage);
  if (use.key >= 0) {
    out_.again(use.key_memo);
  } else {
    use.key = static_cast<int64_t>(storages_.size());
    storages_.push_back(&use);
    out_.text(std::to_string(use.key), /*remembered=*/false);
    use.key_memo = out_.last_memo();
  }
  out_.text("cpu");  // any reader has one
  out_.integer(static_cast<int64_t>(use.bytes() / (untyped ? 1 : type.bytes)));
  out_.end_tuple();
  out_.persistent_id();
}

bool is_untyped(const Use& use) { return use.mixed || info(*dtype_of(use.dtype)).storage.empty(); }

void TreeWriter::tensor_function(const Use& use) {
  out_.global("torch._utils", is_untyped(use) ? "_rebuild_tensor_v3" : "_rebuild_tensor_v2");
}

void TreeWriter::metadata(const at::Tensor& tensor) {
  out_.empty_dict();
  const bool both = tensor.is_conj() && tensor.is_neg();
  if (both) out_.begin_items();
  for (const char* bit : {"conj", "neg"}) {
    if (bit[0] == 'c' ? !tensor.is_conj() : !tensor.is_neg()) continue;
    out_.text(bit, /*remembered=*/false);
    out_.boolean(true);
  }
  both ? out_.end_setitems() : out_.setitem();
}

void TreeWriter::tensor_arguments(const at::Tensor& tensor, Use& use, bool requires_grad) {
  const bool untyped = is_untyped(use);
  const bool has_metadata = tensor.is_conj() || tensor.is_neg();
  const auto type = tensor.scalar_type();
  const auto shift = static_cast<int64_t>(use.begin / tensor.element_size());
  out_.begin_tuple(6u + (untyped ? 1 : 0) + (has_metadata ? 1 : 0));
  storage(use, untyped);
  // A tensor without elements may lie outside of what the others use.
  out_.integer(std::max<int64_t>(tensor.storage_offset() - shift, 0));
  integers(tensor.sizes());
  integers(tensor.strides());
  out_.boolean(requires_grad && (c10::isFloatingType(type) || c10::isComplexType(type)));
  ordered_dict();  // of hooks
  if (untyped) out_.global("torch", info(*dtype_of(type)).torch_name);
  if (has_metadata) metadata(tensor);
  out_.end_tuple();
}

void TreeWriter::plain_tensor(const at::Tensor& tensor, Use& use, bool requires_grad) {
  tensor_function(use);
  tensor_arguments(tensor, use, requires_grad);
  out_.call();
}

void TreeWriter::tensor(const TensorState& state) {
  const at::Tensor& whole = state.whole();
  const auto [place, added] = written_.try_emplace(whole.unsafeGetTensorImpl(), &state, 0u);
  const TensorState& first = *place->second.first;
  if (!added && first.is_parameter == state.is_parameter &&
      first.requires_grad == state.requires_grad && first.python_class == state.python_class) {
    return out_.again(place->second.second);
  }
  const auto* type = state.python_class == nullptr ? nullptr : &state.python_class->as_object();
  const std::string expected = state.is_parameter ? "torch.nn.parameter.Parameter" : "torch.Tensor";
  if (type != nullptr && type->full_name() != expected) {
    refuse(str("is a tensor of the class ", type->full_name(),
               ", which torch.load(weights_only=True) refuses. Save it as a plain tensor."));
  }
  Use& use = uses_.at(storage_of(whole));
  if (state.is_parameter) {
    out_.global("torch._utils",
                type == nullptr ? "_rebuild_parameter" : "_rebuild_parameter_with_state");
    out_.begin_tuple(type == nullptr ? 3 : 4);
    plain_tensor(whole, use, /*requires_grad=*/false);
    out_.boolean(state.requires_grad);
    ordered_dict();
  } else if (type != nullptr) {
    out_.global("torch._tensor", "_rebuild_from_type_v2");
    out_.begin_tuple(4);
    tensor_function(use);
    out_.global("torch", "Tensor");
    tensor_arguments(whole, use, state.requires_grad);
  } else {
    plain_tensor(whole, use, state.requires_grad);
  }
  if (type != nullptr) {
    enter();
    way_.at("its attributes");
    visit(type->attributes);
    way_.leave();
  }
  if (type != nullptr || state.is_parameter) {
    out_.end_tuple();
    out_.call();
  }
  if (added) place->second.second = out_.last_memo();
}

// The bytes of a storage: where they are, or copied from a device a piece at a time.
ZipSource source_of(const Use& use, const DistantTensors::Read* distant) {
  ZipSource source;
  source.name = "data/" + std::to_string(use.key);
  source.bytes = use.bytes();
  if (distant != nullptr) {
    source.read = [read = *distant](uint64_t offset, uint64_t bytes, void* buffer) {
      read(offset, bytes, buffer);
      return static_cast<const void*>(buffer);
    };
    return source;
  }
  if (use.storage.device_type() == c10::kCPU) {
    source.read = [storage = use.storage, begin = use.begin](uint64_t offset, uint64_t, void*) {
      return static_cast<const void*>(static_cast<const char*>(storage.data()) + begin + offset);
    };
    return source;
  }
  const auto options = at::TensorOptions(at::kByte).device(use.storage.device());
  const auto all = at::empty({0}, options)
                       .set_(use.storage, static_cast<int64_t>(use.begin),
                             static_cast<int64_t>(use.bytes()), {});
  source.read = [all](uint64_t offset, uint64_t bytes, void* buffer) {
    const auto piece = all.narrow(0, static_cast<int64_t>(offset), static_cast<int64_t>(bytes));
    at::from_blob(buffer, piece.sizes(), at::kByte).copy_(piece);
    return static_cast<const void*>(buffer);
  };
  return source;
}

// 40 digits, as torch writes them; there they are hashes of the records, here of what is known of
// them before they are read.
std::string serialization_id(const std::string& pickle, const std::vector<const Use*>& storages) {
  const uint64_t text = uint64_t{crc32(pickle.data(), pickle.size())} << 32 | pickle.size();
  uint64_t sizes = text;
  for (const Use* use : storages) sizes = (sizes ^ use->bytes()) * 0x9E3779B97F4A7C15u;
  std::ostringstream out;
  out << std::setfill('0') << std::setw(20) << text << std::setw(20) << sizes;
  return out.str();
}

// Kernels that still write what is going to be read.
void wait_for_devices(const std::vector<const Use*>& storages) {
  std::set<std::pair<c10::DeviceType, c10::DeviceIndex>> devices;
  for (const Use* use : storages) {
    const auto device = use->storage.device();
    if (device.type() != c10::kCPU) devices.emplace(device.type(), device.index());
  }
  for (const auto& [type, index] : devices) {
    c10::impl::getDeviceGuardImpl(type)->synchronizeDevice(index);
  }
}

}  // namespace

at::Tensor DistantTensors::add(const std::vector<int64_t>& sizes, at::ScalarType dtype, Read read) {
  const auto bytes = static_cast<size_t>(c10::multiply_integers(sizes)) * c10::elementSize(dtype);
  const c10::Storage storage(c10::Storage::use_byte_size_t(), bytes,
                             c10::DataPtr(nullptr, c10::Device(c10::kCPU)), nullptr, false);
  auto tensor = at::empty({0}, at::TensorOptions().dtype(dtype));
  tensor.unsafeGetTensorImpl()->set_storage_keep_dtype(storage);
  tensor.unsafeGetTensorImpl()->set_sizes_contiguous(sizes);
  reads_.emplace(storage.unsafeGetStorageImpl(), std::move(read));
  return tensor;
}

const DistantTensors::Read* DistantTensors::find(const c10::StorageImpl* storage) const {
  const auto found = reads_.find(storage);
  return found == reads_.end() ? nullptr : &found->second;
}

ZipWriter torch_file_writer(const State& state, const std::string& folder,
                            const DistantTensors* distant) {
  Uses uses = Collector().collect(state);
  TreeWriter tree(uses);
  std::string pickle = tree.write(state);
  wait_for_devices(tree.storages());
  std::string id = serialization_id(pickle, tree.storages());
  std::vector<ZipSource> records;
  records.reserve(tree.storages().size() + 6);
  records.push_back(ZipSource::of_text("data.pkl", std::move(pickle)));
  records.push_back(ZipSource::of_text(".format_version", "1"));
  records.push_back(ZipSource::of_text(".storage_alignment", "64"));
  records.push_back(ZipSource::of_text("byteorder", "little"));
  for (const Use* use : tree.storages()) {
    const auto* const storage = use->storage.unsafeGetStorageImpl();
    records.push_back(source_of(*use, distant != nullptr ? distant->find(storage) : nullptr));
  }
  records.push_back(ZipSource::of_text("version", "3\n"));
  records.push_back(ZipSource::of_text(".data/serialization_id", std::move(id)));
  return ZipWriter(folder, std::move(records));
}

void write_torch_file(const State& state, const std::string& path, const DistantTensors* distant) {
  const ZipWriter writer = torch_file_writer(state, "archive", distant);
  AtomicFile file(path, writer.bytes());
  const int torn = torn_mapped_files();
  writer.write(file);
  // Tensors may lie in another file, which may have been cut short while they were copied.
  if (torn_mapped_files() > torn) check_mapped_files();
  file.commit();
}

}  // namespace lightning
