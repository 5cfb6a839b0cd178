#include "lightning/checkpoint/pickle_writer.h"

#include <cstring>
#include <functional>
#include <limits>

#include "lightning/checkpoint/utf8.h"
#include "lightning/errors.h"

namespace lightning {
namespace {

// Longer texts seldom come again, and the memo keeps a copy.
constexpr size_t kLongestRemembered = 256;

// A text may read like the two lines of a global: the lowest bit tells them apart.
enum class Kind : uint32_t { kText = 2, kGlobal = 3 };

uint32_t hash_of(std::string_view text, Kind kind) {
  const auto hash = static_cast<uint32_t>(std::hash<std::string_view>()(text));
  return hash << 2 | static_cast<uint32_t>(kind);
}

void check_utf8(std::string_view text) {
  const size_t bad = first_invalid_utf8(text);
  if (bad == text.size()) return;
  throw CheckpointError(str("A text of ", text.size(), " bytes is not UTF-8 (byte ", bad,
                            "), and Python could not read it. Save it as bytes."));
}

}  // namespace

PickleWriter::PickleWriter() : out_("\x80\x02"), written_(256) {}

void PickleWriter::little_endian(uint64_t value, size_t bytes) {
  for (size_t i = 0; i < bytes; ++i) out_ += static_cast<char>(value >> (8 * i));
}

void PickleWriter::put() {
  if (memos_ == std::numeric_limits<uint32_t>::max()) {
    throw CheckpointError("The state has more than 4 billion values, which no pickle can hold.");
  }
  const bool small = memos_ < 256;
  opcode(small ? 'q' : 'r');  // BINPUT, LONG_BINPUT
  little_endian(memos_++, small ? 1 : 4);
}

void PickleWriter::again(uint32_t memo) {
  const bool small = memo < 256;
  opcode(small ? 'h' : 'j');  // BINGET, LONG_BINGET
  little_endian(memo, small ? 1 : 4);
}

bool PickleWriter::recall(std::string_view text, uint32_t hash) {
  const size_t mask = written_.size() - 1;
  for (size_t i = (hash >> 2) & mask; written_[i].hash != 0; i = (i + 1) & mask) {
    const Written& place = written_[i];
    if (place.hash != hash || std::string_view(out_).substr(place.begin, place.bytes) != text) {
      continue;
    }
    again(place.memo);
    return true;
  }
  return false;
}

void PickleWriter::insert(const Written& written) {
  const size_t mask = written_.size() - 1;
  size_t i = (written.hash >> 2) & mask;
  while (written_[i].hash != 0) i = (i + 1) & mask;
  written_[i] = written;
}

void PickleWriter::remember(size_t begin, size_t bytes, uint32_t hash) {
  if (2 * ++remembered_ > written_.size()) {
    const auto before = std::move(written_);
    written_.assign(4 * before.size(), {});
    for (const Written& written : before) {
      if (written.hash != 0) insert(written);
    }
  }
  insert({begin, static_cast<uint32_t>(bytes), last_memo(), hash});
}

void PickleWriter::none() { opcode('N'); }

void PickleWriter::boolean(bool value) { opcode(value ? '\x88' : '\x89'); }

void PickleWriter::integer(int64_t value) {
  if (value >= 0 && value <= 0xFF) {
    opcode('K');  // BININT1
    little_endian(static_cast<uint64_t>(value), 1);
  } else if (value >= 0 && value <= 0xFFFF) {
    opcode('M');  // BININT2
    little_endian(static_cast<uint64_t>(value), 2);
  } else if (value == static_cast<int32_t>(value)) {
    opcode('J');  // BININT
    little_endian(static_cast<uint64_t>(value), 4);
  } else {
    size_t bytes = 5;
    while (bytes < 8 && value >> (8 * bytes - 1) != (value < 0 ? -1 : 0)) ++bytes;
    opcode('\x8a');  // LONG1
    little_endian(bytes, 1);
    little_endian(static_cast<uint64_t>(value), bytes);
  }
}

void PickleWriter::big_integer(std::string_view twos_complement) {
  if (twos_complement.size() > std::numeric_limits<int32_t>::max()) {
    throw CheckpointError(str("An integer of ", twos_complement.size(),
                              " bytes is beyond the 2 GiB that a pickle can hold."));
  }
  const bool small = twos_complement.size() < 256;
  opcode(small ? '\x8a' : '\x8b');  // LONG1, LONG4
  little_endian(twos_complement.size(), small ? 1 : 4);
  out_ += twos_complement;
}

void PickleWriter::number(double value) {
  uint64_t bits = 0;
  static_assert(sizeof(bits) == sizeof(value));
  std::memcpy(&bits, &value, sizeof(bits));
  opcode('G');  // BINFLOAT, the highest byte first
  for (int shift = 56; shift >= 0; shift -= 8) out_ += static_cast<char>(bits >> shift);
}

void PickleWriter::text(std::string_view value, bool remembered) {
  remembered &= value.size() <= kLongestRemembered;
  const uint32_t hash = remembered ? hash_of(value, Kind::kText) : 0;
  if (remembered && recall(value, hash)) return;
  check_utf8(value);
  if (value.size() > std::numeric_limits<uint32_t>::max()) {
    throw CheckpointError(
        str("A text of ", value.size(), " bytes is beyond the 4 GiB that a pickle can hold."));
  }
  opcode('X');  // BINUNICODE
  little_endian(value.size(), 4);
  const size_t begin = out_.size();
  out_ += value;
  put();
  if (remembered) remember(begin, value.size(), hash);
}

// Protocol 2 has no bytes: they are made of a text. Python writes b"" as bytes(), which
// weights_only refuses.
void PickleWriter::bytes(std::string_view value) {
  std::string latin1;
  latin1.reserve(value.size());
  for (const char c : value) {
    const auto byte = static_cast<unsigned char>(c);
    if (byte < 0x80) {
      latin1 += c;
    } else {
      latin1 += {static_cast<char>(0xC0 | byte >> 6), static_cast<char>(0x80 | (byte & 0x3F))};
    }
  }
  global("_codecs", "encode");
  begin_tuple(2);
  text(latin1);
  text("latin1");
  end_tuple();
  call();
}

void PickleWriter::byte_array(std::string_view value) {
  global("builtins", "bytearray");
  begin_tuple(value.empty() ? 0 : 1);
  if (!value.empty()) bytes(value);
  end_tuple();
  call();
}

void PickleWriter::begin_tuple(size_t items) {
  if (items > 3) opcode('(');  // MARK
  tuples_.push_back(items);
}

void PickleWriter::end_tuple() {
  static const char codes[] = {')', '\x85', '\x86', '\x87'};  // EMPTY_TUPLE, TUPLE1 to TUPLE3
  const size_t items = tuples_.back();
  tuples_.pop_back();
  opcode(items > 3 ? 't' : codes[items]);
  if (items > 0) put();
}

void PickleWriter::empty_list() {
  opcode(']');
  put();
}

void PickleWriter::empty_dict() {
  opcode('}');
  put();
}

void PickleWriter::begin_items() { opcode('('); }
void PickleWriter::end_appends() { opcode('e'); }
void PickleWriter::end_setitems() { opcode('u'); }
void PickleWriter::append() { opcode('a'); }
void PickleWriter::setitem() { opcode('s'); }

void PickleWriter::global(std::string_view module, std::string_view name) {
  // Protocol 2 has Python 2's name for this module; Python 3 and weights_only translate it.
  if (module == "builtins") module = "__builtin__";
  const auto has_line_break = [](std::string_view text) { return text.find('\n') != text.npos; };
  if (has_line_break(module) || has_line_break(name)) {
    throw CheckpointError(str("The name of a Python object holds a line break: \"", module, ".",
                              name, "\". The file that it came from was made to deceive."));
  }
  const std::string lines = std::string(module).append("\n").append(name);
  const uint32_t hash = hash_of(lines, Kind::kGlobal);
  if (recall(lines, hash)) return;
  opcode('c');
  const size_t begin = out_.size();
  out_.append(lines).append("\n");
  put();
  remember(begin, lines.size(), hash);
}

void PickleWriter::call() {
  opcode('R');
  put();
}

void PickleWriter::make() {
  opcode('\x81');
  put();
}

void PickleWriter::build() { opcode('b'); }
void PickleWriter::persistent_id() { opcode('Q'); }

std::string PickleWriter::finish() {
  opcode('.');
  return std::move(out_);
}

}  // namespace lightning
