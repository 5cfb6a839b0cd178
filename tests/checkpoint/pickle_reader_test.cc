#include "lightning/checkpoint/pickle_reader.h"

#include <algorithm>
#include <catch2/catch.hpp>
#include <cstring>
#include <fstream>
#include <iterator>
#include <random>
#include <unordered_set>

#include "lightning/errors.h"
#include "tests/support/python.h"
#include "tests/support/temp_dir.h"

using Catch::Matchers::Contains;
using Catch::Matchers::StartsWith;
using namespace lightning;
using lightning::testing::run_python;
using lightning::testing::TempDir;
using Kind = PickleNode::Kind;

namespace {

// Dumps odd values with each protocol, and beside each what it is in words: of objects the parts of
// __reduce_ex__, which is what pickle writes.
constexpr const char* kOddValues = R"py(
import argparse, array, collections, copyreg, dataclasses, datetime, decimal, enum, fractions, functools
import operator, pathlib, pickle, struct, sys, types, uuid
import numpy, torch

class Color(enum.Enum):
    RED = 1
Point = collections.namedtuple("Point", "x y")
@dataclasses.dataclass
class Config:
    lr: float = 0.1
    layers: list = dataclasses.field(default_factory=lambda: [1, 2])
class AttributeDict(dict):
    pass
class Numbers(list):
    pass
class Names(set):
    pass
class Slots:
    __slots__ = ("a", "b")
    def __init__(self): self.a = 1; self.b = "two"
class Keywords:
    def __new__(cls, *args, **kwargs): return super().__new__(cls)
    def __getnewargs_ex__(self): return ((1, "a"), {"key": [None]})
class Outer:
    class Inner:
        pass

def bits(x): return struct.pack(">d", x).hex()
def words(x, protocol):
    w = lambda y: words(y, protocol)
    t = type(x)
    if x is None or t is bool: return str(x)
    if t is int:
        if -2**63 <= x < 2**63: return f"int:{x}"
        return "big:" + x.to_bytes((x if x >= 0 else ~x).bit_length() // 8 + 1, "little", signed=True).hex()
    if t is float: return "float:" + bits(x)
    if t is complex: return f"complex:{bits(x.real)},{bits(x.imag)}"
    if t is str: return "str:" + x.encode("utf-8", "surrogatepass").hex()
    if t is bytes: return "bytes:" + x.hex()
    if t is bytearray: return "bytearray:" + x.hex()
    if t is pickle.PickleBuffer: return w(bytes(x) if x.raw().readonly else bytearray(x))
    if t is tuple: return "(" + "".join(w(y) + " " for y in x) + ")"
    if t is list: return "[" + "".join(w(y) + " " for y in x) + "]"
    if t is set: return "set{" + "".join(sorted(w(y) + " " for y in x)) + "}"
    if t is frozenset: return "frozenset{" + "".join(sorted(w(y) + " " for y in x)) + "}"
    if t is dict: return "{" + "".join(w(k) + ":" + w(v) + " " for k, v in x.items()) + "}"
    if isinstance(x, (type, enum.EnumMeta, types.FunctionType)) and "." in x.__qualname__ and protocol < 4:
        parent, last = x.__qualname__.rsplit(".", 1)
        return f"call {w(getattr)} {w((getattr(sys.modules[x.__module__], parent), last))}"
    if isinstance(x, (type, types.FunctionType)): return f"global {x.__module__} {x.__qualname__}"
    reduced = copyreg.dispatch_table[t](x) if t in copyreg.dispatch_table else x.__reduce_ex__(protocol)
    if isinstance(reduced, str): return f"global {pickle.whichmodule(x, reduced)} {reduced}"
    func, args, state, items, entries = (tuple(reduced) + (None,) * 3)[:5]
    name = getattr(func, "__name__", "")
    if name == "__newobj__": out = f"new {w(args[0])} {w(tuple(args[1:]))}"
    elif name == "__newobj_ex__" and protocol >= 4:
        out = f"new {w(args[0])} {w(tuple(args[1]))} with {w(args[2])}"
    elif name == "__newobj_ex__":
        out = f"call {w(functools.partial(args[0].__new__, args[0], *args[1], **args[2]))} ()"
    else: out = f"call {w(func)} {w(args)}"
    items, entries = list(items or ()), list(entries or ())
    if items: out += " items[" + "".join(w(y) + " " for y in items) + "]"
    if entries: out += " entries{" + "".join(w(k) + ":" + w(v) + " " for k, v in entries) + "}"
    if state is not None: out += " state " + w(state)
    return out

shared = ["shared"]
attribute = AttributeDict(lr=0.1); attribute.extra = 1
numbers = Numbers([1, 2]); numbers.unit = "m"
inner = Outer.Inner(); inner.a = 1
ordered = collections.OrderedDict([("b", 1), ("a", 2)]); ordered._metadata = {"": {"version": 1}}
default = collections.defaultdict(list); default["x"] = [1]
values = [
    None, True, False, [True, False, None],
    [0, 1, 255, 256, 65535, 65536, -1, -128, -129, 2**31 - 1, 2**31, -2**31, -2**31 - 1],
    [2**40, -2**40, 2**63 - 1, -2**63, 2**63, 2**64, -2**63 - 1, 2**70, -2**70, 3**500, 2**2040, -2**2100],
    [0.0, -0.0, 1.5, 1e-310, float("inf"), float("-inf"), float("nan"), 3.141592653589793],
    [1j, complex(-0.0, float("inf")), complex(1.5, -2.5)],
    ["", "a", "ä", "日本語", "\U0001f642", "\ud800 alone", "nul\0", "x" * 255, "y" * 256, "ß" * 200],
    [b"", b"a", bytes(range(256)), b"z" * 300, bytes(range(128, 256)) * 3],
    [bytearray(), bytearray(b"abc"), bytearray(range(256))],
    [(), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), ((((),),),)],
    [[], [[]], list(range(2500)), [[i] for i in range(1001)]],
    [{}, {1: 2}, {"a": {"b": {}}}, {i: str(i) for i in range(2500)}],
    {None: 1, True: 2, 1.5: 3, (1, "a"): 4, b"k": 5, -1: 6, frozenset([1]): 7, "": 8},
    [set(), {1}, {1, "a", None, (2, 3)}, set(range(1500))],
    [frozenset(), frozenset([1]), frozenset(["a", frozenset()])],
    [shared, shared, {"s": shared}, (shared, shared)],
    collections.OrderedDict(), ordered, default, collections.Counter("abracadabra"),
    collections.deque([1, 2]), collections.deque([1, 2], 5), range(3), range(0, 10, 2), slice(1, None, 2),
    collections.UserDict(a=1), collections.ChainMap({"a": 1}),
    datetime.datetime(2026, 11, 22, 10, 13, 5, 7), datetime.timedelta(days=1, seconds=3), datetime.date(2026, 1, 1),
    datetime.timezone.utc, decimal.Decimal("1.25"), fractions.Fraction(1, 3), uuid.UUID(int=2**100),
    pathlib.PurePosixPath("/a/b"), Color.RED, Point(1, [2]), Config(), argparse.Namespace(a=1, b=[2]),
    types.SimpleNamespace(x=1), attribute, numbers, Names([1]), Slots(), Keywords(), Outer.Inner, inner,
    int, dict, str, len, print, map, zip, ..., NotImplemented, ValueError("no"), OSError("gone"),
    functools.partial(max, 1, key=len), operator.itemgetter(1), collections.OrderedDict,
    array.array("i", [1, 2]), numpy.float64(1.5), numpy.int64(3), numpy.bool_(True), numpy.float32(2.5),
    numpy.arange(6, dtype="int16").reshape(2, 3), numpy.array(["a", "b"]), numpy.dtype("float32"),
    numpy.array([{"a": 1}, None], dtype=object),
    torch.Size([2, 3]), torch.float32, torch.bfloat16, torch.device("cuda:1"), torch.strided, torch.nn.Linear,
    torch.nn.functional.relu, {"lr": 0.1, "betas": (0.9, 0.999), "params": [0, 1], "foreach": None},
]
with open(sys.argv[1], "wb") as out:
    for value in values:
        for protocol in (2, 3, 4, 5):
            for text in (pickle.dumps(value, protocol), words(value, protocol).encode()):
                out.write(struct.pack("<Q", len(text)) + text)
)py";

