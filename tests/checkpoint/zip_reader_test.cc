#include "lightning/checkpoint/zip_reader.h"

#include <catch2/catch.hpp>
#include <chrono>
#include <functional>
#include <random>
#include <sstream>
#include <string>

#include "lightning/checkpoint/atomic_file.h"
#include "lightning/checkpoint/zip_writer.h"
#include "lightning/errors.h"
#include "lightning/files.h"
#include "tests/support/python.h"
#include "tests/support/temp_dir.h"

using Catch::Matchers::Contains;
using namespace lightning;
using lightning::testing::run_python;
using lightning::testing::TempDir;

namespace {

ZipReader open_zip(const std::string& path) { return ZipReader(MappedFile::open(path)); }

// What the reader says about these bytes; empty when it takes them.
std::string error_of(const TempDir& dir, const std::string& bytes, bool verify = false) {
  write_file(dir.path("x.ckpt"), bytes);
  try {
    const auto zip = open_zip(dir.path("x.ckpt"));
    if (verify) zip.verify_all();
    return "";
  } catch (const CheckpointError& error) {
    CHECK_THAT(error.what(), Contains(dir.path("x.ckpt")));
    return error.what();
  }
}

std::string zip_of(const TempDir& dir, std::vector<ZipSource> records) {
  const ZipWriter writer("archive", std::move(records));
  AtomicFile file(dir.path("made"), writer.bytes());
  writer.write(file);
  file.commit();
  return read_file(dir.path("made"));
}

// Two records, "a" with "first" and "b" with "second": "a" at 64, its entry in the directory first.
std::string two_records(const TempDir& dir) {
  return zip_of(dir, {ZipSource::of_text("a", "first"), ZipSource::of_text("b", "second")});
}

size_t entry_at(const std::string& zip, int which) {
  size_t at = zip.find("PK\1\2");
  for (int i = 0; i < which; ++i) at = zip.find("PK\1\2", at + 1);
  return at;
}

std::string with(std::string bytes, size_t at, const std::string& change) {
  return bytes.replace(at, change.size(), change);
}

// Without the zip64 records, as most programs write it; the end record has the same numbers.
std::string without_zip64(const std::string& zip) {
  const size_t at = zip.find("PK\6\6");
  return zip.substr(0, at) + zip.substr(at + 76);
}

}  // namespace

TEST_CASE("the records of files of torch.save and of zip programs are those that Python reads",
          "[checkpoint]") {
  TempDir dir;
  const std::string script = R"(
import sys, torch, zipfile, zlib
folder = sys.argv[1]
state = {"w": torch.arange(1000.0), "empty": torch.zeros(0), "s": "text", "b": torch.ones(3, 5)}
torch.save(state, folder + "/torch.pt")
torch.serialization.set_crc32_options(False)
torch.save(state, folder + "/no_crc.pt")
from_torch = zipfile.ZipFile(folder + "/torch.pt")
with zipfile.ZipFile(folder + "/python.pt", "w") as out:
    out.comment = b"with a comment"
    out.mkdir("ordner")
    for name in from_torch.namelist():
        out.writestr("ordner/" + name.split("/", 1)[1], from_torch.read(name))
    with out.open(zipfile.ZipInfo("ordner/gr\u00f6\u00dfe/64"), "w", force_zip64=True) as record:
        record.write(b"in a zip64 record")
for file in ["torch.pt", "no_crc.pt", "python.pt"]:
    with zipfile.ZipFile(folder + "/" + file) as z:
        for info in z.infolist():
            if info.is_dir():
                continue
            offset = info.header_offset
            z.fp.seek(offset + 26)
            n, m = z.fp.read(2), z.fp.read(2)
            offset += 30 + int.from_bytes(n, "little") + int.from_bytes(m, "little")
            print(file, info.filename, offset, info.file_size, info.CRC)
)";
  std::istringstream expected(run_python(script, {dir.path()}));
  std::string file, name;
  uint64_t offset = 0, bytes = 0, count = 0;
  uint32_t crc = 0;
  while (expected >> file >> name >> offset >> bytes >> crc) {
    const auto zip = open_zip(dir.path(file));
    CHECK(zip.folder() == name.substr(0, name.find('/')));
    const auto& record = zip.at(name.substr(name.find('/') + 1));
    CHECK(record.offset == offset);
    CHECK(record.bytes == bytes);
    CHECK(record.crc == crc);
    CHECK(zip.data(record).size() == bytes);
    CHECK_NOTHROW(zip.verify(record));
    ++count;
  }
  CHECK(count == 9 + 9 + 10);
  CHECK(open_zip(dir.path("torch.pt")).records().size() == 9);
  CHECK(open_zip(dir.path("python.pt")).records().size() == 10);
  for (const char* each : {"torch.pt", "no_crc.pt", "python.pt"}) {
    CHECK_NOTHROW(open_zip(dir.path(each)).verify_all());
  }
  CHECK(open_zip(dir.path("torch.pt")).data(open_zip(dir.path("torch.pt")).at("version")) == "3\n");
}

