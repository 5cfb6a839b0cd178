#include "lightning/checkpoint/torch_archive.h"

#include <algorithm>
#include <limits>
#include <optional>
#include <utility>

#include "lightning/errors.h"

namespace lightning {
namespace {

using Kind = PickleNode::Kind;

// As LibTorch bounds it.
constexpr size_t kMostDims = 64;
// The pickle of the number 0x1950a86a20f9469cfc6c, with which torch.save began before 1.6.
constexpr std::string_view kLegacyMagic("\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19.",
                                        15);

// The call that makes a tensor, out of the calls around it.
struct TensorCall {
  const PickleItems* arguments = nullptr;
  int version = 0;                                      // of _rebuild_tensor_v<version>
  const PickleNode* parameter_requires_grad = nullptr;  // null where the tensor says it itself
  bool is_parameter = false;
};

// Whether the attributes of a tensor of a subclass make it a Parameter; torch sets that one first.
bool says_parameter(const PickleNode& state) {
  const PickleNode* attributes = &state;
  if (state.kind == Kind::kTuple && !state.items.empty()) attributes = state.items[0];  // and slots
  if (attributes->kind != Kind::kDict) return false;
  // A file can give one long dict to many tensors.
  const auto most = std::min<size_t>(attributes->items.size(), 64);
  for (size_t i = 0; i + 1 < most; i += 2) {
    const PickleNode& key = *attributes->items[i];
    const PickleNode& value = *attributes->items[i + 1];
    if (key.kind == Kind::kString && key.text == "_is_param") {
      return value.kind == Kind::kBool && value.integer != 0;
    }
  }
  return false;
}

// 0 for what is no such function.
int tensor_version(std::string_view name) {
  if (name == "_rebuild_tensor_v2") return 2;
  if (name == "_rebuild_tensor_v3") return 3;
  return name == "_rebuild_tensor" ? 1 : 0;
}

// Looks through a Parameter and a subclass around the tensor.
std::optional<TensorCall> tensor_call(const PickleNode& node) {
  if (node.kind != Kind::kCall || node.additions != nullptr) return std::nullopt;
  TensorCall call;
  const PickleNode* maker = node.items[0];
  const PickleItems* arguments = &node.items[1]->items;
  for (int layer = 0; layer < 3; ++layer) {
    if (maker->kind != Kind::kGlobal) return std::nullopt;
    if (maker->text == "torch._tensor" && maker->name == "_rebuild_from_type_v2") {
      // func, type, args, state
      if (arguments->size() != 4 || (*arguments)[2]->kind != Kind::kTuple) return std::nullopt;
      call.is_parameter |= says_parameter(*(*arguments)[3]);
      maker = (*arguments)[0];
      arguments = &(*arguments)[2]->items;
      continue;
    }
    if (maker->text != "torch._utils") return std::nullopt;
    call.version = tensor_version(maker->name);
    if (call.version != 0) {
      call.arguments = arguments;
      return call;
    }
    const bool has_state = maker->name == "_rebuild_parameter_with_state";
    if (!has_state && maker->name != "_rebuild_parameter") return std::nullopt;
    // data, requires_grad, hooks[, state]
    if (arguments->size() != (has_state ? 4 : 3)) return std::nullopt;
    const PickleNode& data = *(*arguments)[0];
    if (call.parameter_requires_grad != nullptr || data.kind != Kind::kCall ||
        data.additions != nullptr) {
      return std::nullopt;
    }
    call.is_parameter = true;
    call.parameter_requires_grad = (*arguments)[1];
    maker = data.items[0];
    arguments = &data.items[1]->items;
  }
  return std::nullopt;
}

// Names of the file may hold anything.
std::string shown(std::string_view text) {
  std::string out = "\"";
  for (const char c : text.substr(0, 80)) out += c >= ' ' && c <= '~' ? c : '?';
  return out + (text.size() > 80 ? "...\"" : "\"");
}

std::string shown(const std::vector<int64_t>& values) {
  std::vector<std::string> words;
  for (size_t i = 0; i < values.size() && i <= kMostDims; ++i) words.push_back(str(values[i]));
  return "[" + join(words) + "]";
}

// The number that a key writes, without leading zeros; the largest where it writes none.
size_t number_of_key(std::string_view key) {
  constexpr auto kNone = std::numeric_limits<size_t>::max();
  if (key.empty() || key.size() > 9 || (key[0] == '0' && key.size() > 1)) return kNone;
  size_t number = 0;
  for (const char c : key) {
    if (c < '0' || c > '9') return kNone;
    number = number * 10 + static_cast<size_t>(c - '0');
  }
  return number;
}

// What is wrong with one tensor; record() adds the file.
class TensorReader {
 public:
  explicit TensorReader(const TensorCall& call) : call_(call), arguments_(*call.arguments) {}

