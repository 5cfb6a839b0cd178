#include "tools/lightning/shown_text.h"

#include <catch2/catch.hpp>

using namespace lightning::tools;

TEST_CASE("text from a file is shown with what steers a terminal escaped", "[tools]") {
  CHECK(escaped("net.0.weight größe 大 🙂") == "net.0.weight größe 大 🙂");
  CHECK(escaped("a\x1b[2J\x07\x7f") == "a\\x1b[2J\\x07\\x7f");
  CHECK(escaped(std::string("a\nb\tc\r\0", 7)) == "a\\nb\\tc\\r\\x00");
  CHECK(escaped("\xc2\x9b") == "\\x9b");  // CSI in one character
  CHECK(escaped("\xe2\x80\xae\xe2\x80\xa8") == "\\u202e\\u2028");
  CHECK(escaped("\xf3\xa0\x81\x81") == "\\U000e0041");  // a tag character
  CHECK(escaped("\xff\xc3(\xe5\xa4") == "\\xff\\xc3(\\xe5\\xa4");
  CHECK(escaped("\xc0\xaf\xed\xa0\x80") == "\\xc0\\xaf\\xed\\xa0\\x80");  // overlong, a surrogate
}

TEST_CASE("long text is cut between characters", "[tools]") {
  CHECK(shortened("abcdef", 6) == "abcdef");
  CHECK(shortened("abcdefg", 6) == "abc...");
  CHECK(shortened("ab大大大", 7) == "ab...");
}

TEST_CASE("sizes and counts are shown for people", "[tools]") {
  CHECK(bytes_text(0) == "0 B");
  CHECK(bytes_text(1023) == "1023 B");
  CHECK(bytes_text(1536) == "1.5 KiB");
  CHECK(bytes_text((uint64_t{1} << 20) - 1) == "1.0 MiB");
  CHECK(bytes_text(uint64_t{50} << 30) == "50.0 GiB");
  CHECK(count_text(999) == "999");
  CHECK(count_text(1234567) == "1,234,567");
  CHECK(counted(1, "tensor") == "1 tensor");
  CHECK(counted(1000, "tensor") == "1,000 tensors");
}
