#include "lightning/checkpoint/pickle_reader.h"

#include <algorithm>
#include <cstring>
#include <map>
#include <new>
#include <string>
#include <type_traits>
#include <unordered_map>
#include <utility>

#include "lightning/checkpoint/pickle_opcode.h"
#include "lightning/checkpoint/utf8.h"
#include "lightning/errors.h"

namespace lightning {
namespace {

using namespace pickle_opcode;
using Kind = PickleNode::Kind;

static_assert(sizeof(PickleNode) == 72, "every byte here is one for each byte of a hostile pickle");
static_assert(std::is_trivially_destructible_v<PickleNode>, "the memory is freed without a walk");

// A module's or class's name; Python's longest are far from it.
constexpr size_t kMostNameBytes = 512;
// About 157,000 digits: turning one into decimal digits takes the square of its length.
constexpr uint64_t kMostBigIntBytes = uint64_t{1} << 16;

const char* name_of(Kind kind) {
  switch (kind) {
    case Kind::kNone:
      return "None";
    case Kind::kBool:
      return "a bool";
    case Kind::kInt:
    case Kind::kBigInt:
      return "an int";
    case Kind::kFloat:
      return "a float";
    case Kind::kComplex:
      return "a complex";
    case Kind::kString:
      return "a str";
    case Kind::kBytes:
      return "bytes";
    case Kind::kByteArray:
      return "a bytearray";
    case Kind::kTuple:
      return "a tuple";
    case Kind::kList:
      return "a list";
    case Kind::kDict:
      return "a dict";
    case Kind::kSet:
      return "a set";
    case Kind::kFrozenSet:
      return "a frozenset";
    case Kind::kGlobal:
      return "a global";
    case Kind::kCall:
    case Kind::kNew:
      return "an object";
    case Kind::kPersistent:
      return "a persistent id";
  }
  return "a value";
}

struct Renamed {
  std::string_view old_module, old_name, module, name;  // no name: all of the module
};

// What Python 3 itself writes with protocol 2, and what values of Python 2 need.
// Source: Python's Lib/_compat_pickle.py.
const Renamed kRenamed[] = {
    {"__builtin__", "xrange", "builtins", "range"},
    {"__builtin__", "unicode", "builtins", "str"},
    {"__builtin__", "basestring", "builtins", "str"},
    {"__builtin__", "long", "builtins", "int"},
    {"__builtin__", "unichr", "builtins", "chr"},
    {"__builtin__", "reduce", "functools", "reduce"},
    {"__builtin__", "intern", "sys", "intern"},
    {"__builtin__", "", "builtins", ""},
    {"exceptions", "StandardError", "builtins", "Exception"},
    {"exceptions", "", "builtins", ""},
    {"copy_reg", "", "copyreg", ""},
    {"itertools", "izip", "builtins", "zip"},
    {"itertools", "imap", "builtins", "map"},
    {"itertools", "ifilter", "builtins", "filter"},
    {"itertools", "izip_longest", "itertools", "zip_longest"},
    {"itertools", "ifilterfalse", "itertools", "filterfalse"},
    {"UserDict", "IterableUserDict", "collections", "UserDict"},
    {"UserDict", "", "collections", ""},
    {"UserList", "", "collections", ""},
    {"UserString", "", "collections", ""},
    {"cPickle", "", "pickle", ""},
    {"Queue", "", "queue", ""},
    {"thread", "", "_thread", ""},
};

}  // namespace

// Runs one pickle. Nodes lie in chunks of memory that the Pickle keeps; nothing in them has a
// destructor.
class PickleMachine {
 public:
  PickleMachine(Pickle& out, std::string_view bytes)
      : out_(out), begin_(bytes.data()), at_(begin_), end_(begin_ + bytes.size()) {}

  void run() {
    if (left() < 2 || static_cast<uint8_t>(*at_) != kProto) {
      refuse("does not begin with PROTO, as pickles of protocols 2 to 5 do");
    }
    uint8_t opcode;
    do {
      opcode_at_ = at_;
      if (left() == 0) {
        opcode_ = 0;
        refuse(str("ends without STOP after ", end_ - begin_, " bytes"));
      }
      opcode = opcode_ = static_cast<uint8_t>(*at_++);
      step(opcode);
    } while (opcode != kStop);
  }