std::string file_content(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

std::string hex(std::string_view bytes) {
  std::string out;
  for (const char c : bytes) {
    out += "0123456789abcdef"[static_cast<uint8_t>(c) >> 4];
    out += "0123456789abcdef"[c & 15];
  }
  return out;
}

std::string bits(double value) {
  std::string bytes(sizeof(value), '\0');
  memcpy(bytes.data(), &value, sizeof(value));
  std::reverse(bytes.begin(), bytes.end());
  return hex(bytes);
}

std::string words(const PickleNode& node);

std::string words(const PickleItems& items, bool sorted = false) {
  std::vector<std::string> all;
  for (const auto* item : items) all.push_back(words(*item) + " ");
  if (sorted) std::sort(all.begin(), all.end());
  return join(all, "");
}

std::string entries(const PickleItems& items) {
  std::string out;
  for (size_t i = 0; i < items.size(); i += 2) {
    out += words(*items[i]) + ":" + words(*items[i + 1]) + " ";
  }
  return out;
}

std::string words_of_object(const PickleNode& node) {
  auto out = (node.kind == Kind::kCall ? "call " : "new ") + words(*node.items[0]) + " " +
             words(*node.items[1]);
  if (node.items.size() > 2) out += " with " + words(*node.items[2]);
  if (const auto* added = node.additions) {
    if (!added->items.empty()) out += " items[" + words(added->items) + "]";
    if (!added->entries.empty()) out += " entries{" + entries(added->entries) + "}";
    if (added->state != nullptr) out += " state " + words(*added->state);
  }
  return out;
}

// As the script has it.
std::string words(const PickleNode& node) {
  switch (node.kind) {
    case Kind::kNone:
      return "None";
    case Kind::kBool:
      return node.integer == 0 ? "False" : "True";
    case Kind::kInt:
      return str("int:", node.integer);
    case Kind::kBigInt:
      return "big:" + hex(node.text);
    case Kind::kFloat:
      return "float:" + bits(node.number);
    case Kind::kComplex:
      return "complex:" + bits(node.items[0]->number) + "," + bits(node.items[1]->number);
    case Kind::kString:
      return "str:" + hex(node.text);
    case Kind::kBytes:
      return "bytes:" + hex(node.text);
    case Kind::kByteArray:
      return "bytearray:" + hex(node.text);
    case Kind::kTuple:
      return "(" + words(node.items) + ")";
    case Kind::kList:
      return "[" + words(node.items) + "]";
    case Kind::kDict:
      return "{" + entries(node.items) + "}";
    case Kind::kSet:
      return "set{" + words(node.items, true) + "}";
    case Kind::kFrozenSet:
      return "frozenset{" + words(node.items, true) + "}";
    case Kind::kGlobal:
      return str("global ", node.text, " ", node.name);
    case Kind::kCall:
    case Kind::kNew:
      return words_of_object(node);
    case Kind::kPersistent:
      return "persistent " + words(*node.items[0]);
  }
  return "?";
}

std::string bytes_of(uint64_t value, size_t bytes) {
  std::string out;
  for (size_t i = 0; i < bytes; ++i) out += static_cast<char>(value >> (8 * i));
  return out;
}

// A pickle with this between PROTO and STOP; \0 needs ""s.
std::string pickle_of(const std::string& code, int protocol = 4) {
  return std::string("\x80") + static_cast<char>(protocol) + code + ".";
}

std::string times(size_t count, const std::string& text) {
  std::string out;
  out.reserve(count * text.size());
  for (size_t i = 0; i < count; ++i) out += text;
  return out;
}

std::string error_of(const std::string& bytes) {
  try {
    const Pickle pickle(bytes);
  } catch (const CheckpointError& error) {
    return error.what();
  }
  return "no error";
}

std::string value_of(const std::string& code) {
  const auto bytes = pickle_of(code);
  const Pickle pickle(bytes);
  return words(pickle.root());
}

// Odd values of Python's, each with its words; made once for all tests.
const std::vector<std::pair<std::string, std::string>>& odd_values() {
  static const auto values = [] {
    const TempDir dir;
    run_python(kOddValues, {dir.path("values")});
    const auto file = file_content(dir.path("values"));
    std::vector<std::pair<std::string, std::string>> out;
    size_t at = 0;
    const auto next = [&] {
      uint64_t bytes = 0;
      memcpy(&bytes, file.data() + at, sizeof(bytes));
      at += sizeof(bytes) + bytes;
      return file.substr(at - bytes, bytes);
    };
    while (at < file.size()) {
      auto pickle = next();
      out.emplace_back(std::move(pickle), next());
    }
    return out;
  }();
  return values;
}

using namespace std::string_literals;

}  // namespace