  template <class Find>
  TensorRecord read(const Find& find_storage) {
    // storage, offset, size, stride, from version 2 on requires_grad, hooks, in 3 dtype, at last
    // metadata where there is some
    const size_t fewest = call_.version == 1 ? 4 : call_.version == 2 ? 6 : 7;
    if (arguments_.size() != fewest && (call_.version == 1 || arguments_.size() != fewest + 1)) {
      refuse(str("has ", arguments_.size(), " arguments, expected ", fewest));
    }
    read_storage(*arguments_[0], find_storage);
    record_.storage_offset = integer(*arguments_[1], "offset");
    record_.sizes = integers(*arguments_[2], "size");
    record_.strides = integers(*arguments_[3], "stride");
    if (call_.version == 3) read_dtype(*arguments_[6]);
    read_flags();
    check_place();
    return std::move(record_);
  }

 private:
  [[noreturn]] void refuse(const std::string& what) const {
    throw CheckpointError(key_.empty() ? "a tensor " + what
                                       : str("the tensor of storage ", shown(key_), " ", what));
  }

  int64_t integer(const PickleNode& node, const char* what) const {
    if (node.kind != Kind::kInt) refuse(str("has no int of 64 bits as its ", what));
    if (node.integer < 0) refuse(str("has the ", what, " ", node.integer, ", expected 0 or more"));
    return node.integer;
  }

  std::vector<int64_t> integers(const PickleNode& node, const char* what) const {
    const PickleNode* tuple = &node;
    if (node.is_made_by("torch", "Size") && node.items[1]->items.size() == 1) {
      tuple = node.items[1]->items[0];
    }
    if (tuple->kind != Kind::kTuple) refuse(str("has a ", what, " that is no tuple"));
    if (tuple->items.size() > kMostDims) {
      refuse(str("has ", tuple->items.size(), " dims, at most ", kMostDims, " are possible"));
    }
    std::vector<int64_t> values;
    values.reserve(tuple->items.size());
    for (const PickleNode* item : tuple->items) values.push_back(integer(*item, what));
    return values;
  }

  template <class Find>
  void read_storage(const PickleNode& node, const Find& find_storage) {
    if (node.kind != Kind::kPersistent) refuse("has no storage where its first argument is");
    const PickleNode& id = *node.items[0];
    const auto& parts = id.items;
    // "storage", class, key, location, elements
    if (id.kind != Kind::kTuple || parts.size() != 5 || parts[0]->kind != Kind::kString ||
        parts[0]->text != "storage" || parts[1]->kind != Kind::kGlobal ||
        parts[2]->kind != Kind::kString || parts[3]->kind != Kind::kString) {
      refuse(R"(has a storage that is not ("storage", class, key, location, elements))");
    }
    key_ = parts[2]->text;
    const bool untyped = parts[1]->is_global("torch.storage", "UntypedStorage") ||
                         parts[1]->is_global("torch", "UntypedStorage");
    if (untyped != (call_.version == 3)) {
      refuse(untyped ? "has an UntypedStorage and no dtype"
                     : "has a dtype beside that of its storage");
    }
    uint64_t element = 1;
    if (!untyped) {
      const auto dtype =
          parts[1]->text == "torch" ? dtype_of_storage(parts[1]->name) : std::nullopt;
      if (!dtype) refuse(str("has a storage of the unknown class ", shown(parts[1]->name)));
      record_.dtype = *dtype;
      element = info(*dtype).bytes;
    }
    const auto elements = static_cast<uint64_t>(integer(*parts[4], "storage length"));
    record_.storage = find_storage(key_);
    if (record_.storage == nullptr) refuse(str("has no record data/", shown(key_), " in the file"));
    if (elements > record_.storage->bytes / element) {
      refuse(str("claims a storage of ", elements, " elements of ", element,
                 " bytes, but its record has ", record_.storage->bytes, " bytes"));
    }
    record_.storage_bytes = elements * element;
  }