 private:
  // -- errors ------------------------------------------------------------------------------------

  [[noreturn]] void refuse(const std::string& what) const {
    if (opcode_ == 0) throw CheckpointError("the pickle " + what);
    throw CheckpointError(str("the pickle is broken at byte ", opcode_at_ - begin_, ": ",
                              pickle_opcode::name_of(opcode_), " ", what));
  }

  [[noreturn]] void refuse_opcode() const {
    const char* name = pickle_opcode::name_of(opcode_);
    const auto at = opcode_at_ - begin_;
    if (name == nullptr) {
      throw CheckpointError(str("the pickle is broken at byte ", at, ": ", int{opcode_},
                                " is no opcode of protocols 2 to 5"));
    }
    throw CheckpointError(
        str("the pickle has the opcode ", name, " at byte ", at,
            ", which is refused: expected those of torch.save and of pickle.dump with protocols 2 "
            "to 5 and without buffers of their own"));
  }

  // -- bytes -------------------------------------------------------------------------------------

  uint64_t left() const { return static_cast<uint64_t>(end_ - at_); }

  std::string_view take(uint64_t bytes) {
    if (bytes > left()) refuse(str("needs ", bytes, " bytes, ", left(), " are left"));
    const std::string_view taken(at_, static_cast<size_t>(bytes));
    at_ += bytes;
    return taken;
  }

  template <class Unsigned>
  Unsigned number() {
    const auto bytes = take(sizeof(Unsigned));
    Unsigned value = 0;
    for (size_t i = 0; i < sizeof(Unsigned); ++i) {
      value |=
          static_cast<Unsigned>(static_cast<Unsigned>(static_cast<uint8_t>(bytes[i])) << (8 * i));
    }
    return value;
  }

  std::string_view line() {
    const auto most = static_cast<size_t>(std::min<uint64_t>(left(), kMostNameBytes + 1));
    const auto* newline = static_cast<const char*>(most == 0 ? nullptr : memchr(at_, '\n', most));
    if (newline == nullptr) {
      refuse(str("has a name without an end in the ", most, " bytes that may hold it"));
    }
    const std::string_view name(at_, static_cast<size_t>(newline - at_));
    at_ = newline + 1;
    return name;
  }

  std::string_view utf8(std::string_view text) const {
    const auto bad = first_invalid_utf8(text);
    if (bad != text.size()) refuse(str("has a text that is not UTF-8 at its byte ", bad));
    return text;
  }

  // -- memory ------------------------------------------------------------------------------------

  void* allocate(size_t bytes) {
    constexpr size_t kLargestChunk = size_t{1} << 20;
    bytes = (bytes + 7) / 8 * 8;
    if (bytes <= static_cast<size_t>(room_end_ - room_)) {
      void* place = room_;
      room_ += bytes;
      return place;
    }
    if (bytes > kLargestChunk / 4) return add_chunk(bytes);
    const auto chunk = std::clamp<size_t>(out_.memory_, size_t{1} << 12, kLargestChunk);
    const auto size = std::max(bytes, chunk);
    char* place = add_chunk(size);
    room_ = place + bytes;
    room_end_ = place + size;
    return place;
  }

  char* add_chunk(size_t bytes) {
    out_.chunks_.emplace_back(new char[bytes]);
    out_.memory_ += bytes;
    return out_.chunks_.back().get();
  }

  PickleNode* make(Kind kind) {
    auto* node = new (allocate(sizeof(PickleNode))) PickleNode;
    node->kind = kind;
    return node;
  }

  PickleNode* make_text(Kind kind, std::string_view text) {
    auto* node = make(kind);
    node->text = text;
    return node;
  }

  PickleNode* make_float(double value) {
    auto* node = make(Kind::kFloat);
    node->number = value;
    return node;
  }

  PickleNode* make_int(int64_t value) {
    const bool small = value >= 0 && value < kSmallInts;
    if (small && small_ints_[value] != nullptr) return small_ints_[value];
    auto* node = make(Kind::kInt);
    node->integer = value;
    if (small) small_ints_[value] = node;
    return node;
  }

