// read_torch_file(): the inert nodes of a pickle become a tree.
#include <ATen/core/Tensor.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/Storage.h>
#include <c10/core/TensorImpl.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <memory>
#include <unordered_map>

#include "lightning/checkpoint/scalar_type.h"
#include "lightning/checkpoint/torch_file.h"
#include "lightning/errors.h"

namespace lightning {
namespace {

using Kind = PickleNode::Kind;
using How = State::Object::How;

// Python's own pickle module gives up at about as many.
constexpr size_t kMostNested = 1000;

// A pickle may name one part many times, and a few hundred bytes a tree of 2^100 values. Written
// out once, no value takes less than a byte, so twice the bytes and a million more leave room for
// parts that are shared in earnest, and bound the memory to some 200 times the pickle and 200 MB.
constexpr uint64_t kSpareValues = 1'000'000;
// A text of as many bytes counts as a value.
constexpr uint64_t kBytesOfValue = 64;

// Torch aligns to 64 bytes, which is more than any element needs; other writers may not.
constexpr uintptr_t kAlignment = 16;

// Keeps the mapping for as long as a storage lies in it.
struct Mapping : c10::intrusive_ptr_target {
  explicit Mapping(std::shared_ptr<MappedFile> mapped) : file(std::move(mapped)) {}
  std::shared_ptr<MappedFile> file;
};

class TreeReader {
 public:
  explicit TreeReader(const TorchArchive& archive)
      : archive_(archive),
        left_(2 * archive.zip().at("data.pkl").bytes + kSpareValues),
        mapping_(c10::make_intrusive<Mapping>(archive.zip().file())),
        storages_(archive.zip().records().size()) {
    tensors_.reserve(storages_.size());
  }

  State read() { return value(archive_.root()); }

 private:
  // The way from the root, for messages and to find circles.
  struct Step {
    const PickleNode* node;
    const PickleNode* key = nullptr;  // in a dict
    size_t index = 0;
  };

  [[noreturn]] void refuse(const std::string& what) const;
  std::string place() const;
  bool in_a_circle() const;
  void spend(uint64_t values);
  void enter(const PickleNode& node);
  void leave() { way_.pop_back(); }

  // These call one another a thousand deep: each keeps a frame of its own, and a small one.
  [[gnu::noinline]] State value(const PickleNode& node);
  [[gnu::noinline]] State leaf(const PickleNode& node);
  [[gnu::noinline]] State container(const PickleNode& node);
  [[gnu::noinline]] State::List values(const PickleItems& items, size_t first = 0);
  [[gnu::noinline]] State::Key key(const PickleNode& node);
  [[gnu::noinline]] void add_entries(State::Dict& dict, const PickleItems& entries);
  [[gnu::noinline]] State dict(const PickleNode& node);
  [[gnu::noinline]] State made(const PickleNode& node);
  [[gnu::noinline]] State dict_class(const PickleNode& node);
  [[gnu::noinline]] State storage(const PickleNode& node);
  bool is_dict_class(const PickleNode& node) const;
  State tensor(const PickleNode& node);
  std::shared_ptr<const State> tensor_class(const PickleNode& node);
  at::Tensor tensor_of(const TensorRecord& record);
  const c10::Storage& storage_of(const ZipReader::Record& record);