  void read_dtype(const PickleNode& node) {
    const auto dtype = node.kind == Kind::kGlobal && node.text == "torch"
                           ? dtype_of_torch_name(node.name)
                           : std::nullopt;
    if (!dtype) refuse(str("has the unknown dtype ", shown(node.name)));
    record_.dtype = *dtype;
  }

  bool boolean(const PickleNode& node, const char* what) const {
    if (node.kind != Kind::kBool) refuse(str("has a ", what, " that is no bool"));
    return node.integer != 0;
  }

  void read_flags() {
    if (arguments_.size() > 4) record_.requires_grad = boolean(*arguments_[4], "requires_grad");
    record_.is_parameter = call_.is_parameter;
    if (call_.parameter_requires_grad != nullptr) {
      record_.requires_grad = boolean(*call_.parameter_requires_grad, "requires_grad");
    }
    const size_t metadata = call_.version == 3 ? 7 : 6;
    if (arguments_.size() > metadata) read_metadata(*arguments_[metadata]);
    const auto name = info(record_.dtype).torch_name;
    const bool is_complex = name.substr(0, 7) == "complex";
    if (record_.conjugate && !is_complex) refuse(str("is a conjugate of ", name));
    if (record_.requires_grad && !is_complex && name.find("float") == std::string_view::npos) {
      refuse(str("requires gradients and is of ", name));
    }
  }

  void read_metadata(const PickleNode& node) {
    if (node.kind == Kind::kNone) return;
    if (node.kind != Kind::kDict) refuse("has metadata that is no dict");
    for (size_t i = 0; i + 1 < node.items.size(); i += 2) {
      const PickleNode& key = *node.items[i];
      const bool conjugate = key.kind == Kind::kString && key.text == "conj";
      if (!conjugate && (key.kind != Kind::kString || key.text != "neg")) {
        refuse(str("has the unknown metadata ", shown(key.text)));
      }
      (conjugate ? record_.conjugate : record_.negative) = boolean(*node.items[i + 1], "flag");
    }
  }

  void check_place() const {
    const auto& sizes = record_.sizes;
    const auto& strides = record_.strides;
    if (sizes.size() != strides.size()) {
      refuse(str("has ", sizes.size(), " sizes and ", strides.size(), " strides"));
    }
    const auto element = static_cast<int64_t>(info(record_.dtype).bytes);
    int64_t bytes = element;
    int64_t last = record_.storage_offset;
    bool overflow = false;
    for (size_t i = 0; i < sizes.size(); ++i) {
      int64_t way = 0;
      // A size of 0 is seen below; LibTorch multiplies the others too.
      overflow |= __builtin_mul_overflow(bytes, std::max<int64_t>(sizes[i], 1), &bytes);
      overflow |= __builtin_mul_overflow(std::max<int64_t>(sizes[i], 1) - 1, strides[i], &way);
      overflow |= __builtin_add_overflow(last, way, &last);
    }
    int64_t end = 0;
    overflow |= __builtin_add_overflow(last, 1, &end);
    overflow |= __builtin_mul_overflow(end, element, &end);
    if (overflow) refuse(str("overflows 64 bits: ", claims()));
    const bool empty = std::find(sizes.begin(), sizes.end(), 0) != sizes.end();
    if (!empty && static_cast<uint64_t>(end) > record_.storage_bytes) {
      refuse(str("ends at byte ", end, " of its storage, which has ", record_.storage_bytes, ": ",
                 claims()));
    }
  }