  // Those without content that can change.
  PickleNode* shared(PickleNode*& place, Kind kind, int64_t integer = 0) {
    if (place == nullptr) {
      place = make(kind);
      place->integer = integer;
    }
    return place;
  }

  // Adds nodes with room to spare for more, twice the size each time.
  void extend(PickleItems& items, PickleNode* const* nodes, size_t count) {
    if (count == 0) return;
    if (items.capacity_ < items.size_) refuse("adds to a set that a call made");
    const uint64_t wanted = uint64_t{items.size_} + count;
    if (wanted > items.capacity_) {
      const auto capacity = std::max<uint64_t>(wanted, uint64_t{items.capacity_} * 2);
      auto** grown = static_cast<PickleNode**>(allocate(capacity * sizeof(PickleNode*)));
      if (items.size_ != 0) memcpy(grown, items.items_, items.size_ * sizeof(PickleNode*));
      items.items_ = grown;
      items.capacity_ = static_cast<uint32_t>(capacity);
    }
    memcpy(items.items_ + items.size_, nodes, count * sizeof(PickleNode*));
    items.size_ = static_cast<uint32_t>(wanted);
  }

  // -- stack -------------------------------------------------------------------------------------

  size_t height() const { return height_ - floor_; }

  void need(size_t values) const {
    if (height() < values) {
      refuse(str("needs ", values, " values", marks_.empty() ? "" : " above the last MARK", ", ",
                 height(), " are there"));
    }
  }

  void push(PickleNode* node) {
    if (height_ == stack_.size()) stack_.resize(std::max<size_t>(64, 2 * height_));
    stack_[height_++] = node;
  }

  PickleNode* top() const {
    need(1);
    return stack_[height_ - 1];
  }

  PickleNode* pop() {
    auto* node = top();
    --height_;
    return node;
  }

  void mark() {
    marks_.push_back(static_cast<uint32_t>(floor_));
    floor_ = height_;
  }

  // Takes off the values above the last mark. They stay in place until the next push.
  PickleNode* const* unmark(size_t& count) {
    if (marks_.empty()) refuse("needs a MARK, none is left");
    count = height();
    height_ = floor_;
    floor_ = marks_.back();
    marks_.pop_back();
    return stack_.data() + height_;
  }

  // -- memo --------------------------------------------------------------------------------------

  // Picklers count from 0; ids out of order, which only others write, go to a map.
  void put(uint64_t id) {
    auto* node = top();
    if (id < memo_.size()) {
      memo_[id] = node;
    } else if (id == memo_.size()) {
      memo_.push_back(node);
      if (!far_memo_.empty()) far_memo_.erase(static_cast<uint32_t>(id));
    } else {
      far_memo_[static_cast<uint32_t>(id)] = node;
    }
  }

  void get(uint32_t id) {
    if (id < memo_.size()) return push(memo_[id]);
    const auto found = far_memo_.find(id);
    if (found == far_memo_.end()) refuse(str("asks for value ", id, " of the memo, which is not"));
    push(found->second);
  }

  // -- values ------------------------------------------------------------------------------------

  void binary_float() {
    const auto bytes = take(8);
    uint64_t bits = 0;
    for (const char byte : bytes) bits = bits << 8 | static_cast<uint8_t>(byte);
    double value;
    static_assert(sizeof(value) == sizeof(bits));
    memcpy(&value, &bits, sizeof(value));
    push(make_float(value));
  }

  void long_int(uint64_t count) {
    if (count > kMostBigIntBytes) {
      refuse(str("claims an int of ", count, " bytes, at most ", kMostBigIntBytes, " are read"));
    }
    auto bytes = take(count);
    const auto at = [&](size_t i) { return static_cast<uint8_t>(bytes[i]); };
    // Bytes that repeat the sign say nothing.
    while (bytes.size() > 1 && (at(bytes.size() - 1) == 0 || at(bytes.size() - 1) == 0xff) &&
           (at(bytes.size() - 1) ^ at(bytes.size() - 2)) < 0x80) {
      bytes.remove_suffix(1);
    }
    if (bytes.size() > 8) return push(make_text(Kind::kBigInt, bytes));
    uint64_t value = !bytes.empty() && at(bytes.size() - 1) >= 0x80 ? ~uint64_t{0} : 0;
    for (size_t i = bytes.size(); i-- > 0;) value = value << 8 | at(i);
    push(make_int(static_cast<int64_t>(value)));
  }