TEST_CASE("values that Python dumps with protocols 2 to 5 are read as Python has them",
          "[checkpoint]") {
  const auto& values = odd_values();
  REQUIRE(values.size() >= 4 * 80);
  for (const auto& [bytes, expected] : values) {
    INFO("protocol " << int{bytes[1]} << ", pickle " << hex(bytes.substr(0, 400)));
    const Pickle pickle(bytes);
    CHECK(words(pickle.root()) == expected);
    CHECK(pickle.bytes_read() == bytes.size());
  }
}

TEST_CASE("a pickle that is cut short at any byte is refused", "[checkpoint]") {
  for (const auto& [bytes, expected] : odd_values()) {
    const size_t most = std::min<size_t>(bytes.size(), 600);
    for (size_t size = 0; size < most; ++size) {
      // A copy of exactly these bytes, so that ASan sees a read behind them.
      const std::vector<char> cut(bytes.begin(), bytes.begin() + static_cast<long>(size));
      INFO(size << " bytes of " << hex(bytes.substr(0, 100)) << ", " << expected.substr(0, 100));
      CHECK_THROWS_AS(Pickle(std::string_view(cut.data(), cut.size())), CheckpointError);
    }
  }
}

TEST_CASE("opcodes that Python reads and seldom writes give the same values", "[checkpoint]") {
  CHECK(value_of("(K\1K\2l") == "[int:1 int:2 ]");
  CHECK(value_of("(K\1K\2d") == "{int:1:int:2 }");
  CHECK(value_of("(K\1K\1\x91") == "frozenset{int:1 int:1 }");
  CHECK(value_of("N2\x86") == "(None None )");
  CHECK(value_of("K\1(K\2K\3"
                 "1") == "int:1");
  CHECK(value_of("K\1K\2"
                 "0") == "int:1");
  CHECK(value_of("K\1(0") == "int:1");
  CHECK(value_of("U\3abc") == "str:616263");
  CHECK(value_of("T\3\0\0\0abc"s) == "str:616263");
  CHECK(value_of("\x8d\3\0\0\0\0\0\0\0abc"s) == "str:616263");
  CHECK(value_of("\x8e\2\0\0\0\0\0\0\0\xff\0"s) == "bytes:ff00");
  CHECK(value_of("\x96\2\0\0\0\0\0\0\0\xff\0"s) == "bytearray:ff00");
  CHECK(value_of("\x8a\0"s) == "int:0");
  CHECK(value_of("\x8b\4\0\0\0\1\0\0\0"s) == "int:1");
  CHECK(value_of("\x8a\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff"s) == "int:-1");
  CHECK(value_of("\x8a\x09\xff\xff\xff\xff\xff\xff\xff\xff\0"s) == "big:ffffffffffffffff00");
  CHECK(value_of("K\7r\xff\xff\xff\xff"
                 "0j\xff\xff\xff\xff"s) == "int:7");
  CHECK(value_of("K\7q\5\x94K\x8\x94"
                 "00h\1h\2\x86"s) == "(int:7 int:8 )");
  CHECK(value_of("c__builtin__\nset\n](K\1K\2e\x85R") == "set{int:1 int:2 }");
  CHECK(value_of("c__builtin__\nbytearray\nC\2ab\x85R") == "bytearray:6162");
  CHECK(value_of("cnumpy.core.multiarray\nscalar\n") == "global numpy._core.multiarray scalar");
  CHECK(value_of("cnumpy.cores\nscalar\n") == "global numpy.cores scalar");
  CHECK(value_of("K\1Q") == "persistent int:1");
  CHECK(value_of("cm\nC\n)}\x92") == "new global m C () with {}");
  CHECK(value_of("cposix\nsystem\nU\2ls\x85R") == "call global posix system (str:6c73 )");
}

