#include "lightning/checkpoint/state.h"

#include "lightning/errors.h"

namespace lightning {
namespace {

std::string shown(const State::Key& key) {
  const auto* text = std::get_if<std::string>(&key);
  return text != nullptr ? '"' + *text + '"' : std::to_string(std::get<int64_t>(key));
}

[[noreturn]] void refuse(const State& state, const char* wanted) {
  throw CheckpointError(str("The state holds a ", state.type_name(), " where ", wanted,
                            " was expected. The file is of another version or program."));
}

}  // namespace

TensorState::TensorState(at::Tensor tensor)
    : sizes(tensor.sizes().vec()), dtype(tensor.scalar_type()) {
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

State& State::Dict::operator[](const Key& key) {
  const auto [place, added] = index_.emplace(key, items_.size());
  if (added) items_.emplace_back(key, State());
  return items_[place->second].second;
}

const State* State::Dict::find(const Key& key) const {
  const auto place = index_.find(key);
  return place == index_.end() ? nullptr : &items_[place->second].second;
}

void State::Dict::erase(const Key& key) {
  const auto place = index_.find(key);
  if (place == index_.end()) return;
  items_.erase(items_.begin() + static_cast<std::ptrdiff_t>(place->second));
  index_.clear();
  for (size_t i = 0; i < items_.size(); ++i) index_.emplace(items_[i].first, i);
}

State::State(Dict items) : value_(std::move(items)) {}

State State::dict(std::vector<std::pair<Key, State>> items) {
  Dict dict;
  for (auto& [key, value] : items) dict[key] = std::move(value);
  return dict;
}

bool State::empty() const {
  if (const auto* dict = std::get_if<Dict>(&value_)) return dict->size() == 0;
  if (const auto* list = std::get_if<List>(&value_)) return list->empty();
  return is_none();
}

bool State::as_bool() const {
  if (const auto* value = std::get_if<bool>(&value_)) return *value;
  refuse(*this, "a bool");
}

int64_t State::as_int() const {
  if (const auto* value = std::get_if<int64_t>(&value_)) return *value;
  refuse(*this, "an int");
}

double State::as_double() const {
  if (const auto* value = std::get_if<double>(&value_)) return *value;
  if (const auto* value = std::get_if<int64_t>(&value_)) return static_cast<double>(*value);
  if (is<TensorState>() && as_tensor().numel() == 1) return as_tensor().item().toDouble();
  refuse(*this, "a number");
}

const std::string& State::as_string() const {
  if (const auto* value = std::get_if<std::string>(&value_)) return *value;
  refuse(*this, "a string");
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
  throw CheckpointError(str("The state has no key ", shown(key), "."));
}

const State* State::find(const Key& key) const {
  const auto* dict = std::get_if<Dict>(&value_);
  return dict == nullptr ? nullptr : dict->find(key);
}

std::string State::type_name() const {
  static const char* const names[] = {"None",   "bool", "int",   "float", "str",
                                      "Tensor", "list", "tuple", "dict"};
  return names[value_.index()];
}

}  // namespace lightning