  void tuple(PickleNode* const* nodes, size_t count) {
    if (count == 0) return push(shared(empty_tuple_, Kind::kTuple));
    auto* node = make(Kind::kTuple);
    extend(node->items, nodes, count);
    push(node);
  }

  void short_tuple(size_t count) {
    need(count);
    height_ -= count;
    auto* node = make(Kind::kTuple);
    extend(node->items, stack_.data() + height_, count);
    push(node);
  }

  void collection_of_mark(Kind kind) {
    size_t count;
    auto* const* nodes = unmark(count);
    auto* node = make(kind);
    if (kind == Kind::kDict) check_entries(nodes, count);
    if (kind == Kind::kFrozenSet) check_keys(nodes, count, 1);
    extend(node->items, nodes, count);
    push(node);
  }

  // -- additions ---------------------------------------------------------------------------------

  void check_keys(PickleNode* const* nodes, size_t count, size_t step) const {
    for (size_t i = 0; i < count; i += step) {
      const auto kind = nodes[i]->kind;
      if (kind == Kind::kList || kind == Kind::kDict || kind == Kind::kSet ||
          kind == Kind::kByteArray) {
        refuse(str("has ", name_of(kind), " as a key, which Python cannot hash"));
      }
    }
  }

  void check_entries(PickleNode* const* nodes, size_t count) const {
    if (count % 2 != 0) refuse(str("has ", count, " keys and values, an odd number"));
    check_keys(nodes, count, 2);
  }

  PickleNode::Additions& additions(PickleNode* object) {
    if (object->kind != Kind::kCall && object->kind != Kind::kNew) {
      refuse(str("adds to ", name_of(object->kind), ", which cannot take it"));
    }
    if (object->additions == nullptr) {
      object->additions = new (allocate(sizeof(PickleNode::Additions))) PickleNode::Additions;
    }
    return *object->additions;
  }

  void append(PickleNode* const* nodes, size_t count) {
    auto* target = top();
    extend(target->kind == Kind::kList ? target->items : additions(target).items, nodes, count);
  }

  void set_items(PickleNode* const* nodes, size_t count) {
    check_entries(nodes, count);
    auto* target = top();
    extend(target->kind == Kind::kDict ? target->items : additions(target).entries, nodes, count);
  }

  void add_items(PickleNode* const* nodes, size_t count) {
    check_keys(nodes, count, 1);
    auto* target = top();
    extend(target->kind == Kind::kSet ? target->items : additions(target).items, nodes, count);
  }

  void build() {
    need(2);
    auto* state = pop();
    auto& added = additions(top());
    if (added.state != nullptr) refuse("gives an object a second state");
    added.state = state;
  }

  // -- globals and objects -----------------------------------------------------------------------

  void global(std::string_view module, std::string_view name) {
    if (module.size() > kMostNameBytes || name.size() > kMostNameBytes) {
      refuse(str("has a name of ", std::max(module.size(), name.size()), " bytes, at most ",
                 kMostNameBytes, " are read"));
    }
    auto& node = globals_[{module, name}];
    if (node == nullptr) {
      node = make(Kind::kGlobal);
      node->text = module;
      node->name = name;
      rename(*node);
    }
    push(node);
  }

  void rename(PickleNode& node) {
    for (const auto& old : kRenamed) {
      if (node.text != old.old_module) continue;
      if (!old.old_name.empty() && node.name != old.old_name) continue;
      // Modules of today's programs may have the old names; Python maps those of protocol 2 alone.
      if (protocol_ > 2 && node.text != "__builtin__") continue;
      node.text = old.module;
      if (!old.name.empty()) node.name = old.name;
      return;
    }
    constexpr std::string_view kOld = "numpy.core";
    if (node.text.substr(0, kOld.size()) != kOld) return;
    if (node.text.size() > kOld.size() && node.text[kOld.size()] != '.') return;
    const auto renamed = "numpy._core" + std::string(node.text.substr(kOld.size()));
    node.text = keep(renamed);
  }

