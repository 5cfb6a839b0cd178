// Reads a pickle into inert nodes: protocols 2 to 5, the opcodes that torch.save and Python's
// pickle.dump write. Nothing is imported and nothing is called; a global is its name, an object the
// name of its maker with the arguments. Needs no LibTorch, does not recurse (nor does the
// destructor), and takes time and memory in proportion to the text, however it is made.
//
// Source: Python's Lib/pickletools.py, which documents the opcodes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string_view>
#include <vector>

namespace lightning {

struct PickleNode;

// Pointers to nodes, in the pickle's memory; valid as long as the Pickle is.
class PickleItems {
 public:
  size_t size() const { return size_; }
  bool empty() const { return size_ == 0; }
  PickleNode* operator[](size_t index) const { return items_[index]; }
  PickleNode* const* begin() const { return items_; }
  PickleNode* const* end() const { return items_ + size_; }

 private:
  friend class PickleMachine;
  PickleNode** items_ = nullptr;
  uint32_t size_ = 0;
  uint32_t capacity_ = 0;  // below size_ where the items are those of another node
};

// Nodes point to one another and may form cycles; walkers bound their depth and their steps. None,
// bools, small ints, globals and () are one node however often they come.
//
// Python's old names come as the new ones: `__builtin__` as builtins, `numpy.core` as
// `numpy._core`. An OrderedDict is a kCall of `collections OrderedDict` with (), its entries in
// additions->entries; so are defaultdict, Counter and subclasses of dict, with their arguments.
struct PickleNode {
  enum class Kind : uint8_t {
    kNone,
    kBool,        // integer: 0 or 1
    kInt,         // integer
    kBigInt,      // text: two's complement, lowest byte first, more than 8 of them
    kFloat,       // number
    kComplex,     // items: the real and the imaginary part, each a kFloat
    kString,      // text: UTF-8, which is checked; lone surrogates pass, as in Python
    kBytes,       // text
    kByteArray,   // text
    kTuple,       // items
    kList,        // items
    kDict,        // items: key, value, key, value, ... ; a later key replaces an earlier one
    kSet,         // items, of which two may be equal
    kFrozenSet,   // the same
    kGlobal,      // text "module", name: collections OrderedDict
    kCall,        // REDUCE: items[0] the callable, items[1] the arguments, a kTuple
    kNew,         // NEWOBJ: the same; items[2], where it is there, the keyword arguments, a kDict
    kPersistent,  // items[0]: the persistent id
  };
  // What was added to a kCall or kNew after it was made.
  struct Additions {
    PickleItems items;            // APPEND: of a subclass of list (ADDITEMS: of set)
    PickleItems entries;          // SETITEM: key, value, ...
    PickleNode* state = nullptr;  // BUILD
  };

  Kind kind = Kind::kNone;
  union {
    int64_t integer = 0;
    double number;
  };
  std::string_view text;  // into the pickle's bytes, or its own store of decoded text
  std::string_view name;
  PickleItems items;
  Additions* additions = nullptr;  // null where nothing was added

  bool is_global(std::string_view module_name, std::string_view global_name) const {
    return kind == Kind::kGlobal && name == global_name && text == module_name;
  }
  // A kCall or kNew of this global.
  bool is_made_by(std::string_view module_name, std::string_view global_name) const {
    return (kind == Kind::kCall || kind == Kind::kNew) &&
           items[0]->is_global(module_name, global_name);
  }
};

class Pickle {
 public:
  // A pickle of more bytes is refused. Memory is about 7 times the bytes for tensors, 10 to 20 for
  // numbers, and below 100 for the worst that can be written.
  static constexpr uint64_t kMostBytes = uint64_t{1} << 30;

  // The bytes must outlive the nodes.
  // Errors: CheckpointError with the offset and what is wrong there, without the file's name.
  explicit Pickle(std::string_view bytes);
  Pickle(Pickle&&) = default;
  Pickle& operator=(Pickle&&) = default;

  const PickleNode& root() const { return *root_; }
  // Bytes up to and with STOP.
  uint64_t bytes_read() const { return bytes_read_; }
  // Bytes that the nodes take.
  uint64_t memory() const { return memory_; }

 private:
  friend class PickleMachine;
  std::vector<std::unique_ptr<char[]>> chunks_;
  const PickleNode* root_ = nullptr;
  uint64_t bytes_read_ = 0;
  uint64_t memory_ = 0;
};

}  // namespace lightning
