#include "lightning/checkpoint/state.h"

#include <c10/util/Half.h>

#include <algorithm>
#include <cstring>
#include <functional>
#include <iterator>
#include <limits>
#include <optional>

#include "lightning/errors.h"

namespace lightning {
namespace {

[[noreturn]] void refuse(const State& state, const char* wanted) {
  throw CheckpointError(str("The state holds a ", state.type_name(), " where ", wanted,
                            " was expected. The file is of another version or program."));
}

size_t hash_of(const State::Key& key) {
  if (const auto* number = std::get_if<int64_t>(&key)) {
    // The high bits: the low ones of keys that are multiples of a power of two are all alike.
    return (static_cast<size_t>(*number) * size_t{0x9E3779B97F4A7C15}) >> 32;
  }
  const auto* text = std::get_if<std::string>(&key);
  return std::hash<std::string>()(text != nullptr ? *text : std::get<State::OtherKey>(key).repr);
}

double to_double(const State::BigInt& value) {
  double sum = 0;
  for (size_t i = value.bytes.size(); i-- > 0;) {
    const auto byte = static_cast<unsigned char>(value.bytes[i]);
    // The highest byte has the sign.
    sum = sum * 256 + (i + 1 == value.bytes.size() ? static_cast<signed char>(byte) : byte);
  }
  return sum;
}

// A scalar of numpy: scalar(dtype('f8'), b'...').
using Number = std::variant<bool, int64_t, uint64_t, double, std::complex<double>>;

template <class T>
T loaded(const std::string& bytes, size_t offset = 0) {
  T value;
  std::memcpy(&value, bytes.data() + offset, sizeof(T));
  return value;
}

std::optional<Number> decoded(const std::string& type, const std::string& bytes) {
  if (type == "b1") return loaded<uint8_t>(bytes) != 0;
  if (type == "i1") return int64_t{loaded<int8_t>(bytes)};
  if (type == "i2") return int64_t{loaded<int16_t>(bytes)};
  if (type == "i4") return int64_t{loaded<int32_t>(bytes)};
  if (type == "i8") return loaded<int64_t>(bytes);
  if (type == "u1") return uint64_t{loaded<uint8_t>(bytes)};
  if (type == "u2") return uint64_t{loaded<uint16_t>(bytes)};
  if (type == "u4") return uint64_t{loaded<uint32_t>(bytes)};
  if (type == "u8") return loaded<uint64_t>(bytes);
  if (type == "f2") {
    const c10::Half half(loaded<uint16_t>(bytes), c10::Half::from_bits());
    return double{static_cast<float>(half)};
  }
  if (type == "f4") return double{loaded<float>(bytes)};
  if (type == "f8") return loaded<double>(bytes);
  if (type == "c8") return std::complex<double>(loaded<float>(bytes), loaded<float>(bytes, 4));
  if (type == "c16") return std::complex<double>(loaded<double>(bytes), loaded<double>(bytes, 8));
  return std::nullopt;
}

std::optional<Number> numpy_number(const State& state) {
  if (!state.is_object()) return std::nullopt;
  const auto& scalar = state.as_object();
  const bool known =
      scalar.how == State::Object::How::kCall && scalar.name == "scalar" &&
      (scalar.module == "numpy._core.multiarray" || scalar.module == "numpy.core.multiarray") &&
      scalar.arguments.size() == 2 && scalar.arguments[0].is_object() &&
      scalar.arguments[1].is<State::Bytes>();
  if (!known) return std::nullopt;
  const auto& dtype = scalar.arguments[0].as_object();
  if (dtype.full_name() != "numpy.dtype" || dtype.arguments.empty() ||
      !dtype.arguments[0].is<std::string>()) {
    return std::nullopt;
  }
  const auto& type = dtype.arguments[0].as_string();
  std::string bytes = scalar.arguments[1].as_bytes().value;
  // "f8": the kind, and the size in bytes.
  if (bytes.empty() || type.empty() || type.substr(1) != std::to_string(bytes.size())) {
    return std::nullopt;
  }
  // What is set on a dtype: (version, byte order, ...).
  const auto& set = dtype.attributes;
  if (set.is<State::Tuple>() && set.as_list().size() > 1 && set.as_list()[1].is<std::string>() &&
      set.as_list()[1].as_string() == ">") {
    const auto part = static_cast<std::ptrdiff_t>(type[0] == 'c' ? bytes.size() / 2 : bytes.size());
    for (auto at = bytes.begin(); at != bytes.end(); at += part) std::reverse(at, at + part);
  }
  return decoded(type, bytes);
}

}  // namespace

TensorState::TensorState(at::Tensor tensor)
    : sizes(tensor.sizes().vec()),
      dtype(tensor.scalar_type()),
      requires_grad(tensor.defined() && tensor.requires_grad()) {
  if (requires_grad) tensor = tensor.detach();
  chunks.push_back({std::vector<int64_t>(sizes.size(), 0), sizes, std::move(tensor)});
}

const at::Tensor& TensorState::whole() const {
  if (chunks.size() != 1 || chunks[0].sizes != sizes) {
    throw CheckpointError(lightning::str("A tensor of shape ", at::IntArrayRef(sizes),
                                         " is here in ", chunks.size(),
                                         " chunks; gather it before it is read whole."));
  }
  return chunks[0].tensor;
}

size_t State::Dict::place_of(const Key& key) const {
  if (items_.size() <= kMostSearched) {
    size_t i = 0;
    while (i < items_.size() && !(items_[i].first == key)) ++i;
    return i;
  }
  const size_t mask = index_.size() - 1;
  for (size_t slot = hash_of(key) & mask; index_[slot] != 0; slot = (slot + 1) & mask) {
    if (items_[index_[slot] - 1].first == key) return index_[slot] - 1;
  }
  return items_.size();
}

void State::Dict::index(size_t place) {
  const size_t mask = index_.size() - 1;
  size_t slot = hash_of(items_[place].first) & mask;
  while (index_[slot] != 0) slot = (slot + 1) & mask;
  index_[slot] = static_cast<uint32_t>(place + 1);
}

void State::Dict::index_all() {
  size_t length = 4 * kMostSearched;
  while (length < 2 * items_.capacity()) length *= 2;
  index_.assign(length, 0);
  for (size_t i = 0; i < items_.size(); ++i) index(i);
}

State& State::Dict::operator[](const Key& key) {
  const size_t place = place_of(key);
  if (place < items_.size()) return items_[place].second;
  items_.emplace_back(key, State());
  if (items_.size() > kMostSearched) {
    index_.size() < 2 * items_.size() ? index_all() : index(items_.size() - 1);
  }
  return items_.back().second;
}

const State* State::Dict::find(const Key& key) const {
  const size_t place = place_of(key);
  return place == items_.size() ? nullptr : &items_[place].second;
}

void State::Dict::erase(const Key& key) {
  const size_t place = place_of(key);
  if (place == items_.size()) return;
  items_.erase(items_.begin() + static_cast<std::ptrdiff_t>(place));
  index_.clear();
  if (items_.size() > kMostSearched) index_all();
}

State::State(Dict items) : value_(std::move(items)) {}

State::State(Object object) : value_(std::make_shared<const Object>(std::move(object))) {}

State State::dict(std::vector<std::pair<Key, State>> items) {
  Dict dict;
  dict.reserve(items.size());
  for (auto& [key, value] : items) dict[key] = std::move(value);
  return dict;
}

State State::ordered_dict(std::vector<std::pair<Key, State>> items) {
  static const auto ordered = [] {
    Object object;
    object.how = Object::How::kCall;
    object.module = "collections";
    object.name = "OrderedDict";
    return std::make_shared<const Object>(std::move(object));
  }();
  State state = dict(std::move(items));
  state.as_dict().set_python_class(ordered);
  return state;
}

bool State::empty() const {
  if (const auto* dict = std::get_if<Dict>(&value_)) return dict->size() == 0;
  if (const auto* list = std::get_if<List>(&value_)) return list->empty();
  return is_none();
}

bool State::as_bool() const {
  if (const auto* value = std::get_if<bool>(&value_)) return *value;
  if (const auto number = numpy_number(*this)) {
    if (const auto* value = std::get_if<bool>(&*number)) return *value;
  }
  refuse(*this, "a bool");
}

int64_t State::as_int() const {
  if (const auto* value = std::get_if<int64_t>(&value_)) return *value;
  if (const auto number = numpy_number(*this)) {
    constexpr auto kMost = static_cast<uint64_t>(std::numeric_limits<int64_t>::max());
    if (const auto* value = std::get_if<int64_t>(&*number)) return *value;
    const auto* value = std::get_if<uint64_t>(&*number);
    if (value != nullptr && *value <= kMost) return static_cast<int64_t>(*value);
  }
  refuse(*this, is<BigInt>() ? "an int of 64 bits" : "an int");
}

double State::as_double() const {
  if (const auto* value = std::get_if<double>(&value_)) return *value;
  if (const auto* value = std::get_if<int64_t>(&value_)) return static_cast<double>(*value);
  if (const auto* value = std::get_if<BigInt>(&value_)) return to_double(*value);
  if (is<TensorState>() && as_tensor().numel() == 1) return as_tensor().item().toDouble();
  if (const auto number = numpy_number(*this)) {
    if (const auto* value = std::get_if<double>(&*number)) return *value;
    if (const auto* value = std::get_if<int64_t>(&*number)) return static_cast<double>(*value);
    if (const auto* value = std::get_if<uint64_t>(&*number)) return static_cast<double>(*value);
  }
  refuse(*this, "a number");
}

std::complex<double> State::as_complex() const {
  if (const auto* value = std::get_if<std::complex<double>>(&value_)) return *value;
  if (const auto number = numpy_number(*this)) {
    if (const auto* value = std::get_if<std::complex<double>>(&*number)) return *value;
  }
  return as_double();
}

const std::string& State::as_string() const {
  if (const auto* value = std::get_if<std::string>(&value_)) return *value;
  refuse(*this, "a string");
}

const State::Bytes& State::as_bytes() const {
  if (const auto* value = std::get_if<Bytes>(&value_)) return *value;
  refuse(*this, "bytes");
}

const State::BigInt& State::as_big_int() const {
  if (const auto* value = std::get_if<BigInt>(&value_)) return *value;
  refuse(*this, "an int beyond 64 bits");
}

const at::Tensor& State::as_tensor() const { return as_tensor_state().whole(); }

const TensorState& State::as_tensor_state() const {
  if (const auto* value = std::get_if<TensorState>(&value_)) return *value;
  refuse(*this, "a tensor");
}

const State::List& State::as_list() const {
  if (const auto* value = std::get_if<List>(&value_)) return *value;
  if (const auto* value = std::get_if<Tuple>(&value_)) return value->items;
  refuse(*this, "a list");
}

const State::Set& State::as_set() const {
  if (const auto* value = std::get_if<Set>(&value_)) return *value;
  refuse(*this, "a set");
}

const State::Object& State::as_object() const {
  if (const auto* value = std::get_if<std::shared_ptr<const Object>>(&value_)) return **value;
  refuse(*this, "an object");
}

const State::Dict& State::as_dict() const {
  if (const auto* value = std::get_if<Dict>(&value_)) return *value;
  refuse(*this, "a dict");
}

State::Dict& State::as_dict() {
  return const_cast<Dict&>(static_cast<const State*>(this)->as_dict());
}

State& State::operator[](const Key& key) {
  if (is_none()) value_ = Dict();
  return as_dict()[key];
}

const State& State::at(const Key& key) const {
  if (const auto* value = as_dict().find(key)) return *value;
  const bool text = std::holds_alternative<std::string>(key);
  throw CheckpointError(
      str("The state has no key ", text ? '"' + to_string(key) + '"' : to_string(key), "."));
}

const State* State::find(const Key& key) const {
  const auto* dict = std::get_if<Dict>(&value_);
  return dict == nullptr ? nullptr : dict->find(key);
}

std::string State::type_name() const {
  if (const auto* dict = std::get_if<Dict>(&value_)) {
    return dict->python_class() == nullptr ? "dict" : dict->python_class()->name;
  }
  if (is_object()) return as_object().full_name();
  if (is<TensorState>()) return as_tensor_state().is_parameter ? "Parameter" : "Tensor";
  if (is<Set>()) return as_set().frozen ? "frozenset" : "set";
  if (is<Bytes>()) return as_bytes().is_array ? "bytearray" : "bytes";
  // In the order of value_.
  static const char* const names[] = {"None",   "bool",  "int",     "float", "str",
                                      "Tensor", "list",  "tuple",   "dict",  "set",
                                      "int",    "bytes", "complex", "object"};
  static_assert(std::size(names) == std::variant_size_v<decltype(value_)>);
  return names[value_.index()];
}

std::string to_string(const State::Key& key) {
  if (const auto* number = std::get_if<int64_t>(&key)) return std::to_string(*number);
  const auto* text = std::get_if<std::string>(&key);
  return text != nullptr ? *text : std::get<State::OtherKey>(key).repr;
}

}  // namespace lightning