  std::string_view keep(std::string_view text) {
    if (text.empty()) return {};
    auto* place = static_cast<char*>(allocate(text.size()));
    memcpy(place, text.data(), text.size());
    return {place, text.size()};
  }

  void stack_global() {
    need(2);
    const auto* name = pop();
    const auto* module = pop();
    if (name->kind != Kind::kString || module->kind != Kind::kString) {
      refuse(str("needs two names, got ", name_of(module->kind), " and ", name_of(name->kind)));
    }
    global(module->text, name->text);
  }

  void object(Kind kind, bool has_keywords) {
    need(has_keywords ? 3 : 2);
    PickleNode* parts[3] = {nullptr, nullptr, has_keywords ? pop() : nullptr};
    parts[1] = pop();
    parts[0] = pop();
    if (parts[1]->kind != Kind::kTuple) {
      refuse(str("needs a tuple of arguments, got ", name_of(parts[1]->kind)));
    }
    if (has_keywords && parts[2]->kind != Kind::kDict) {
      refuse(str("needs a dict of keyword arguments, got ", name_of(parts[2]->kind)));
    }
    const auto maker = parts[0]->kind;
    if (maker != Kind::kGlobal && maker != Kind::kCall && maker != Kind::kNew &&
        maker != Kind::kPersistent) {
      refuse(str("calls ", name_of(maker), ", expected a global"));
    }
    if (kind == Kind::kCall && maker == Kind::kGlobal) {
      if (auto* value = value_of_call(*parts[0], parts[1]->items)) return push(value);
    }
    auto* node = make(kind);
    extend(node->items, parts, has_keywords ? 3 : 2);
    push(node);
  }

  // The values that protocols 2 and 3 have no opcodes for; null for other calls.
  PickleNode* value_of_call(const PickleNode& maker, const PickleItems& arguments) {
    if (maker.text == "_codecs") {
      const bool latin1 = maker.name == "encode" && arguments.size() == 2 &&
                          arguments[0]->kind == Kind::kString && is_latin1(*arguments[1]);
      return latin1 ? bytes_of_text(Kind::kBytes, *arguments[0]) : nullptr;
    }
    if (maker.text != "builtins") return nullptr;
    if (maker.name == "set") return set_of(Kind::kSet, arguments);
    if (maker.name == "frozenset") return set_of(Kind::kFrozenSet, arguments);
    if (maker.name == "complex") return complex_of(arguments);
    if (maker.name == "bytearray") return byte_array_of(arguments);
    if (maker.name == "bytes" && arguments.empty()) return make(Kind::kBytes);
    return nullptr;
  }

  // The items are those of the list, not copied: a pickle of a few bytes can make many sets of one
  // long list.
  PickleNode* set_of(Kind kind, const PickleItems& arguments) {
    if (arguments.empty()) return make(kind);
    const auto& list = *arguments[0];
    if (arguments.size() != 1 || (list.kind != Kind::kList && list.kind != Kind::kTuple)) {
      return nullptr;
    }
    auto* node = make(kind);
    node->items = list.items;
    node->items.capacity_ = 0;
    return node;
  }

  PickleNode* complex_of(const PickleItems& arguments) {
    PickleNode* parts[2];
    if (arguments.size() != 2) return nullptr;
    for (size_t i = 0; i < 2; ++i) {
      parts[i] = arguments[i];
      if (parts[i]->kind == Kind::kInt) {
        parts[i] = make_float(static_cast<double>(parts[i]->integer));
      }
      if (parts[i]->kind != Kind::kFloat) return nullptr;
    }
    auto* node = make(Kind::kComplex);
    extend(node->items, parts, 2);
    return node;
  }

  PickleNode* byte_array_of(const PickleItems& arguments) {
    if (arguments.empty()) return make(Kind::kByteArray);
    const auto& value = *arguments[0];
    if (arguments.size() == 1 && value.kind == Kind::kBytes) {
      return make_text(Kind::kByteArray, value.text);
    }
    const bool latin1 =
        arguments.size() == 2 && value.kind == Kind::kString && is_latin1(*arguments[1]);
    return latin1 ? bytes_of_text(Kind::kByteArray, value) : nullptr;
  }

  static bool is_latin1(const PickleNode& encoding) {
    return encoding.kind == Kind::kString &&
           (encoding.text == "latin1" || encoding.text == "latin-1");
  }