  const TorchArchive& archive_;
  uint64_t left_;
  std::vector<Step> way_;
  // A tensor that the pickle names twice is one here too.
  std::unordered_map<const PickleNode*, at::Tensor> tensors_;
  c10::intrusive_ptr<Mapping> mapping_;
  std::vector<c10::Storage> storages_;  // by the place of the record
};

std::string TreeReader::place() const {
  std::string text;
  for (const Step& step : way_) {
    std::string name = std::to_string(step.index);
    if (step.key != nullptr) {
      const Kind kind = step.key->kind;
      name = kind == Kind::kString ? step.key->text.substr(0, 100)
             : kind == Kind::kInt  ? std::to_string(step.key->integer)
                                   : "?";
    }
    if (!text.empty()) text += '.';
    text += name;
    if (text.size() > 300) return text + "...";
  }
  return text;
}

void TreeReader::refuse(const std::string& what) const {
  throw CheckpointError(str("Cannot read ", archive_.zip().file()->path(), ": \"", place(), "\" ",
                            what, ". The file is damaged, or was made to harm its readers."));
}

bool TreeReader::in_a_circle() const {
  std::vector<const PickleNode*> nodes;
  for (const Step& step : way_) nodes.push_back(step.node);
  std::sort(nodes.begin(), nodes.end());
  return std::adjacent_find(nodes.begin(), nodes.end()) != nodes.end();
}

void TreeReader::spend(uint64_t values) {
  if (values > left_) {
    if (in_a_circle()) refuse("refers to itself");
    refuse(str("is beyond the ", 2 * archive_.zip().at("data.pkl").bytes + kSpareValues,
               " values that a pickle of ", archive_.zip().at("data.pkl").bytes,
               " bytes may hold: it names the same parts again and again"));
  }
  left_ -= values;
}

void TreeReader::enter(const PickleNode& node) {
  way_.push_back({&node});
  if (way_.size() <= kMostNested) return;
  if (in_a_circle()) refuse("refers to itself");
  refuse(str("is nested more than ", kMostNested, " deep"));
}

bool is_leaf(const PickleNode& node) {
  switch (node.kind) {
    case Kind::kTuple:
    case Kind::kList:
    case Kind::kDict:
    case Kind::kSet:
    case Kind::kFrozenSet:
    case Kind::kCall:
    case Kind::kNew:
    case Kind::kPersistent:
      return false;
    default:
      return true;
  }
}

State TreeReader::value(const PickleNode& node) {
  if (is_leaf(node)) return leaf(node);
  if (node.kind == Kind::kCall && TorchArchive::is_tensor(node)) return tensor(node);
  enter(node);
  State state = container(node);
  leave();
  return state;
}

State TreeReader::leaf(const PickleNode& node) {
  switch (node.kind) {
    case Kind::kBool:
      return node.integer != 0;
    case Kind::kInt:
      return node.integer;
    case Kind::kFloat:
      return node.number;
    case Kind::kComplex:
      return std::complex<double>(node.items[0]->number, node.items[1]->number);
    case Kind::kString:
      spend(node.text.size() / kBytesOfValue);
      return std::string(node.text);
    case Kind::kBigInt:
      spend(node.text.size());  // to show one takes long
      return State::BigInt{std::string(node.text)};
    case Kind::kBytes:
    case Kind::kByteArray:
      spend(node.text.size() / kBytesOfValue);
      return State::Bytes{std::string(node.text), node.kind == Kind::kByteArray};
    case Kind::kGlobal:
      spend((node.text.size() + node.name.size()) / kBytesOfValue + 4);
      return State::Object{
          How::kGlobal, std::string(node.text), std::string(node.name), {}, {}, {}, {}};
    default:
      return {};
  }
}

State TreeReader::container(const PickleNode& node) {
  switch (node.kind) {
    case Kind::kList:
      return values(node.items);
    case Kind::kTuple:
      return State::Tuple{values(node.items)};
    case Kind::kSet:
    case Kind::kFrozenSet:
      return State::Set{values(node.items), node.kind == Kind::kFrozenSet};
    case Kind::kDict:
      return dict(node);
    case Kind::kPersistent:
      return storage(node);
    default:
      return is_dict_class(node) ? dict_class(node) : made(node);
  }
}

State TreeReader::dict(const PickleNode& node) {
  State::Dict dict;
  add_entries(dict, node.items);
  return dict;
}

State::List TreeReader::values(const PickleItems& items, size_t first) {
  State::List list;
  const size_t count = items.size() - first;
  spend(count);
  list.reserve(count);
  for (size_t i = 0; i < count; ++i) {
    way_.back().index = i;
    way_.back().key = nullptr;
    list.push_back(value(*items[first + i]));
  }
  return list;
}

State::Key TreeReader::key(const PickleNode& node) {
  if (node.kind == Kind::kInt) return node.integer;
  if (node.kind == Kind::kString) {
    spend(node.text.size() / kBytesOfValue);
    return std::string(node.text);
  }
  if (TorchArchive::is_tensor(node)) refuse("has a tensor for its key");
  auto state = std::make_shared<const State>(value(node));
  std::string repr = state->repr(std::numeric_limits<size_t>::max());
  spend(4 + repr.size() / kBytesOfValue);
  return State::OtherKey{std::move(repr), std::move(state)};
}

void TreeReader::add_entries(State::Dict& dict, const PickleItems& entries) {
  spend(entries.size());
  dict.reserve(dict.size() + entries.size() / 2);
  for (size_t i = 0; i + 1 < entries.size(); i += 2) {
    way_.back().key = entries[i];
    dict[key(*entries[i])] = value(*entries[i + 1]);
  }
}

// The classes of dict whose arguments and entries are known.
bool TreeReader::is_dict_class(const PickleNode& node) const {
  const PickleNode& type = *node.items[0];
  if (type.kind != Kind::kGlobal || node.items.size() != 2) return false;
  if (node.additions != nullptr && !node.additions->items.empty()) return false;
  const auto& arguments = node.items[1]->items;
  if (type.is_global("collections", "OrderedDict") || type.is_global("collections", "Counter")) {
    return arguments.empty() || (arguments.size() == 1 && arguments[0]->kind == Kind::kDict);
  }
  if (type.is_global("collections", "defaultdict")) return arguments.size() < 2;
  constexpr std::string_view kEnd = "AttributeDict";  // of Lightning, under several modules
  return arguments.empty() && type.name.size() >= kEnd.size() &&
         type.name.substr(type.name.size() - kEnd.size()) == kEnd;
}

State TreeReader::dict_class(const PickleNode& node) {
  spend(4);
  const PickleNode& type = *node.items[0];
  const auto& arguments = node.items[1]->items;
  State::Object object;
  object.how = node.kind == Kind::kNew ? How::kNew : How::kCall;
  object.module = type.text;
  object.name = type.name;
  State::Dict dict;
  if (!arguments.empty() && type.name != "defaultdict") {
    enter(*arguments[0]);
    add_entries(dict, arguments[0]->items);
    leave();
  } else {
    object.arguments = values(arguments);  // the maker of what is missing
  }
  if (node.additions != nullptr) {
    add_entries(dict, node.additions->entries);
    way_.back().key = nullptr;
    if (node.additions->state != nullptr) object.attributes = value(*node.additions->state);
  }
  dict.set_python_class(std::make_shared<const State::Object>(std::move(object)));
  return dict;
}

State TreeReader::made(const PickleNode& node) {
  spend(4);
  State::Object object;
  object.how = node.kind == Kind::kNew ? How::kNew : How::kCall;
  const PickleNode& maker = *node.items[0];
  if (maker.kind == Kind::kGlobal) {
    object.module = maker.text;
    object.name = maker.name;
  } else {  // of what another call gave
    object.name = "?";
    object.arguments.push_back(value(maker));
  }
  auto arguments = values(node.items[1]->items);
  std::move(arguments.begin(), arguments.end(), std::back_inserter(object.arguments));
  if (node.items.size() > 2) object.arguments.push_back(value(*node.items[2]));
  if (node.additions != nullptr) {
    object.items = values(node.additions->items);
    add_entries(object.entries, node.additions->entries);
    way_.back().key = nullptr;
    if (node.additions->state != nullptr) object.attributes = value(*node.additions->state);
  }
  return object;
}

// A storage without a tensor, as quantized tensors have it: shown by what the file says of it.
State TreeReader::storage(const PickleNode& node) {
  spend(4);
  const PickleNode& id = *node.items[0];
  State::Object object;
  object.how = How::kCall;
  object.name = "persistent_id";
  if (id.kind == Kind::kTuple && id.items.size() > 1 && id.items[1]->kind == Kind::kGlobal) {
    object.module = id.items[1]->text;
    object.name = id.items[1]->name;
    object.arguments = values(id.items, 2);
  } else {
    object.arguments.push_back(value(id));
  }
  return object;
}

const c10::Storage& TreeReader::storage_of(const ZipReader::Record& record) {
  auto& storage = storages_[static_cast<size_t>(&record - archive_.zip().records().data())];
  if (storage) return storage;
  uint8_t* const data = mapping_->file->data() + record.offset;
  c10::DataPtr bytes;
  if (reinterpret_cast<uintptr_t>(data) % kAlignment == 0) {
    const auto drop = [](void* kept) {
      c10::intrusive_ptr<Mapping>::reclaim(static_cast<Mapping*>(kept));
    };
    bytes = c10::DataPtr(data, c10::intrusive_ptr<Mapping>(mapping_).release(), drop, c10::kCPU);
  } else {
    bytes = c10::GetCPUAllocator()->allocate(record.bytes);
    if (record.bytes > 0) std::memcpy(bytes.get(), data, record.bytes);
  }
  storage = c10::Storage(c10::Storage::use_byte_size_t(), record.bytes, std::move(bytes));
  return storage;
}

// What at::empty({0}).set_(storage, ...) gives, in a tenth of its time.
at::Tensor TreeReader::tensor_of(const TensorRecord& record) {
  auto tensor = at::detail::make_tensor<c10::TensorImpl>(
      c10::Storage(storage_of(*record.storage)), c10::DispatchKeySet(c10::DispatchKey::CPU),
      c10::scalarTypeToTypeMeta(scalar_type(record.dtype)));
  tensor.unsafeGetTensorImpl()->set_sizes_and_strides(record.sizes, record.strides,
                                                      record.storage_offset);
  if (record.conjugate) tensor._set_conj(true);
  if (record.negative) tensor._set_neg(true);
  return tensor;
}

State TreeReader::tensor(const PickleNode& node) {
  TensorRecord record = archive_.record(node);
  spend(4 + record.sizes.size() / 2);
  at::Tensor& whole = tensors_[&node];
  if (!whole.defined()) whole = tensor_of(record);
  TensorState state;
  state.dtype = scalar_type(record.dtype);
  state.is_parameter = record.is_parameter;
  state.requires_grad = record.requires_grad;
  state.chunks.push_back({std::vector<int64_t>(record.sizes.size(), 0), record.sizes, whole});
  state.sizes = std::move(record.sizes);
  if (!node.items[0]->is_global("torch._utils", "_rebuild_tensor_v2")) {
    enter(node);
    state.python_class = tensor_class(node);
    leave();
  }
  return state;
}

// Null where nothing but the tensor is there.
std::shared_ptr<const State> TreeReader::tensor_class(const PickleNode& node) {
  const PickleNode& maker = *node.items[0];
  const auto& arguments = node.items[1]->items;
  State::Object object;
  object.how = How::kGlobal;
  if (maker.name == "_rebuild_parameter_with_state") {  // data, requires_grad, hooks, state
    object.module = "torch.nn.parameter";
    object.name = "Parameter";
  } else if (maker.name == "_rebuild_from_type_v2") {  // func, type, args, state
    if (arguments[1]->kind != Kind::kGlobal) refuse("is a tensor of a class without a name");
    object.module = arguments[1]->text;
    object.name = arguments[1]->name;
  } else {
    return nullptr;
  }
  object.attributes = value(*arguments[3]);
  const bool plain = object.full_name() == "torch.Tensor" && object.attributes.empty();
  return plain ? nullptr : std::make_shared<const State>(std::move(object));
}

}  // namespace

State read_torch_archive(const TorchArchive& archive) {
  State state = TreeReader(archive).read();
  archive.zip().file()->check();
  return state;
}

State read_torch_file(const std::string& path, bool verify) {
  return read_torch_archive(TorchArchive(MappedFile::open(path), verify));
}

}  // namespace lightning