TEST_CASE("names of Python 2 are today's only in pickles of its protocol", "[checkpoint]") {
  const auto value = [](int protocol) {
    const auto bytes = pickle_of("cthread\nstart\nc__builtin__\nxrange\n\x86", protocol);
    return words(Pickle(bytes).root());
  };
  CHECK(value(2) == "(global _thread start global builtins range )");
  CHECK(value(4) == "(global thread start global builtins range )");
}

TEST_CASE("each broken pickle has its own error", "[checkpoint]") {
  const std::vector<std::pair<std::string, std::string>> cases = {
      {"", "does not begin with PROTO"},
      {"\x80", "does not begin with PROTO"},
      {"I1\n.", "does not begin with PROTO"},
      {"\x80\1N.", "claims protocol 1, those from 2 to 5 are read"},
      {"\x80\6N.", "claims protocol 6"},
      {"\x80\2", "ends without STOP after 2 bytes"},
      {"\x80\2N", "ends without STOP"},
      {pickle_of(""), "byte 2: STOP needs 1 values, 0 are there"},
      {pickle_of("NN"), "STOP leaves 1 values and 0 MARKs behind"},
      {pickle_of("N("), "STOP needs 1 values above the last MARK, 0 are there"},
      {pickle_of("(N"), "STOP leaves 0 values and 1 MARKs behind"},
      {pickle_of("\xff"), "byte 2: 255 is no opcode"},
      {pickle_of("i"), "the opcode INST at byte 2, which is refused"},
      {pickle_of("(o"), "the opcode OBJ at byte 3"},
      {pickle_of("P1\n"), "the opcode PERSID"},
      {pickle_of("I1\n"), "the opcode INT "},
      {pickle_of("\x82\1"), "the opcode EXT1"},
      {pickle_of("\x97"), "the opcode NEXT_BUFFER"},
      {pickle_of("X\xff\xff\xff\xff"s), "BINUNICODE needs 4294967295 bytes, 1 are left"},
      {pickle_of("\x8d" + times(8, "\xff")), "BINUNICODE8 needs 18446744073709551615 bytes"},
      {pickle_of("\x8e" + times(8, "\xff")), "BINBYTES8 needs 18446744073709551615 bytes"},
      {pickle_of("\x96\0\0\0\0\1\0\0\0"s), "BYTEARRAY8 needs 4294967296 bytes"},
      {pickle_of("\x95\xff\0\0\0\0\0\0\0N"s), "FRAME claims 255 bytes, 2 are left"},
      {pickle_of("\x8b\xff\xff\xff\xff"), "LONG4 claims an int of 4294967295 bytes"},
      {pickle_of("\x8a\x10"), "LONG1 needs 16 bytes, 1 are left"},
      {pickle_of("U\2\xc3("), "has a text that is not UTF-8 at its byte 0"},
      {pickle_of("U\3a\xc0\x80"), "has a text that is not UTF-8 at its byte 1"},
      {pickle_of("U\4\xf4\x90\x80\x80"), "has a text that is not UTF-8"},
      {pickle_of("U\2a\xe2"), "has a text that is not UTF-8 at its byte 1"},
      {pickle_of("h\5"), "BINGET asks for value 5 of the memo, which is not"},
      {pickle_of("Nq\1h\2"), "asks for value 2 of the memo"},
      {pickle_of("j\xff\xff\xff\xff"), "LONG_BINGET asks for value 4294967295"},
      {pickle_of("q\0"s), "BINPUT needs 1 values, 0 are there"},
      {pickle_of("t"), "TUPLE needs a MARK, none is left"},
      {pickle_of("N1"), "POP_MARK needs a MARK"},
      {pickle_of("0"), "POP needs 1 values"},
      {pickle_of("2"), "DUP needs 1 values"},
      {pickle_of("N(\x86"), "TUPLE2 needs 2 values above the last MARK, 0 are there"},
      {pickle_of("](Ns"), "SETITEM needs 3 values above the last MARK, 1 are there"},
      {pickle_of("}(Nu"), "SETITEMS has 1 keys and values, an odd number"},
      {pickle_of("}]Ns"), "SETITEM has a list as a key, which Python cannot hash"},
      {pickle_of("\x8f(]\x90"), "ADDITEMS has a list as a key"},
      {pickle_of("(}\x91"), "FROZENSET has a dict as a key"},
      {pickle_of("Na"), "APPEND needs 2 values"},
      {pickle_of("NNa"), "APPEND adds to None, which cannot take it"},
      {pickle_of(")Na"), "APPEND adds to a tuple"},
      {pickle_of("](NNu"), "SETITEMS adds to a list"},
      {pickle_of("]Nb"), "BUILD adds to a list"},
      {pickle_of("cm\nC\nNb"), "BUILD adds to a global"},
      {pickle_of("cm\nC\n)RNbNb"), "BUILD gives an object a second state"},
      {pickle_of("N)R"), "REDUCE calls None, expected a global"},
      {pickle_of("cm\nC\nNR"), "REDUCE needs a tuple of arguments, got None"},
      {pickle_of("cm\nC\n)N\x92"), "NEWOBJ_EX needs a dict of keyword arguments, got None"},
      {pickle_of("NN\x93"), "STACK_GLOBAL needs two names, got None and None"},
      {pickle_of("cabc"), "GLOBAL has a name without an end"},
      {pickle_of("c" + std::string(513, 'm') + "\nC\n"), "a name without an end in the 513 bytes"},
      {pickle_of("X\1\2\0\0"s + std::string(513, 'm') + "U\1C\x93"),
       "STACK_GLOBAL has a name of 513 bytes, at most 512"},
      {pickle_of("c_codecs\nencode\nX\3\0\0\0\xe2\x82\xacU\6latin1\x86R"s), "beyond U+00FF"},
      {pickle_of("c__builtin__\nset\n]\x94(NNe\x85R(N\x90"), "adds to a set that a call made"},
  };
  for (const auto& [bytes, expected] : cases) {
    INFO(hex(bytes.substr(0, 100)));
    CHECK_THAT(error_of(bytes), StartsWith("the pickle ") && Contains(expected));
  }
}