  // Bytes are written as text whose characters are their values. One text is decoded once, however
  // many calls take it.
  PickleNode* bytes_of_text(Kind kind, const PickleNode& text) {
    const auto [decoded, is_new] = decoded_.try_emplace(&text);
    if (is_new) decoded->second = decode_latin1(text.text);
    return make_text(kind, decoded->second);
  }

  std::string_view decode_latin1(std::string_view text) {
    const auto is_wide = [](char byte) { return static_cast<uint8_t>(byte) >= 0x80; };
    const auto wide = static_cast<size_t>(std::count_if(text.begin(), text.end(), is_wide));
    if (wide == 0) return text;
    // The text is UTF-8, so below U+0100 all characters beyond ASCII are C2 or C3 and one more.
    const size_t size = text.size() - wide / 2;
    auto* decoded = static_cast<char*>(allocate(size));
    size_t filled = 0;
    for (size_t i = 0; i < text.size(); ++i) {
      auto value = static_cast<uint8_t>(text[i]);
      if (value >= 0x80) {
        if (value > 0xc3) refuse("encodes a text beyond U+00FF as latin1");
        value = static_cast<uint8_t>(value << 6 | (static_cast<uint8_t>(text[++i]) & 0x3f));
      }
      decoded[filled++] = static_cast<char>(value);
    }
    return {decoded, filled};
  }

  void persistent() {
    auto* id = pop();
    auto* node = make(Kind::kPersistent);
    extend(node->items, &id, 1);
    push(node);
  }

  // -- the opcodes -------------------------------------------------------------------------------

  void proto() {
    protocol_ = number<uint8_t>();
    if (protocol_ < 2 || protocol_ > 5) {
      refuse(str("claims protocol ", int{protocol_}, ", those from 2 to 5 are read"));
    }
  }

  void frame() {
    const auto bytes = number<uint64_t>();
    if (bytes > left()) refuse(str("claims ", bytes, " bytes, ", left(), " are left"));
  }

  void pop_value() {
    if (height() != 0 || marks_.empty()) {
      pop();
    } else {
      size_t ignored;
      unmark(ignored);
    }
  }

  void stop() {
    auto* root = pop();
    if (height_ != 0 || !marks_.empty()) {
      refuse(str("leaves ", height_, " values and ", marks_.size(), " MARKs behind"));
    }
    out_.root_ = root;
    out_.bytes_read_ = static_cast<uint64_t>(at_ - begin_);
  }

  using Adder = void (PickleMachine::*)(PickleNode* const*, size_t);

  void add_one(Adder add, size_t count) {
    need(count + 1);
    PickleNode* nodes[2];
    for (size_t i = count; i-- > 0;) nodes[i] = pop();
    (this->*add)(nodes, count);
  }

  void add_marked(Adder add) {
    size_t count;
    auto* const* nodes = unmark(count);
    (this->*add)(nodes, count);
  }

  void step(uint8_t opcode) {
    switch (opcode) {
      case kProto:
        return proto();
      case kFrame:
        return frame();
      case kStop:
        return stop();
      case kMark:
        return mark();
      case kPop:
        return pop_value();
      case kDup:
        return push(top());
      case kNoneValue:
        return push(shared(none_, Kind::kNone));
      case kNewTrue:
        return push(shared(true_, Kind::kBool, 1));
      case kNewFalse:
        return push(shared(false_, Kind::kBool));
      case kBinPut:
        return put(number<uint8_t>());
      case kLongBinPut:
        return put(number<uint32_t>());
      case kMemoize:
        return put(memo_.size() + far_memo_.size());
      case kBinGet:
        return get(number<uint8_t>());
      case kLongBinGet:
        return get(number<uint32_t>());
      case kPopMark: {
        size_t ignored;
        unmark(ignored);
        return;
      }
      default:
        return step_of_values(opcode);
    }
  }