  std::string claims() const {
    return str("sizes ", shown(record_.sizes), ", strides ", shown(record_.strides), ", offset ",
               record_.storage_offset, ", ", info(record_.dtype).torch_name);
  }

  const TensorCall& call_;
  const PickleItems& arguments_;
  std::string_view key_;
  TensorRecord record_;
};

[[noreturn]] void refuse_script(const std::string& where) {
  throw CheckpointError(str("Cannot read ", where,
                            ": it is a program of TorchScript (torch.jit.save). Save the "
                            "state_dict() of the module with torch.save instead."));
}

// Files of other formats get an error that names theirs rather than what is odd about the zip.
ZipReader open_zip(const std::shared_ptr<MappedFile>& file, uint64_t begin, uint64_t bytes) {
  if (begin > file->size() || bytes > file->size() - begin) return {file, begin, bytes};  // throws
  const std::string_view text(reinterpret_cast<const char*>(file->data()) + begin, bytes);
  if (text.substr(0, kLegacyMagic.size()) == kLegacyMagic) {
    throw CheckpointError(str("Cannot read ", place_of(*file, begin, bytes),
                              ": it is of the format that torch.save had before torch 1.6. Load "
                              "it in Python and save it again."));
  }
  try {
    return {file, begin, bytes};
  } catch (const CheckpointError&) {
    // TorchScript compresses its code; the directory at the end has the names.
    const auto end = text.substr(bytes - std::min<uint64_t>(bytes, uint64_t{1} << 16));
    if (end.find("/constants.pkl") == std::string_view::npos) throw;
    refuse_script(place_of(*file, begin, bytes));
  }
}

}  // namespace

TorchArchive::TorchArchive(std::shared_ptr<MappedFile> file, bool verify)
    : TorchArchive(file, 0, file->size(), verify) {}

TorchArchive::TorchArchive(std::shared_ptr<MappedFile> file, uint64_t begin, uint64_t bytes,
                           bool verify)
    : zip_(open_zip(file, begin, bytes)), where_(place_of(*file, begin, bytes)) {
  if (zip_.find("constants.pkl") != nullptr) refuse_script(where_);
  const auto* record = zip_.find("data.pkl");
  if (record == nullptr) {
    throw CheckpointError(str("Cannot read ", where_, ": it is a zip of ", zip_.records().size(),
                              " records without data.pkl, so torch.save did not write it."));
  }
  if (verify) zip_.verify_all();
  try {
    pickle_ = std::make_unique<Pickle>(zip_.data(*record));
  } catch (const CheckpointError& error) {
    zip_.file()->check();  // a file cut short while it was read explains it better
    throw CheckpointError(str("Cannot read data.pkl of ", where_, ": ", error.what(),
                              ". The file is damaged or was not written by torch.save; take "
                              "another copy, or an earlier checkpoint."));
  }
  zip_.file()->check();
  index_storages();
}

// Keys are the numbers from 0 on; a table finds them sooner than the names do.
void TorchArchive::index_storages() {
  storages_.resize(zip_.records().size());
  for (const auto& record : zip_.records()) {
    if (record.name.substr(0, 5) != "data/") continue;
    const auto place = number_of_key(record.name.substr(5));
    if (place < storages_.size()) storages_[place] = &record;
  }
}

const ZipReader::Record* TorchArchive::find_storage(std::string_view key) const {
  const auto place = number_of_key(key);
  return place < storages_.size() ? storages_[place] : zip_.find("data/" + std::string(key));
}

bool TorchArchive::is_tensor(const PickleNode& node) { return tensor_call(node).has_value(); }

TensorRecord TorchArchive::record(const PickleNode& node) const {
  const auto call = tensor_call(node);
  try {
    if (!call) throw CheckpointError("what should be a tensor is none");
    return TensorReader(*call).read([this](std::string_view key) { return find_storage(key); });
  } catch (const CheckpointError& error) {
    throw CheckpointError(str("Cannot read ", where_, ": ", error.what(),
                              ". The file is damaged; take another copy, or an earlier "
                              "checkpoint."));
  }
}

}  // namespace lightning