TEST_CASE("records come in the directory's order and are found by name", "[checkpoint]") {
  TempDir dir;
  std::vector<ZipSource> records;
  for (const char* name : {"data.pkl", "data/0", "data/10", "data/9", ".data/serialization_id"}) {
    records.push_back(ZipSource::of_text(name, name));
  }
  zip_of(dir, std::move(records));
  const auto zip = open_zip(dir.path("made"));
  REQUIRE(zip.records().size() == 5);
  CHECK(zip.records()[2].name == "data/10");
  for (const auto& record : zip.records()) {
    CHECK(zip.find(record.name) == &record);
    CHECK(zip.data(record) == record.name);
    CHECK(record.offset % 64 == 0);
  }
  CHECK(zip.find("data/1") == nullptr);
  CHECK(zip.find("") == nullptr);
  CHECK(zip.find("zzzzzzzzzzzzzzzzzzzzzzzzzzzzzz") == nullptr);
  CHECK_THROWS_WITH(zip.at("data/1"), Contains("no record \"data/1\"") && Contains("among its 5"));
}

TEST_CASE("a zip that lies inside a file is read from there", "[checkpoint]") {
  TempDir dir;
  const auto zip = two_records(dir);
  write_file(dir.path("items"), "123" + zip + "behind");
  const auto file = MappedFile::open(dir.path("items"));
  const ZipReader reader(file, 3, zip.size());
  CHECK(reader.data(reader.at("b")) == "second");
  CHECK_NOTHROW(reader.verify_all());
  CHECK_THROWS_WITH(ZipReader(file, 4, zip.size()),
                    Contains("items (the item of") && Contains("at byte 4"));
  CHECK_THROWS_WITH(ZipReader(file, 3, zip.size() + 10), Contains("It is torn"));
  CHECK_THROWS_WITH(ZipReader(file, ~uint64_t{0}, 2), Contains("It is torn"));
}

TEST_CASE("what is no zip file is told apart from a torn one", "[checkpoint]") {
  TempDir dir;
  const auto zip = two_records(dir);
  CHECK_THAT(error_of(dir, ""), Contains("no zip file"));
  CHECK_THAT(error_of(dir, std::string(70000, 'x')), Contains("no zip file"));
  for (size_t bytes = 4; bytes < zip.size(); ++bytes) {
    if (error_of(dir, zip.substr(0, bytes)).find("torn or damaged") == std::string::npos) {
      FAIL("the first " << bytes << " bytes pass");
    }
  }
  CHECK_THAT(error_of(dir, zip + "x"), Contains("no end record"));
}

