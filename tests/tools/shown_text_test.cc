#include "tools/lightning/shown_text.h"

#include <catch2/catch.hpp>

using namespace lightning::tools;

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
