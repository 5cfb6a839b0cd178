// The tree in which everything that is saved travels: state dicts of modules, optimizers,
// schedulers, loops and callbacks. It has Python's types, so that the formats of `checkpoint/`
// can write what Python reads. Knows no file and no loop.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <string>
#include <unordered_map>
#include <utility>
#include <variant>
#include <vector>

namespace lightning {

// A tensor of the tree: a global shape, and the parts of it that this process holds. One chunk that
// covers everything is the ordinary case; a shard holds its rows, or none.
struct TensorState {
  struct Chunk {
    std::vector<int64_t> offsets;  // where the chunk begins, for each dim
    std::vector<int64_t> sizes;
    at::Tensor tensor;
  };
  std::vector<int64_t> sizes;
  at::ScalarType dtype = at::kFloat;
  std::vector<Chunk> chunks;

  TensorState() = default;
  explicit TensorState(at::Tensor whole);

  // The tensor, where one chunk covers it. Errors: CheckpointError otherwise.
  const at::Tensor& whole() const;
};

class State {
 public:
  using Key = std::variant<int64_t, std::string>;
  using List = std::vector<State>;
  struct Tuple {
    List items;
  };
  // Keeps the order of insertion, as Python's dict does.
  class Dict {
   public:
    State& operator[](const Key& key);
    const State* find(const Key& key) const;
    size_t size() const { return items_.size(); }
    void erase(const Key& key);
    auto begin() const { return items_.begin(); }
    auto end() const { return items_.end(); }
    auto begin() { return items_.begin(); }
    auto end() { return items_.end(); }

   private:
    std::vector<std::pair<Key, State>> items_;
    std::unordered_map<Key, size_t> index_;
  };

  State() = default;  // None
  State(bool value) : value_(value) {}
  State(int value) : value_(static_cast<int64_t>(value)) {}
  State(int64_t value) : value_(value) {}
  State(double value) : value_(value) {}
  State(const char* value) : value_(std::string(value)) {}
  State(std::string value) : value_(std::move(value)) {}
  State(at::Tensor tensor) : value_(TensorState(std::move(tensor))) {}
  State(TensorState tensor) : value_(std::move(tensor)) {}
  State(List items) : value_(std::move(items)) {}
  State(Tuple items) : value_(std::move(items)) {}
  State(Dict items);
  static State dict(std::vector<std::pair<Key, State>> items = {});

  template <class T>
  bool is() const {
    return std::holds_alternative<T>(value_);
  }
  bool is_none() const { return is<std::monostate>(); }
  bool is_dict() const { return is<Dict>(); }
  bool empty() const;  // None, or a dict or list without items

  // Errors of all readers: CheckpointError that names what was wanted and what the node is.
  bool as_bool() const;
  int64_t as_int() const;
  double as_double() const;  // an int or a one-element tensor too
  const std::string& as_string() const;
  const at::Tensor& as_tensor() const;
  const TensorState& as_tensor_state() const;
  const List& as_list() const;  // a tuple's items too
  const Dict& as_dict() const;
  Dict& as_dict();

  // The value at a key of a dict: made where it is missing (a None node becomes a dict), or an
  // error where it is missing in a const one.
  State& operator[](const Key& key);
  const State& at(const Key& key) const;
  const State* find(const Key& key) const;  // null when missing or when this is no dict
  bool contains(const Key& key) const { return find(key) != nullptr; }

  std::string type_name() const;  // Python's: "dict", "list", "Tensor", ...

 private:
  std::variant<std::monostate, bool, int64_t, double, std::string, TensorState, List, Tuple, Dict>
      value_;
};

}  // namespace lightning