  void step_of_values(uint8_t opcode) {
    switch (opcode) {
      case kBinInt:
        return push(make_int(static_cast<int32_t>(number<uint32_t>())));
      case kBinInt1:
        return push(make_int(number<uint8_t>()));
      case kBinInt2:
        return push(make_int(number<uint16_t>()));
      case kLong1:
        return long_int(number<uint8_t>());
      case kLong4:
        return long_int(number<uint32_t>());
      case kBinFloat:
        return binary_float();
      case kShortBinString:
      case kShortBinUnicode:
        return push(make_text(Kind::kString, utf8(take(number<uint8_t>()))));
      case kBinString:
      case kBinUnicode:
        return push(make_text(Kind::kString, utf8(take(number<uint32_t>()))));
      case kBinUnicode8:
        return push(make_text(Kind::kString, utf8(take(number<uint64_t>()))));
      case kShortBinBytes:
        return push(make_text(Kind::kBytes, take(number<uint8_t>())));
      case kBinBytes:
        return push(make_text(Kind::kBytes, take(number<uint32_t>())));
      case kBinBytes8:
        return push(make_text(Kind::kBytes, take(number<uint64_t>())));
      case kByteArray8:
        return push(make_text(Kind::kByteArray, take(number<uint64_t>())));
      default:
        return step_of_containers(opcode);
    }
  }

  void step_of_containers(uint8_t opcode) {
    switch (opcode) {
      case kEmptyTuple:
        return tuple(nullptr, 0);
      case kEmptyList:
        return push(make(Kind::kList));
      case kEmptyDict:
        return push(make(Kind::kDict));
      case kEmptySet:
        return push(make(Kind::kSet));
      case kTuple1:
      case kTuple2:
      case kTuple3:
        return short_tuple(size_t{1} + opcode - kTuple1);
      case kTupleOfMark: {
        size_t count;
        auto* const* nodes = unmark(count);
        return tuple(nodes, count);
      }
      case kListOfMark:
        return collection_of_mark(Kind::kList);
      case kDictOfMark:
        return collection_of_mark(Kind::kDict);
      case kFrozenSetOfMark:
        return collection_of_mark(Kind::kFrozenSet);
      case kAppend:
        return add_one(&PickleMachine::append, 1);
      case kAppends:
        return add_marked(&PickleMachine::append);
      case kSetItem:
        return add_one(&PickleMachine::set_items, 2);
      case kSetItems:
        return add_marked(&PickleMachine::set_items);
      case kAddItems:
        return add_marked(&PickleMachine::add_items);
      default:
        return step_of_objects(opcode);
    }
  }

  void step_of_objects(uint8_t opcode) {
    switch (opcode) {
      case kGlobalName: {
        const auto module = utf8(line());
        return global(module, utf8(line()));
      }
      case kStackGlobal:
        return stack_global();
      case kReduce:
        return object(Kind::kCall, false);
      case kNewObj:
        return object(Kind::kNew, false);
      case kNewObjEx:
        return object(Kind::kNew, true);
      case kBuild:
        return build();
      case kBinPersId:
        return persistent();
      default:
        refuse_opcode();
    }
  }

  static constexpr int64_t kSmallInts = 256;

  Pickle& out_;
  const char* const begin_;
  const char* at_;
  const char* const end_;
  const char* opcode_at_ = nullptr;
  uint8_t opcode_ = 0;
  uint8_t protocol_ = 2;
  char* room_ = nullptr;  // of the last chunk
  char* room_end_ = nullptr;

  std::vector<PickleNode*> stack_;  // longer than it is high
  size_t height_ = 0;
  size_t floor_ = 0;             // of the values above the last mark
  std::vector<uint32_t> marks_;  // the floor below each
  std::vector<PickleNode*> memo_;
  std::map<uint32_t, PickleNode*> far_memo_;
  std::map<std::pair<std::string_view, std::string_view>, PickleNode*> globals_;
  std::unordered_map<const PickleNode*, std::string_view> decoded_;

  PickleNode* none_ = nullptr;
  PickleNode* true_ = nullptr;
  PickleNode* false_ = nullptr;
  PickleNode* empty_tuple_ = nullptr;
  PickleNode* small_ints_[kSmallInts] = {};
};

Pickle::Pickle(std::string_view bytes) {
  if (bytes.size() > kMostBytes) {
    throw CheckpointError(
        str("the pickle has ", bytes.size(), " bytes, at most ", kMostBytes, " are read"));
  }
  PickleMachine(*this, bytes).run();
}

}  // namespace lightning