TEST_CASE("every claim of the directory is checked", "[checkpoint]") {
  TempDir dir;
  const auto zip = two_records(dir);
  REQUIRE(error_of(dir, zip, true).empty());
  const size_t a = entry_at(zip, 0);
  const size_t b = entry_at(zip, 1);
  const size_t end64 = zip.find("PK\6\6");
  const std::string max32(4, '\xff');

  CHECK_THAT(error_of(dir, with(zip, a + 10, "\x08")), Contains("\"archive/a\" is compressed"));
  CHECK_THAT(error_of(dir, with(zip, 8, "\x08")), Contains("is compressed"));
  CHECK_THAT(error_of(dir, with(zip, a + 20, "\x04")), Contains("is compressed"));
  CHECK_THAT(error_of(dir, with(zip, a + 8, "\x09")), Contains("\"archive/a\" is encrypted"));
  CHECK_THAT(error_of(dir, with(zip, 6, "\x09")), Contains("is encrypted"));
  CHECK_THAT(error_of(dir, with(zip, a + 34, "\x01")), Contains("another disk"));
  CHECK_THAT(error_of(dir, with(zip, 0, "PX")), Contains("has no header at byte 0"));
  CHECK_THAT(error_of(dir, with(zip, 38, "c")), Contains("calls itself \"archive/c\""));
  CHECK_THAT(error_of(dir, with(zip, a + 42, "\x01")), Contains("has no header at byte 1"));
  CHECK_THAT(error_of(dir, with(zip, a + 42, "\x01\x01\x01")), Contains("would begin at byte"));
  CHECK_THAT(error_of(dir, with(zip, a + 42, max32)), Contains("would begin at byte 4294967295"));
  CHECK_THAT(error_of(dir, with(zip, a + 20, max32 + max32)), Contains("4294967295 bytes"));
  CHECK_THAT(error_of(dir, with(zip, 28, "\xff\xff")), Contains("more than"));
  CHECK_THAT(error_of(dir, with(zip, b + 28, "\xff\xff")), Contains("leaves its directory"));
  CHECK_THAT(error_of(dir, with(zip, b, "PX")), Contains("no entry at byte"));
  CHECK_THAT(error_of(dir, with(zip, end64 + 48, "\xff\xff\xff\xff\xff\xff\xff\xff")),
             Contains("end records differ"));
  CHECK_THAT(error_of(dir, with(zip, end64 + 16, "\1")), Contains("several disks"));
  CHECK_THAT(error_of(dir, with(zip, end64 + 56 + 8, "\1")), Contains("zip64 end record is not"));
  CHECK_THAT(error_of(dir, with(zip, end64 + 56 + 15, "\xff")), Contains("zip64 end record"));

  const auto plain = without_zip64(zip);
  REQUIRE(error_of(dir, plain, true).empty());
  const size_t end = plain.find("PK\5\6");
  CHECK_THAT(error_of(dir, with(plain, end + 8, "\1\1\1\1")), Contains("directory of 257 records"));
  CHECK_THAT(error_of(dir, with(plain, end + 8, std::string("\1\0\1\0", 4))),
             Contains("behind its last entry"));
  CHECK_THAT(error_of(dir, with(plain, end + 16, max32)), Contains("lie at byte 4294967295"));
}

TEST_CASE("records that overlap, share a name or lie in two folders are refused", "[checkpoint]") {
  TempDir dir;
  const auto zip = two_records(dir);
  const size_t b = entry_at(zip, 1);
  const size_t header = zip.find("PK\3\4", 1);  // of b
  const auto twice = with(with(zip, b + 46 + 8, "a"), header + 30 + 8, "a");
  CHECK_THAT(error_of(dir, twice), Contains("the record \"a\" twice"));
  const auto elsewhere = with(with(zip, b + 46, "b"), header + 30, "b");
  CHECK_THAT(error_of(dir, elsewhere), Contains("two folders, \"archive\" and \"brchive\""));
  const auto in_none = with(with(zip, b + 46 + 7, "x"), header + 30 + 7, "x");
  CHECK_THAT(error_of(dir, in_none), Contains("\"archivexb\" is in no folder"));

  // "a" grows over the header of "b".
  const size_t a = entry_at(zip, 0);
  const auto grown = with(with(zip, a + 20, "\x40"), a + 24, "\x40");
  CHECK_THAT(error_of(dir, grown), Contains("begins inside the one before"));
}

