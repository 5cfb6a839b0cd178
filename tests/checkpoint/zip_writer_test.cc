#include "lightning/checkpoint/zip_writer.h"

#include <signal.h>
#include <sys/mman.h>
#include <sys/resource.h>

#include <atomic>
#include <catch2/catch.hpp>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <mutex>
#include <set>
#include <string>

#include "lightning/checkpoint/zip_reader.h"
#include "lightning/errors.h"
#include "lightning/files.h"
#include "tests/support/python.h"
#include "tests/support/temp_dir.h"

using Catch::Matchers::Contains;
using namespace lightning;
using lightning::testing::run_python;
using lightning::testing::TempDir;

namespace {

void write_zip(const std::string& path, const ZipWriter& writer, int threads = 0) {
  AtomicFile file(path, writer.bytes());
  writer.write(file, 0, threads);
  file.commit();
}

// All records of a zip, as they lie in it.
std::vector<ZipSource> sources_of(const ZipReader& zip) {
  std::vector<ZipSource> records;
  for (const auto& record : zip.records()) {
    records.push_back(
        ZipSource::of_memory(std::string(record.name), zip.data(record).data(), record.bytes));
  }
  return records;
}

// Files of torch.save, written once for all tests. "big" has a record of 5 GiB of zeros, which are
// a hole in the file.
const TempDir& torch_files() {
  static const TempDir dir;
  static const std::string ran = run_python(R"(
import io, sys, torch, numpy as np
folder = sys.argv[1]

class Sparse:
    def __init__(self, path):
        self.file = open(path, "wb")
        self.bytes = 0

    def write(self, data):
        self.bytes += len(data)
        if len(data) > 1 << 30:
            self.file.truncate(self.bytes)
            self.file.seek(self.bytes)
        else:
            self.file.write(data)
        return len(data)

    def flush(self):
        self.file.flush()

def save(name, value):
    out = io.BytesIO()
    torch.save(value, out)
    open(folder + "/" + name, "wb").write(out.getvalue())

save("small", {"a": torch.arange(3.0), "empty": torch.zeros(0), "s": "text"})
save("large", [torch.arange(1 << 21), torch.ones(7), torch.arange(1 << 17), torch.zeros(3 << 20)])
save("many", {f"layer.{i}": torch.full((i % 50,), i) for i in range(5000)})
torch.save({"a": torch.arange(300000)}, folder + "/named.pt")

big = Sparse(folder + "/big")
zeros = torch.from_numpy(np.zeros(5 << 30, dtype=np.uint8))
torch.save([torch.arange(3.0), zeros, torch.ones(1 << 20), torch.zeros(0), torch.ones(2)], big)
big.file.close()
)",
                                            {dir.path()});
  return dir;
}

}  // namespace

TEST_CASE("a zip of the records of a file of torch.save is that file, byte for byte",
          "[checkpoint]") {
  TempDir dir;
  for (const char* name : {"small", "large", "many", "named.pt"}) {
    const ZipReader zip(MappedFile::open(torch_files().path(name)));
    const auto expected = read_file(torch_files().path(name));
    const ZipWriter writer(zip.folder(), sources_of(zip));
    CHECK(writer.bytes() == expected.size());
    for (const int threads : {0, 1, 4}) {
      write_zip(dir.path("again"), writer, threads);
      CHECK((read_file(dir.path("again")) == expected));  // (): Catch would print it
    }
  }
}

TEST_CASE("records and offsets beyond 4 GiB are written as torch.save writes them",
          "[checkpoint]") {
  TempDir dir;
  const ZipReader zip(MappedFile::open(torch_files().path("big")));
  const auto& big = zip.at("data/1");
  REQUIRE(big.bytes == uint64_t{5} << 30);
  CHECK(zip.at("data/2").offset > big.bytes);

  // The zeros come from memory that is none: reading the hole would fill the page cache.
  auto records = sources_of(zip);
  void* const zeros =
      mmap(nullptr, big.bytes, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  REQUIRE(zeros != MAP_FAILED);
  for (auto& record : records) {
    if (record.name == "data/1") record = ZipSource::of_memory("data/1", zeros, big.bytes);
  }
  write_zip(dir.path("again"), ZipWriter("archive", std::move(records)));
  munmap(zeros, big.bytes);

  const auto again = MappedFile::open(dir.path("again"));
  REQUIRE(again->size() == zip.file()->size());
  CHECK(std::memcmp(again->data(), zip.file()->data(), big.offset) == 0);
  const uint64_t behind = big.offset + big.bytes;
  CHECK(std::memcmp(again->data() + behind, zip.file()->data() + behind, again->size() - behind) ==
        0);
  const ZipReader reader(again);
  CHECK_NOTHROW(reader.verify(reader.at("data/2")));
}

TEST_CASE("65,536 records and none are written as zip programs expect", "[checkpoint]") {
  TempDir dir;
  std::vector<ZipSource> records;
  for (int i = 0; i < 65536; ++i) records.push_back(ZipSource::of_text(str(i), str(i)));
  write_zip(dir.path("many"), ZipWriter("archive", std::move(records)));
  write_zip(dir.path("none"), ZipWriter("archive", {}));
  const ZipReader zip(MappedFile::open(dir.path("many")));
  CHECK(zip.records().size() == 65536);
  CHECK_NOTHROW(zip.verify_all());
  const std::string script = R"(
import sys, zipfile
with zipfile.ZipFile(sys.argv[1]) as many, zipfile.ZipFile(sys.argv[2]) as none:
    print(len(many.namelist()), many.read("archive/65535"), none.namelist())
)";
  CHECK(run_python(script, {dir.path("many"), dir.path("none")}) == "65536 b'65535' []\n");
}

