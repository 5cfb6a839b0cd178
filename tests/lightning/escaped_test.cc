#include "lightning/escaped.h"

#include <catch2/catch.hpp>

using namespace lightning;

TEST_CASE("text from a file is shown with what steers a terminal escaped", "[lightning]") {
  CHECK(escaped("net.0.weight größe 大 🙂") == "net.0.weight größe 大 🙂");
  CHECK(escaped("a\x1b[2J\x07\x7f") == "a\\x1b[2J\\x07\\x7f");
  CHECK(escaped(std::string("a\nb\tc\r\0", 7)) == "a\\nb\\tc\\r\\x00");
  CHECK(escaped("\xc2\x9b") == "\\x9b");  // CSI in one character
  CHECK(escaped("\xe2\x80\xae\xe2\x80\xa8") == "\\u202e\\u2028");
  CHECK(escaped("\xf3\xa0\x81\x81") == "\\U000e0041");  // a tag character
  CHECK(escaped("\xff\xc3(\xe5\xa4") == "\\xff\\xc3(\\xe5\\xa4");
  CHECK(escaped("\xc0\xaf\xed\xa0\x80") == "\\xc0\\xaf\\xed\\xa0\\x80");  // overlong, a surrogate
  CHECK(escaped_lines("a\n\tb\r\x1b[2J") == "a\n\tb\\r\\x1b[2J");
}
