// Writes pickles of protocol 2 with the opcodes that torch.load(weights_only=True) takes, in the
// order of a depth-first walk. Strings and globals that come again are written once (memo), so that
// the text stays as short as Python's; with counts given and batches kept (below) it is byte for
// byte that of Python's pickle module. Needs no LibTorch.
//
// Source: torch/_weights_only_unpickler.py, which says what is taken; Python's Modules/_pickle.c.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace lightning {

class PickleWriter {
 public:
  static constexpr size_t kUnknown = static_cast<size_t>(-1);
  // Python adds to a list or dict in batches of this many items, each with its MARK.
  static constexpr size_t kBatch = 1000;

  PickleWriter();

  void none();
  void boolean(bool value);
  void integer(int64_t value);
  // One of more than 255 bytes takes an opcode (LONG4) that weights_only refuses.
  void big_integer(std::string_view twos_complement);
  void number(double value);
  // Errors: CheckpointError for text that is not UTF-8 (surrogates are taken, as Python does), or
  // of 4 GiB and more.
  //
  //   remembered   false: written out again when it comes again, as Python does with strings that
  //                are equal but not the same object
  void text(std::string_view value, bool remembered = true);
  void bytes(std::string_view value);
  void byte_array(std::string_view value);

  // Between these: the items.
  //
  //   items   how many, if known: up to three take shorter opcodes
  void begin_tuple(size_t items = kUnknown);
  void end_tuple();
  // An empty container, to which what is written between begin and end is added; dicts take key and
  // value in turn.
  void empty_list();
  void empty_dict();
  void begin_items();   // MARK
  void end_appends();   // APPENDS
  void end_setitems();  // SETITEMS
  void append();        // APPEND: a single item, without MARK
  void setitem();       // SETITEM: a single key and value, without MARK

  // Errors: CheckpointError for a name with a line break.
  void global(std::string_view module, std::string_view name);
  void call();           // REDUCE: callable and arguments were written
  void make();           // NEWOBJ
  void build();          // BUILD: object and state were written
  void persistent_id();  // BINPERSID: its tuple was written

  // The memo of the text, tuple, container or object that was written last (for containers: when it
  // was begun, for objects: by call() or make()), and the same thing again.
  uint32_t last_memo() const { return memos_ - 1; }
  void again(uint32_t memo);

  std::string finish();  // with STOP

 private:
  void opcode(char code) { out_ += code; }
  void little_endian(uint64_t value, size_t bytes);
  void put();
  // A text, or the "module\nname" of a global, as it lies in out_.
  struct Written {
    size_t begin = 0;
    uint32_t bytes = 0;
    uint32_t memo = 0;
    uint32_t hash = 0;  // 0 where nothing is
  };
  // Writes again what was written before, if it was.
  bool recall(std::string_view text, uint32_t hash);
  void remember(size_t begin, size_t bytes, uint32_t hash);
  void insert(const Written& written);

  std::string out_;
  std::vector<Written> written_;  // open addressing; the length is a power of two
  size_t remembered_ = 0;
  uint32_t memos_ = 0;
  std::vector<size_t> tuples_;  // the items of those that were begun
};

}  // namespace lightning