TEST_CASE("a big-endian file is refused", "[checkpoint]") {
  TempDir dir;
  const auto with_order = [&](const std::string& order) {
    return error_of(dir, zip_of(dir, {ZipSource::of_text("byteorder", order)}));
  };
  CHECK(with_order("little").empty());
  CHECK_THAT(with_order("big"), Contains("its byte order is \"big\""));
  CHECK_THAT(with_order("\x01\x02"), Contains("its byte order is \"??\""));
}

TEST_CASE("a flipped bit is found by its record, unless the file was written without CRCs",
          "[checkpoint]") {
  TempDir dir;
  std::string text(11 << 20, 't');  // several pieces
  const auto zip = zip_of(dir, {ZipSource::of_text("small", "s"), ZipSource::of_text("large", text),
                                ZipSource::of_text("none", "")});
  REQUIRE(error_of(dir, zip, true).empty());
  const auto flipped = with(zip, 10 << 20, "u");
  CHECK_THAT(error_of(dir, flipped, true), Contains("the 11534336 bytes of the record \"large\""));
  CHECK_NOTHROW(open_zip(dir.path("x.ckpt")).verify(open_zip(dir.path("x.ckpt")).at("small")));
  const auto reader = open_zip(dir.path("x.ckpt"));
  CHECK_THROWS_WITH(reader.verify(reader.at("large")), Contains("\"large\" have the CRC 0x"));

  const std::string zero(4, '\0');
  const auto some = with(zip, entry_at(zip, 1) + 16, zero);
  CHECK_THAT(error_of(dir, some, true), Contains("the file says 0x00000000"));
  CHECK(error_of(dir, with(with(flipped, entry_at(zip, 1) + 16, zero), entry_at(zip, 0) + 16, zero),
                 true)
            .empty());
}

TEST_CASE("50,000 records open in some 20 ms", "[checkpoint]") {
  TempDir dir;
  std::vector<ZipSource> records;
  for (int i = 0; i < 50000; ++i)
    records.push_back(ZipSource::of_text(str("data/", i), "12345678"));
  zip_of(dir, std::move(records));
  const auto before = std::chrono::steady_clock::now();
  const auto zip = open_zip(dir.path("made"));
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - before;
  CHECK(zip.records().size() == 50000);
  CHECK(zip.find("data/31415") == &zip.records()[31415]);
  INFO(seconds.count());
  CHECK(seconds.count() < 1);  // room for sanitizers and busy machines
  CHECK_NOTHROW(zip.verify_all());
}

TEST_CASE("a file with some bytes changed is refused or read, and never more than that",
          "[checkpoint]") {
  TempDir dir;
  const auto zip = zip_of(
      dir, {ZipSource::of_text("data.pkl", "pickle"), ZipSource::of_text("byteorder", "little"),
            ZipSource::of_text("data/0", std::string(100, 'x')), ZipSource::of_text("data/1", "")});
  std::mt19937 random(4);
  int refused = 0;
  for (int i = 0; i < 2000; ++i) {
    std::string mutant = i % 4 == 0 ? without_zip64(zip) : zip;
    for (uint32_t changes = 1 + random() % 4; changes > 0; --changes) {
      const char values[] = {'\0', '\xff', '\x7f', '\x01', static_cast<char>(random())};
      // Mostly where the numbers are.
      const size_t from = random() % 3 == 0 ? 0 : mutant.find("PK\1\2");
      if (from == std::string::npos) continue;
      mutant[from + random() % (mutant.size() - from)] = values[random() % 5];
    }
    if (random() % 8 == 0) mutant.resize(random() % mutant.size());
    refused += error_of(dir, mutant, true).empty() ? 0 : 1;
  }
  CHECK(refused > 1000);
  CHECK(refused < 2000);
}