TEST_CASE("values that contain themselves are read as they are", "[checkpoint]") {
  const auto list = pickle_of("]\x94h\0a"s);
  const Pickle in_itself(list);
  REQUIRE(in_itself.root().items.size() == 1);
  CHECK(in_itself.root().items[0] == &in_itself.root());

  const auto around = pickle_of(
      "]\x94h\0\x85\x94"
      "0h\1a0h\1"s);
  const Pickle through_tuple(around);
  const auto& tuple = through_tuple.root();
  REQUIRE(tuple.kind == Kind::kTuple);
  CHECK(tuple.items[0]->items[0] == &tuple);

  const auto object = pickle_of("cm\nC\n)\x81\x94h\0b"s);
  const Pickle own_state(object);
  CHECK(own_state.root().additions->state == &own_state.root());
}

TEST_CASE("a million values inside one another take neither stack nor time", "[checkpoint]") {
  constexpr size_t kDepth = 1'000'000;
  for (const auto& bytes :
       {pickle_of(")" + times(kDepth, "\x85")), pickle_of(times(kDepth, "(") + times(kDepth, "t")),
        pickle_of(times(kDepth, "]") + "N" + times(kDepth, "a")),
        pickle_of("cm\nC\n" + times(kDepth / 2, ")R"))}) {
    const Pickle pickle(bytes);
    size_t depth = 0;
    for (const auto* node = &pickle.root(); !node->items.empty(); node = node->items[0]) ++depth;
    CHECK(depth >= kDepth / 2);
    CHECK(pickle.memory() < 100 * bytes.size());
  }
}

