#include "lightning/checkpoint/crc32.h"

#include <algorithm>
#include <catch2/catch.hpp>
#include <random>
#include <sstream>
#include <string>
#include <vector>

#include "lightning/files.h"
#include "tests/support/python.h"
#include "tests/support/temp_dir.h"

using namespace lightning;
using lightning::testing::run_python;
using lightning::testing::TempDir;

namespace {

std::vector<uint8_t> noise(size_t bytes) {
  std::mt19937 random(7);
  std::vector<uint8_t> data(bytes);
  for (auto& byte : data) byte = static_cast<uint8_t>(random());
  return data;
}

}  // namespace

TEST_CASE("the CRC is zlib's for every length and alignment, folded and by tables",
          "[checkpoint]") {
  const auto data = noise(20000);
  TempDir dir;
  write_file(dir.path("data"), std::string(data.begin(), data.end()));
  const std::string script = R"(
import sys, zlib
data = open(sys.argv[1], "rb").read()
for begin in range(17):
    for n in [*range(300), 4095, 4096, 4097, 19983]:
        print(begin, n, zlib.crc32(data[begin:begin + n]), zlib.crc32(data[begin:begin + n], 12345))
)";
  std::istringstream expected(run_python(script, {dir.path("data")}));
  size_t begin = 0, bytes = 0, count = 0;
  uint32_t crc = 0, continued = 0;
  bool equal = true;
  while (expected >> begin >> bytes >> crc >> continued) {
    const uint8_t* at = data.data() + begin;
    equal = equal && crc32(at, bytes) == crc && crc32_by_tables(at, bytes) == crc;
    equal = equal && crc32(at, bytes, 12345) == continued;
    equal = equal && crc32_by_tables(at, bytes, 12345) == continued;
    ++count;
  }
  CHECK(count == 17 * 304);
  CHECK(equal);
}

TEST_CASE("the CRC of nothing is 0, and that of the digits is the one in the standard",
          "[checkpoint]") {
  CHECK(crc32(nullptr, 0) == 0);
  CHECK(crc32("123456789", 9) == 0xCBF43926);
  CHECK(crc32_by_tables("123456789", 9) == 0xCBF43926);
}

TEST_CASE("the CRC of two pieces comes from those of each", "[checkpoint]") {
  const auto data = noise(3000);
  const uint32_t whole = crc32(data.data(), data.size());
  bool equal = true;
  for (size_t cut = 0; cut <= data.size(); cut += 7) {
    const size_t rest = data.size() - cut;
    const uint32_t first = crc32(data.data(), cut);
    equal = equal && crc32_combine(first, crc32(data.data() + cut, rest), rest) == whole;
    equal = equal && crc32(data.data() + cut, rest, first) == whole;
  }
  CHECK(equal);
}

TEST_CASE("the CRC of more than 4 GiB comes from its pieces", "[checkpoint]") {
  // zlib.crc32 of 6 GiB of zeros, and of one "x" before them.
  const std::vector<uint8_t> zeros(1 << 20);
  const uint64_t bytes = uint64_t{6} << 30;
  uint32_t crc = crc32(zeros.data(), zeros.size());
  for (uint64_t done = zeros.size(); done < bytes;) {
    const uint64_t next = std::min(done, bytes - done);  // 1 MiB, 2 MiB, ... 4 GiB, and 2 GiB
    const uint32_t second = next == done ? crc : crc32_combine(~0u, ~0u, next);
    crc = crc32_combine(crc, second, next);
    done += next;
  }
  CHECK(crc == crc32_combine(~0u, ~0u, bytes));
  CHECK(crc == 0xC64E0E30);
  CHECK(crc32_combine(crc32("x", 1), crc, bytes) == 0x5A691C68);
}