TEST_CASE("a source may fill the buffer it is given, on every thread its own", "[checkpoint]") {
  TempDir dir;
  std::vector<ZipSource> records;
  for (const uint64_t bytes : {uint64_t{1000}, uint64_t{9} << 20, uint64_t{300} << 10}) {
    records.push_back({str(bytes), bytes, [](uint64_t offset, uint64_t count, void* buffer) {
                         auto* const out = static_cast<uint8_t*>(buffer);
                         for (uint64_t i = 0; i < count; ++i) {
                           out[i] = static_cast<uint8_t>((offset + i) / 1000);
                         }
                         return static_cast<const void*>(buffer);
                       }});
  }
  write_zip(dir.path("a"), ZipWriter("archive", std::move(records)), 4);
  const ZipReader zip(MappedFile::open(dir.path("a")));
  REQUIRE(zip.records().size() == 3);
  CHECK_NOTHROW(zip.verify_all());
  for (const auto& record : zip.records()) {
    bool equal = true;
    for (uint64_t i = 0; i < record.bytes; ++i) {
      equal = equal && static_cast<uint8_t>(zip.data(record)[i]) == static_cast<uint8_t>(i / 1000);
    }
    CHECK(equal);
  }
}

TEST_CASE("zips lie behind one another in one file", "[checkpoint]") {
  TempDir dir;
  const ZipWriter first("archive", {ZipSource::of_text("a", "first")});
  const ZipWriter second("archive", {ZipSource::of_text("a", std::string(1 << 20, 's'))});
  const uint64_t at = (first.bytes() + 63) / 64 * 64;
  {
    AtomicFile file(dir.path("items"), at + second.bytes());
    second.write(file, at);
    first.write(file);
    file.commit();
  }
  const auto file = MappedFile::open(dir.path("items"));
  const ZipReader one(file, 0, first.bytes());
  const ZipReader two(file, at, second.bytes());
  CHECK(one.data(one.at("a")) == "first");
  CHECK_NOTHROW(two.verify_all());
  CHECK(two.at("a").offset % 64 == 0);
  write_zip(dir.path("alone"), second);
  CHECK((read_file(dir.path("items")).substr(at) == read_file(dir.path("alone"))));
}