TEST_CASE("a short pickle takes little memory, however much it shares or copies", "[checkpoint]") {
  const auto list_of_10000 = "]\x94(" + times(10'000, "N") + "e";
  const auto text_of_10000 = "X\x20\x4e\0\0"s + times(10'000, "\xc3\xa9") + "\x94";
  const std::vector<std::pair<std::string, std::string>> cases = {
      {"3^50,000 values, were it a tree", "]" + times(50'000, "22\x87")},
      {"many sets of one list",
       "c__builtin__\nset\n\x94"
       "0" +
           list_of_10000 + times(10'000, "h\0h\1\x85R0"s)},
      {"many bytes of one text",
       "c_codecs\nencode\n\x94"
       "0U\6latin1\x94"
       "0" +
           text_of_10000 + times(10'000, "h\0h\2h\1\x86R0"s)},
      {"many bytearrays of one bytes",
       "c__builtin__\nbytearray\n\x94"
       "0B\x10\x27\0\0"s +
           std::string(10'000, 'b') + "\x94" + times(10'000, "h\0h\1\x85R0"s)},
      {"many globals of one long name", "X\0\2\0\0"s + std::string(512, 'm') + "\x94" +
                                            times(10'000,
                                                  "h\0U\1n\x93"
                                                  "0"s)},
      {"a list that grows one by one", "]" + times(100'000, "Na")},
      {"a dict that grows one by one", "}" + times(100'000, "K\1Ns")},
      {"empty dicts", "(" + times(100'000, "}") + "l"},
      {"objects with additions", "(" + times(50'000, "h\0)RNb"s) + "l"},
  };
  for (const auto& [what, code] : cases) {
    const auto bytes = pickle_of(what.find("additions") == std::string::npos ? code
                                                                             : "cm\nC\n\x94"
                                                                               "0" +
                                                                                   code);
    const Pickle pickle(bytes);
    INFO(what << ": " << pickle.memory() << " bytes for " << bytes.size());
    CHECK(pickle.memory() < 100 * bytes.size());
  }
}

TEST_CASE("ids of the memo in any order take little time", "[checkpoint]") {
  // Multiples of a prime meet in one bucket of a hash table.
  std::string code;
  for (uint64_t id = 0; id < 40'000; ++id) {
    code += "Nr" + bytes_of((id + 1) * 107'897 % 0xffffffff, 4) + "0";
  }
  CHECK(value_of(code + "N") == "None");
}

TEST_CASE("mutated pickles are read or refused, and nothing else", "[checkpoint]") {
  std::mt19937 random(1);
  const auto below = [&](size_t end) { return random() % end; };
  const auto& values = odd_values();
  size_t refused = 0;
  for (int i = 0; i < 20'000; ++i) {
    auto bytes = values[below(values.size())].first.substr(0, 2000);
    const auto& other = values[below(values.size())].first;
    for (size_t changes = 1 + below(4); changes > 0; --changes) {
      const auto at = 2 + below(bytes.size() - 2);
      switch (below(4)) {
        case 0:
          bytes[at] = static_cast<char>(random());
          break;
        case 1:
          bytes[at] = "()]}N.012QRabtelduhjqr\x81\x85\x86\x87\x8f\x90\x91\x92\x93\x94"[below(31)];
          break;
        case 2:
          bytes.erase(at, 1 + below(8));
          break;
        default:
          bytes.insert(at, other, below(other.size()), 1 + below(20));
      }
      if (bytes.size() < 3) bytes += "NN.";
    }
    try {
      const Pickle pickle(bytes);
      CHECK(pickle.memory() < 4096 + 100 * bytes.size());
    } catch (const CheckpointError&) {
      ++refused;
    }
  }
  CHECK(refused > 1000);
}
