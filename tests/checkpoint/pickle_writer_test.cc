#include "lightning/checkpoint/pickle_writer.h"

#include <catch2/catch.hpp>
#include <limits>
#include <nlohmann/json.hpp>

#include "lightning/errors.h"
#include "lightning/files.h"
#include "tests/support/python.h"
#include "tests/support/temp_dir.h"

using Catch::Matchers::Contains;
using namespace lightning;
using lightning::testing::run_python;
using lightning::testing::TempDir;
using Json = nlohmann::ordered_json;

namespace {

// What Python makes of the value in each line, and its pickle of it, in sixteens.
const char* const kPython = R"(
import json, math, pickle, sys
sys.path[:] = [p for p in sys.path if p]
values = {
    "ints": [0, 1, 255, 256, 65535, 65536, -1, -128, 2**31 - 1, 2**31, -2**31, -2**31 - 1,
             2**39 - 1, 2**39, -2**39, -2**39 - 1, 2**55, -2**55 - 1, 2**63 - 1, -2**63],
    "big": [2**63, -2**63 - 1, 2**70, 2**2000, -2**2031],
    "floats": [0.0, -0.0, 1.5, math.inf, -math.inf, 5e-324],
    "texts": ["", "a", "größe", "大", "😀", "a", "x" * 256, "x" * 256],
    "tuples": [(), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), (((),),)],
    "constants": [None, True, False],
    "bytes": [b"a\0\xff", bytearray(b"b\x80")],
    "set": {7},
    "dict": {"a": {}},
    "many": list(range(300)) + [str(i) for i in range(300)],
}
print(json.dumps({name: pickle.dumps(value, 2).hex() for name, value in values.items()}))
)";

std::string hex(const std::string& bytes) {
  std::string text;
  for (const char c : bytes) {
    for (const int shift : {4, 0}) text += "0123456789abcdef"[(c >> shift) & 15];
  }
  return text;
}

// A list of what `write` writes.
template <class F>
std::string list_of(const F& write) {
  PickleWriter out;
  out.empty_list();
  out.begin_items();
  write(out);
  out.end_appends();
  return hex(out.finish());
}

std::string big(size_t zeros, char last) { return std::string(zeros, '\0') + last; }

}  // namespace

TEST_CASE("pickles are byte for byte those of Python's pickle module", "[checkpoint][pickle]") {
  const Json python = Json::parse(run_python(kPython));
  const auto constants = list_of([](PickleWriter& out) {
    out.none();
    out.boolean(true);
    out.boolean(false);
  });
  CHECK(constants == python["constants"]);
  const auto ints = list_of([](PickleWriter& out) {
    const int64_t one = 1;
    for (const int64_t value : {int64_t{0},
                                one,
                                int64_t{255},
                                int64_t{256},
                                int64_t{65535},
                                int64_t{65536},
                                -one,
                                int64_t{-128},
                                (one << 31) - 1,
                                one << 31,
                                -(one << 31),
                                -(one << 31) - 1,
                                (one << 39) - 1,
                                one << 39,
                                -(one << 39),
                                -(one << 39) - 1,
                                one << 55,
                                -(one << 55) - 1,
                                std::numeric_limits<int64_t>::max(),
                                std::numeric_limits<int64_t>::min()}) {
      out.integer(value);
    }
  });
  CHECK(ints == python["ints"]);
  const auto bigs = list_of([](PickleWriter& out) {
    out.big_integer(big(7, '\x80') + '\0');
    out.big_integer(std::string(7, '\xff') + "\x7f\xff");
    out.big_integer(big(8, '\x40'));
    out.big_integer(big(250, '\1'));
    out.big_integer(big(253, '\x80'));
  });
  CHECK(bigs == python["big"]);
  const auto floats = list_of([](PickleWriter& out) {
    const double inf = std::numeric_limits<double>::infinity();
    for (const double value : {0.0, -0.0, 1.5, inf, -inf, 5e-324}) out.number(value);
  });
  CHECK(floats == python["floats"]);
  const auto texts = list_of([](PickleWriter& out) {
    for (const char* value : {"", "a", "größe", "大", "😀", "a"}) out.text(value);
    for (int i = 0; i < 2; ++i) out.text(std::string(256, 'x'));
  });
  CHECK(texts == python["texts"]);
  const auto tuples = list_of([](PickleWriter& out) {
    for (const int64_t items : {0, 1, 2, 3, 4}) {
      out.begin_tuple(static_cast<size_t>(items));
      for (int64_t i = 1; i <= items; ++i) out.integer(i);
      out.end_tuple();
    }
    out.begin_tuple(1);
    out.begin_tuple(1);
    out.begin_tuple(0);
    for (int i = 0; i < 3; ++i) out.end_tuple();
  });
  CHECK(tuples == python["tuples"]);
  const auto bytes = list_of([](PickleWriter& out) {
    out.bytes({"a\0\xff", 3});
    out.byte_array("b\x80");
  });
  CHECK(bytes == python["bytes"]);
  PickleWriter many;  // more than 255 in the memo
  many.empty_list();
  many.begin_items();
  for (int i = 0; i < 300; ++i) many.integer(i);
  for (int i = 0; i < 300; ++i) many.text(std::to_string(i));
  many.end_appends();
  CHECK(hex(many.finish()) == python["many"]);
  PickleWriter set;
  set.global("builtins", "set");
  set.begin_tuple(1);
  set.empty_list();
  set.integer(7);
  set.append();
  set.end_tuple();
  set.call();
  CHECK(hex(set.finish()) == python["set"]);
  PickleWriter dict;
  dict.empty_dict();
  dict.text("a");
  dict.empty_dict();
  dict.setitem();
  CHECK(hex(dict.finish()) == python["dict"]);
}