TEST_CASE("zips that are written together are the bytes of each written alone", "[checkpoint]") {
  const auto cache = GENERATE(AtomicFile::Cache::kAround, AtomicFile::Cache::kThrough);
  const int threads = GENERATE(1, 4);
  TempDir dir;
  std::string noise(11 << 20, ' ');  // of several pieces
  uint64_t random = 1;
  for (char& c : noise) c = static_cast<char>((random = random * 6364136223846793005u + 1) >> 56);
  std::vector<ZipWriter> zips;
  for (const uint64_t bytes : {uint64_t{0}, uint64_t{1}, uint64_t{300'001}, uint64_t{11} << 20,
                               uint64_t{70'000}, (uint64_t{9} << 20) + 13}) {
    // One in memory, one that is copied as from a device, one of zeros.
    const auto copied = [&noise](uint64_t offset, uint64_t count, void* buffer) -> const void* {
      return std::memcpy(buffer, noise.data() + offset, count);
    };
    zips.emplace_back("archive",
                      std::vector<ZipSource>{ZipSource::of_text("data.pkl", str(bytes)),
                                             ZipSource::of_memory("a", noise.data(), bytes),
                                             {"b", bytes, copied},
                                             ZipSource::of_text("c", std::string(bytes, '\0'))});
  }
  std::vector<uint64_t> offsets;
  uint64_t end = 0;
  ZipBatch batch;
  for (const auto& zip : zips) {
    offsets.push_back((end + 63) / 64 * 64);
    end = offsets.back() + zip.bytes();
    batch.add(zip, offsets.back());
  }
  {
    AtomicFile file(dir.path("all"), end, cache);
    batch.write(file, threads);
    file.commit();
  }
  const auto all = read_file(dir.path("all"));
  REQUIRE(all.size() == end);
  for (size_t i = 0; i < zips.size(); ++i) {
    CAPTURE(i);
    write_zip(dir.path("one"), zips[i]);
    CHECK((all.substr(offsets[i], zips[i].bytes()) == read_file(dir.path("one"))));
  }
}

TEST_CASE("buffers of zips that are written together come from where the caller says",
          "[checkpoint]") {
  TempDir dir;
  const uint64_t bytes = 5 << 20;
  std::atomic<int> wrong{0}, given{0};
  std::mutex mutex;
  std::set<void*> buffers;
  const ZipWriter zip("archive", {{"a", bytes, [&](uint64_t, uint64_t count, void* buffer) {
                                     const std::lock_guard<std::mutex> lock(mutex);
                                     auto next = buffers.upper_bound(buffer);
                                     wrong += next == buffers.begin();
                                     std::memset(buffer, 'x', count);
                                     return static_cast<const void*>(buffer);
                                   }}});
  ZipBatch batch;
  batch.add(zip, 0);
  AtomicFile file(dir.path("a"), zip.bytes());
  batch.write(file, 2, [&](uint64_t most) {
    ++given;
    std::shared_ptr<char> memory(
        static_cast<char*>(std::aligned_alloc(4096, (most + 4095) / 4096 * 4096)), std::free);
    const std::lock_guard<std::mutex> lock(mutex);
    buffers.insert(memory.get());
    return memory;
  });
  file.commit();
  CHECK(given == 2);
  CHECK(wrong == 0);
}

TEST_CASE("what a source throws on a thread reaches the caller, and there is no file",
          "[checkpoint]") {
  TempDir dir;
  std::vector<ZipSource> records;
  for (int i = 0; i < 20; ++i) {
    records.push_back({str(i), 3 << 20, [i](uint64_t, uint64_t count, void* buffer) -> const void* {
                         if (i == 11) throw std::runtime_error("the device is gone");
                         return std::memset(buffer, i, count);
                       }});
  }
  const ZipWriter writer("archive", std::move(records));
  for (const int threads : {1, 4}) {
    CHECK_THROWS_WITH(write_zip(dir.path("a"), writer, threads), "the device is gone");
  }
  CHECK(std::filesystem::is_empty(dir.path()));
}

TEST_CASE("a disk that takes no more is an error with the path and the bytes", "[checkpoint]") {
  TempDir dir;
  const std::string text(3 << 20, 'x');
  const ZipWriter writer("archive", {ZipSource::of_text("a", text), ZipSource::of_text("b", text)});
  AtomicFile file(dir.path("a"), writer.bytes());  // reserves them, so the limit comes later
  rlimit before{};
  getrlimit(RLIMIT_FSIZE, &before);
  const rlimit less{1 << 20, before.rlim_max};
  const auto handler = signal(SIGXFSZ, SIG_IGN);
  setrlimit(RLIMIT_FSIZE, &less);
  CHECK_THROWS_WITH(writer.write(file, 0, 2),
                    Contains(dir.path("a")) && Contains(str("needs ", writer.bytes(), " bytes")) &&
                        Contains("File too large"));
  setrlimit(RLIMIT_FSIZE, &before);
  signal(SIGXFSZ, handler);
}

TEST_CASE("names that a zip cannot hold are refused", "[checkpoint]") {
  const auto named = [](const std::string& name) { return ZipSource::of_text(name, "x"); };
  CHECK_THROWS_WITH(ZipWriter("archive", {named("a"), named("b"), named("a")}),
                    Contains("two records named \"a\""));
  CHECK_THROWS_WITH(ZipWriter("archive", {named("")}), Contains("a name of 0 bytes"));
  CHECK_THROWS_WITH(ZipWriter("archive", {named(std::string(65528, 'n'))}),
                    Contains("a name of 65528 bytes: expected 1 to 65527"));
  CHECK_NOTHROW(ZipWriter("archive", {named(std::string(65527, 'n'))}));
  CHECK_THROWS_WITH(ZipWriter("a/b", {}), Contains("the top folder \"a/b\""));
}
