// The tree in which everything that is saved travels: state dicts of modules, optimizers,
// schedulers, loops and callbacks. It has Python's types, so that the formats of `checkpoint/`
// can write what Python reads. Knows no file and no loop.
#pragma once

#include <ATen/core/Tensor.h>

#include <complex>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <variant>
#include <vector>

namespace lightning {

class State;

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
  bool is_parameter = false;   // Python's torch.nn.Parameter rather than torch.Tensor
  bool requires_grad = false;  // kept beside the tensor, which is always detached
  std::vector<Chunk> chunks;
  // Of a subclass of Tensor, or a tensor on which Python attributes are set: an Object with the
  // name of the class and these attributes. Null for Tensor and Parameter themselves.
  std::shared_ptr<const State> python_class;

  TensorState() = default;
  // Takes a tensor that requires a gradient as detached, and keeps that it did.
  explicit TensorState(at::Tensor whole);

  // The tensor, where one chunk covers it. Errors: CheckpointError otherwise.
  const at::Tensor& whole() const;
};

class State {
 public:
  // What is a key of a Python dict without being an int or a string: a bool, a float, None, a
  // tuple. Two are equal when Python writes them alike.
  struct OtherKey {
    std::string repr;
    std::shared_ptr<const State> value;
    bool operator==(const OtherKey& other) const { return repr == other.repr; }
    bool operator<(const OtherKey& other) const { return repr < other.repr; }
  };
  using Key = std::variant<int64_t, std::string, OtherKey>;
  using List = std::vector<State>;
  struct Tuple {
    List items;
  };
  struct Set {
    List items;
    bool frozen = false;
  };
  // An integer that int64_t cannot hold, as pickle has it: two's complement, lowest byte first.
  struct BigInt {
    std::string bytes;
  };
  struct Bytes {
    std::string value;
    bool is_array = false;  // Python's bytearray
  };
  struct Object;

  // Keeps the order of insertion, as Python's dict does.
  class Dict {
   public:
    State& operator[](const Key& key);
    const State* find(const Key& key) const;
    size_t size() const { return items_.size(); }
    void reserve(size_t items) { items_.reserve(items); }
    void erase(const Key& key);
    auto begin() const { return items_.begin(); }
    auto end() const { return items_.end(); }
    auto begin() { return items_.begin(); }
    auto end() { return items_.end(); }

    // A subclass of Python's dict, with the arguments it is made with and what is set on it after;
    // null for dict itself. Its `entries` and `items` are empty.
    const std::shared_ptr<const Object>& python_class() const { return class_; }
    void set_python_class(std::shared_ptr<const Object> object) { class_ = std::move(object); }

   private:
    // Small dicts are searched; an index is kept beyond this.
    static constexpr size_t kMostSearched = 8;
    size_t place_of(const Key& key) const;  // size() where it is not there
    void index(size_t place);
    void index_all();

    std::vector<std::pair<Key, State>> items_;
    // Open addressing: one more than the place of an item, or 0; its length is a power of two, at
    // least twice that of items_.
    std::vector<uint32_t> index_;
    std::shared_ptr<const Object> class_;
  };

  State() = default;  // None
  State(bool value) : value_(value) {}
  State(int value) : value_(static_cast<int64_t>(value)) {}
  State(int64_t value) : value_(value) {}
  State(double value) : value_(value) {}
  State(std::complex<double> value) : value_(value) {}
  State(const char* value) : value_(std::string(value)) {}
  State(std::string value) : value_(std::move(value)) {}
  State(at::Tensor tensor) : value_(TensorState(std::move(tensor))) {}
  State(TensorState tensor) : value_(std::move(tensor)) {}
  State(List items) : value_(std::move(items)) {}
  State(Tuple items) : value_(std::move(items)) {}
  State(Set items) : value_(std::move(items)) {}
  State(BigInt value) : value_(std::move(value)) {}
  State(Bytes value) : value_(std::move(value)) {}
  State(Dict items);
  State(Object object);
  static State dict(std::vector<std::pair<Key, State>> items = {});
  // Python's collections.OrderedDict, which a module's state dict is.
  static State ordered_dict(std::vector<std::pair<Key, State>> items = {});

  template <class T>
  bool is() const {
    return std::holds_alternative<T>(value_);
  }
  bool is_none() const { return is<std::monostate>(); }
  bool is_dict() const { return is<Dict>(); }
  bool is_object() const { return is<std::shared_ptr<const Object>>(); }
  bool empty() const;  // None, or a dict or list without items

  // Errors of all readers: CheckpointError that names what was wanted and what the node is. The
  // scalars of numpy are numbers too.
  bool as_bool() const;
  int64_t as_int() const;
  double as_double() const;  // an int or a one-element tensor too
  std::complex<double> as_complex() const;
  const std::string& as_string() const;
  const Bytes& as_bytes() const;
  const BigInt& as_big_int() const;
  const at::Tensor& as_tensor() const;
  const TensorState& as_tensor_state() const;
  const List& as_list() const;  // a tuple's items too
  const Set& as_set() const;
  const Object& as_object() const;
  const Dict& as_dict() const;
  Dict& as_dict();

  // The value at a key of a dict: made where it is missing (a None node becomes a dict), or an
  // error where it is missing in a const one.
  State& operator[](const Key& key);
  const State& at(const Key& key) const;
  const State* find(const Key& key) const;  // null when missing or when this is no dict
  bool contains(const Key& key) const { return find(key) != nullptr; }

  std::string type_name() const;  // Python's: "dict", "list", "Tensor", an Object's name, ...
  // As Python's repr() writes it, a tensor as "Tensor float32 [2, 3]"; nested values are cut to
  // "..." beyond `most` characters.
  std::string repr(size_t most = 10'000) const;

 private:
  std::variant<std::monostate, bool, int64_t, double, std::string, TensorState, List, Tuple, Dict,
               Set, BigInt, Bytes, std::complex<double>, std::shared_ptr<const Object>>
      value_;
};

// A value of Python's that has no meaning here: a type, a function, or an object made by one. It is
// read, shown and written back, never run.
//
//   torch.float32            {kGlobal, "torch.float32"}
//   torch.Size([2, 3])       {kCall, "torch.Size", arguments {Tuple{2, 3}}}
struct State::Object {
  enum class How { kGlobal, kCall, kNew };  // GLOBAL; REDUCE; NEWOBJ
  How how = How::kGlobal;
  std::string module;  // "torch"
  std::string name;    // "Size"
  List arguments;
  State attributes;  // None where nothing is set after it was made (BUILD)
  List items;        // of a subclass of list or set
  Dict entries;      // of what behaves as a dict without being known as one

  std::string full_name() const { return module.empty() ? name : module + "." + name; }
};

// A key as a path in the tree shows it: net.0.weight, 0, True.
std::string to_string(const State::Key& key);

}  // namespace lightning