TEST_CASE("tuples of an unknown length, empty bytes and what comes again are read by Python",
          "[checkpoint][pickle]") {
  TempDir dir;
  PickleWriter out;
  out.empty_list();
  out.begin_items();
  for (const int items : {0, 1, 2, 5}) {
    out.begin_tuple();
    for (int i = 0; i < items; ++i) out.integer(i);
    out.end_tuple();
  }
  out.bytes("");
  out.empty_dict();
  const auto memo = out.last_memo();
  out.begin_items();
  out.end_setitems();
  out.again(memo);
  out.big_integer(std::string(299, '\0') + '\1');
  out.global("collections", "OrderedDict");
  out.begin_tuple();
  out.end_tuple();
  out.make();
  out.empty_dict();
  out.text("note");
  out.text("\xed\xb2\x80");  // half of a surrogate pair, as in names of files
  out.setitem();
  out.build();
  out.end_appends();
  write_file(dir.path("a"), out.finish());
  CHECK(run_python(R"(
import pickle, pickletools, sys
text = open(sys.argv[1], "rb").read()
pickletools.dis(text, open("/dev/null", "w"))
v = pickle.loads(text)
print(v[:6], v[5] is v[6], v[7] == 2**2392, type(v[8]).__name__, ascii(v[8].note))
)",
                   {dir.path("a")}) ==
        "[(), (0,), (0, 1), (0, 1, 2, 3, 4), b'', {}] True True OrderedDict '\\udc80'\n");
}

TEST_CASE("what no pickle can hold is refused", "[checkpoint][pickle]") {
  PickleWriter out;
  for (const std::string text :
       {"\xff", "a\x80", "\xc3", "\xc0\x80", "\xe0\x80\x80", "\xf0\x80\x80\x80", "\xf4\x90\x80\x80",
        "12345678\xf8\x88\x80\x80\x80", "\xe5\xa4"}) {
    INFO(text);
    CHECK_THROWS_WITH(out.text(text), Contains("is not UTF-8") && Contains("Save it as bytes"));
  }
  CHECK_THROWS_WITH(out.text("12345678\xff"), Contains("(byte 8)"));
  CHECK_THROWS_WITH(out.global("os\nsystem", "x"), Contains("line break"));
  CHECK_THROWS_AS(out.global("os", "a\nb"), CheckpointError);
}
