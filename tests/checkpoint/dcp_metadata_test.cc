#include "lightning/checkpoint/dcp_metadata.h"

#include <catch2/catch.hpp>
#include <functional>
#include <random>

#include "lightning/errors.h"
#include "lightning/files.h"
#include "tests/support/python.h"
#include "tests/support/temp_dir.h"

using Catch::Matchers::Contains;
using namespace lightning;
using lightning::testing::run_python;
using lightning::testing::TempDir;

namespace {

using Item = DcpMetadata::Item;
using Sizes = std::vector<int64_t>;

// A [5, 6] of two ranks, a replica, a 0-dim tensor, a value, and a path with a list in it.
DcpMetadata example() {
  DcpMetadata metadata;
  Item rows;
  rows.fqn = "model.net.weight";
  rows.path = {"model", "net.weight"};
  rows.is_tensor = true;
  rows.dtype = DType::kBFloat16;
  rows.sizes = {5, 6};
  rows.chunks = {{{0, 0}, {3, 6}, {"__0_0.distcp", 0, 1500}},
                 {{3, 0}, {2, 6}, {"__1_0.distcp", 64, 1500}}};
  metadata.items.push_back(rows);
  Item step = rows;
  step.fqn = "optimizer_0.state.step";
  step.path = {"optimizer_0", "state", "step"};
  step.dtype = DType::kFloat32;
  step.sizes = {};
  step.chunks = {{{}, {}, {"__1_0.distcp", 1600, 1400}}};
  metadata.items.push_back(step);
  Item rate;
  rate.fqn = "optimizer_0.param_groups.0.lr";
  rate.path = {"optimizer_0", "param_groups", int64_t{0}, "lr"};
  rate.place = {"__0_0.distcp", 1536, 1000};
  metadata.items.push_back(rate);
  return metadata;
}

// A tensor alone, of float32, each chunk in a place of its own.
DcpMetadata tensor_of(const Sizes& sizes, const std::vector<std::pair<Sizes, Sizes>>& chunks) {
  Item item;
  item.fqn = "w";
  item.path = {"w"};
  item.is_tensor = true;
  item.sizes = sizes;
  uint64_t at = 0;
  for (const auto& [offsets, lengths] : chunks) {
    uint64_t bytes = 4;
    for (const int64_t length : lengths) bytes *= static_cast<uint64_t>(length);
    item.chunks.push_back({offsets, lengths, {}});
    if (bytes > 0) item.chunks.back().place = {"__0_0.distcp", at, bytes + 1000};
    at += bytes + 1000;
  }
  DcpMetadata metadata;
  metadata.items.push_back(item);
  return metadata;
}

DcpMetadata again(const DcpMetadata& metadata) { return DcpMetadata::parse(metadata.to_pickle()); }

std::string error_of(const std::function<void()>& work) {
  try {
    work();
  } catch (const CheckpointError& error) {
    return error.what();
  }
  return "no error";
}

std::string error_of(const DcpMetadata& metadata) {
  return error_of([&] { again(metadata); });
}

// What Python's pickles give, by one run of it. It also reads example() as `ours`.
const char* const kScript = R"(
import pickle, sys, torch
import torch.distributed.checkpoint.metadata as M
from torch.distributed.checkpoint.filesystem import _StorageInfo
S = torch.Size
def chunk(offsets, sizes):
    return M.ChunkStorageMetadata(S(offsets), S(sizes))
def example():
    return M.Metadata(
        state_dict_metadata={
            'model.net.weight': M.TensorStorageMetadata(
                M.TensorProperties(torch.bfloat16), S((5, 6)),
                [chunk((0, 0), (3, 6)), chunk((3, 0), (2, 6))]),
            'optimizer_0.state.step': M.TensorStorageMetadata(
                M.TensorProperties(torch.float32), S(()), [chunk((), ())]),
            'optimizer_0.param_groups.0.lr': M.BytesStorageMetadata(),
        },
        planner_data={
            'model.net.weight': ('model', 'net.weight'),
            'optimizer_0.state.step': ('optimizer_0', 'state', 'step'),
            'optimizer_0.param_groups.0.lr': ('optimizer_0', 'param_groups', 0, 'lr'),
        },
        storage_data={
            M.MetadataIndex('model.net.weight', S((0, 0)), 0): _StorageInfo('__0_0.distcp', 0, 1500),
            M.MetadataIndex('model.net.weight', S((3, 0)), 1): _StorageInfo('__1_0.distcp', 64, 1500),
            M.MetadataIndex('optimizer_0.state.step', S(()), 0): _StorageInfo('__1_0.distcp', 1600, 1400),
            M.MetadataIndex('optimizer_0.param_groups.0.lr'): _StorageInfo('__0_0.distcp', 1536, 1000),
        },
        storage_meta=None, version='1.0.0')
folder = sys.argv[1] + '/'

from torch.distributed.checkpoint import FileSystemReader
read = FileSystemReader(folder + 'ours').read_metadata()
read.storage_meta = None  # where it was read from
assert read == example(), read
index = {key.fqn + str(key.offset): key.index for key in read.storage_data}
assert index['model.net.weighttorch.Size([3, 0])'] == 1, index
assert list(read.planner_data) == list(example().planner_data)
print('equal')

for protocol in (2, 3, 4, 5):
    with open(folder + str(protocol), 'wb') as file:
        metadata = example()
        metadata.storage_meta = M.StorageMeta(checkpoint_id=__import__('pathlib').Path('/x'))
        pickle.dump(metadata, file, protocol=protocol)

# A replica twice, an empty shard with an item of its own, wrong numbers of chunks as hints, and an
# order of the values that is not that of the tree.
metadata = example()
metadata.state_dict_metadata = dict(reversed(metadata.state_dict_metadata.items()))
weight = metadata.state_dict_metadata['model.net.weight']
weight.chunks.insert(1, weight.chunks[0])
weight.chunks.append(chunk((5, 0), (0, 6)))
place = metadata.storage_data
place[M.MetadataIndex('model.net.weight', S((5, 0)), 3)] = _StorageInfo('__2_0.distcp', 0, 1000)
pickle.dump(metadata, open(folder + 'odd', 'wb'))

metadata = example()
metadata.planner_data = None
pickle.dump(metadata, open(folder + 'flat', 'wb'))

def broken(name, change):
    metadata = example()
    change(metadata)
    pickle.dump(metadata, open(folder + name, 'wb'))
def transform(m):
    m.storage_data[M.MetadataIndex('model.net.weight', S((0, 0)), 0)].transform_descriptors = ['zstd']
def no_transform(m):
    m.storage_data[M.MetadataIndex('model.net.weight', S((0, 0)), 0)].transform_descriptors = []
def sparse(m): m.state_dict_metadata['model.net.weight'].properties.layout = torch.sparse_coo
def quantized(m): m.state_dict_metadata['model.net.weight'].properties.dtype = torch.qint8
def place(m): m.storage_data[M.MetadataIndex('model.net.weight', S((0, 0)), 0)] = 'here'
def entry(m): m.state_dict_metadata['more'] = 7
def storage(m): m.storage_data = None
broken('transform', transform)
broken('no_transform', no_transform)
broken('sparse', sparse)
broken('quantized', quantized)
broken('place', place)
broken('entry', entry)
broken('storage', storage)
pickle.dump({'model': 1}, open(folder + 'dict', 'wb'))

# A thousand tensors with one list of ten thousand chunks between them.
metadata = example()
one = M.TensorStorageMetadata(M.TensorProperties(torch.float32), S((1,) * 60), [])
one.chunks = [chunk((0,) * 60, (1,) * 60)] * 10000
metadata.state_dict_metadata.update({str(i): one for i in range(1000)})
pickle.dump(metadata, open(folder + 'chunks', 'wb'))
metadata = example()
metadata.planner_data['model.net.weight'] = ('x' * 100000,) * 250
pickle.dump(metadata, open(folder + 'path', 'wb'))
metadata.planner_data['model.net.weight'] = ('x',) * 300
pickle.dump(metadata, open(folder + 'deep', 'wb'))
)";

struct PythonFolder {
  TempDir dir;
  std::string said;

  PythonFolder() {
    make_directories(dir.path("ours"));
    write_file(dir.path("ours/.metadata"), example().to_pickle());
    said = run_python(kScript, {dir.path()});
  }
  DcpMetadata read(const std::string& name) const {
    return DcpMetadata::parse(read_file(dir.path(name)));
  }
  std::string error(const std::string& name) const {
    return error_of([&] { read(name); });
  }
};

const PythonFolder& python() {
  static const PythonFolder folder;
  return folder;
}

}  // namespace

TEST_CASE("Python reads metadata of ours as the objects that it would make", "[checkpoint]") {
  CHECK(python().said == "equal\n");
}

TEST_CASE("metadata of Python's pickles is read, whatever their protocol", "[checkpoint]") {
  const auto read = [](const std::string& name) { return python().read(name); };
  const auto error = [](const std::string& name) { return python().error(name); };

  const std::string expected = example().to_pickle();
  for (const char* protocol : {"2", "3", "4", "5"}) CHECK(read(protocol).to_pickle() == expected);
  CHECK(read("no_transform").to_pickle() == expected);

  const auto odd = read("odd");
  CHECK(odd.items[0].fqn == "model.net.weight");  // as in the tree
  REQUIRE(odd.items[0].chunks.size() == 3);       // the replica counts once
  CHECK(odd.items[0].chunks[0].place.file == "__0_0.distcp");
  CHECK(odd.items[0].chunks[1].place.file == "__1_0.distcp");
  CHECK(odd.items[0].chunks[2].sizes == Sizes{0, 6});
  CHECK(odd.items[0].chunks[2].place.file.empty());
  CHECK(odd.find("optimizer_0.state.step")->sizes.empty());
  CHECK(odd.find("optimizer_0") == nullptr);
  CHECK(read("flat").items[0].path.empty());
  CHECK(again(read("flat")).items[2].path.empty());

  CHECK_THAT(error("transform"), Contains("\"model.net.weight\"") && Contains("zstd") &&
                                     Contains("Save without _extensions"));
  CHECK_THAT(error("sparse"), Contains("torch.sparse_coo"));
  CHECK_THAT(error("quantized"), Contains("torch.qint8"));
  CHECK_THAT(error("place"), Contains("the place of \"model.net.weight\" is a str"));
  CHECK_THAT(error("entry"), Contains("\"more\" is an int"));
  CHECK_THAT(error("storage"), Contains("`storage_data` is nothing, expected a dict"));
  CHECK_THAT(error("dict"), Contains("it holds a dict, expected a "
                                     "torch.distributed.checkpoint.metadata.Metadata"));
}

TEST_CASE("chunks of a tensor are refused unless they fill it once", "[checkpoint]") {
  const auto error = [](const Sizes& sizes, const std::vector<std::pair<Sizes, Sizes>>& chunks) {
    return error_of(tensor_of(sizes, chunks));
  };
  SECTION("a grid, a brick wall, an empty tensor and a scalar are whole") {
    CHECK(error({4, 6}, {{{0, 0}, {2, 3}}, {{0, 3}, {2, 3}}, {{2, 0}, {2, 3}}, {{2, 3}, {2, 3}}}) ==
          "no error");
    CHECK(error({4, 6}, {{{0, 0}, {2, 4}}, {{0, 4}, {2, 2}}, {{2, 0}, {2, 1}}, {{2, 1}, {2, 5}}}) ==
          "no error");
    CHECK(error({0, 3}, {}) == "no error");
    CHECK(error({0, 3}, {{{0, 0}, {0, 3}}}) == "no error");
    CHECK(error({}, {{{}, {}}}) == "no error");
    CHECK(error({1, 4}, {{{0, 0}, {1, 4}}, {{1, 0}, {0, 4}}}) == "no error");
  }
  SECTION("a hole is told by its first element") {
    CHECK_THAT(
        error({5, 6}, {{{0, 0}, {3, 6}}}),
        Contains("no chunk of the tensor \"w\" of shape [5, 6] holds its element at [3, 0]"));
    CHECK_THAT(error({5, 6}, {}), Contains("holds its element at [0, 0]"));
    CHECK_THAT(error({}, {}), Contains("holds its element at []"));
    CHECK_THAT(error({4, 6}, {{{0, 0}, {2, 6}}, {{2, 0}, {2, 3}}, {{3, 3}, {1, 3}}}),
               Contains("at [2, 3]"));
  }
  SECTION("so is an overlap, also where the number of elements is right") {
    CHECK_THAT(error({5, 6}, {{{0, 0}, {3, 6}}, {{2, 0}, {3, 6}}}),
               Contains("chunks of the tensor \"w\" of shape [5, 6] overlap at [2, 0]"));
    CHECK_THAT(error({4, 4}, {{{0, 0}, {2, 4}}, {{1, 0}, {2, 4}}}), Contains("overlap at [1, 0]"));
    CHECK_THAT(error({2, 4}, {{{0, 0}, {2, 2}}, {{0, 1}, {2, 2}}}), Contains("overlap at [0, 1]"));
  }
  SECTION("a chunk lies in its tensor") {
    for (const auto& [offsets, sizes] :
         std::vector<std::pair<Sizes, Sizes>>{{{3, 0}, {3, 6}},
                                              {{-1, 0}, {5, 6}},
                                              {{0, 0}, {5, -6}},
                                              {{0}, {5}},
                                              {{0, 0}, {5}},
                                              {{1, 0}, {INT64_MAX, 6}},
                                              {{INT64_MAX, 0}, {1, 6}},
                                              {{6, 0}, {0, 6}}}) {
      auto metadata = tensor_of({5, 6}, {{{0, 0}, {5, 6}}});
      metadata.items[0].chunks[0].offsets = offsets;
      metadata.items[0].chunks[0].sizes = sizes;
      CHECK_THAT(error_of(metadata), Contains("which does not lie in it"));
    }
  }
  SECTION("a shape can be counted") {
    auto metadata = tensor_of({5, 6}, {{{0, 0}, {5, 6}}});
    for (const Sizes& sizes :
         {Sizes{int64_t{1} << 62, 4}, Sizes{-1, 6}, Sizes{0, INT64_MAX, INT64_MAX}}) {
      metadata.items[0].sizes = sizes;
      CHECK_THAT(error_of(metadata), Contains("impossible shape"));
    }
    metadata.items[0].sizes = Sizes(65, 1);
    CHECK_THAT(error_of(metadata), Contains("expected a torch.Size of at most 64 ints"));
  }
}

TEST_CASE("random cuts of a tensor are whole, and are not with one chunk less or moved",
          "[checkpoint]") {
  std::mt19937 random(7);
  const auto upto = [&](int64_t most) { return static_cast<int64_t>(random() % (most + 1)); };
  for (int round = 0; round < 300; ++round) {
    const size_t dims = 1 + round % 4;
    Sizes sizes;
    for (size_t d = 0; d < dims; ++d) sizes.push_back(1 + upto(6));
    std::vector<std::pair<Sizes, Sizes>> chunks = {{Sizes(dims, 0), sizes}};
    for (int cut = 0; cut < 12; ++cut) {
      const auto i = static_cast<size_t>(upto(static_cast<int64_t>(chunks.size()) - 1));
      const auto d = static_cast<size_t>(upto(static_cast<int64_t>(dims) - 1));
      const int64_t length = chunks[i].second[d];
      if (length < 2) continue;
      auto other = chunks[i];
      const int64_t at = 1 + upto(length - 2);
      chunks[i].second[d] = at;
      other.first[d] += at;
      other.second[d] -= at;
      chunks.push_back(other);
    }
    CHECK(error_of(tensor_of(sizes, chunks)) == "no error");
    const auto victim = static_cast<size_t>(upto(static_cast<int64_t>(chunks.size()) - 1));
    auto fewer = chunks;
    fewer.erase(fewer.begin() + static_cast<std::ptrdiff_t>(victim));
    CHECK_THAT(error_of(tensor_of(sizes, fewer)), Contains("holds its element"));
    auto moved = chunks;
    const size_t d = 0;
    moved[victim].first[d] += moved[victim].first[d] > 0 ? -1 : 1;
    CHECK(error_of(tensor_of(sizes, moved)) != "no error");
  }
}

TEST_CASE("a tensor of very many chunks is checked without comparing each with each",
          "[checkpoint]") {
  constexpr int64_t kSide = 100;
  std::vector<std::pair<Sizes, Sizes>> chunks;
  for (int64_t i = 0; i < kSide * kSide; ++i) chunks.push_back({{i / kSide, i % kSide}, {1, 1}});
  std::shuffle(chunks.begin(), chunks.end(), std::mt19937(1));
  CHECK(error_of(tensor_of({kSide, kSide}, chunks)) == "no error");  // 5e7 pairs
  // All of them begin at one place, so a sweep would keep them all.
  for (auto& [offsets, sizes] : chunks) {
    sizes = {offsets[0] + 1, offsets[1] + 1};
    offsets = {0, 0};
  }
  CHECK_THAT(error_of(tensor_of({kSide, kSide}, chunks)), Contains("overlap at [0, 0]"));
  // Every dim split doubles the corners.
  Sizes most(24, 2), begin(24, 0), one(24, 1);
  CHECK_THAT(error_of(tensor_of(most, {{begin, one}})), Contains("is split along 24 dims"));
}

TEST_CASE("places that cannot be are refused with the item's name", "[checkpoint]") {
  auto metadata = example();
  auto& place = metadata.items[0].chunks[0].place;
  SECTION("a file outside the folder") {
    for (const std::string& file : {std::string("../x"), std::string("/etc/passwd"),
                                    std::string(".."), std::string("."), std::string("a\0b", 3)}) {
      place.file = file;
      CHECK_THAT(error_of(metadata), Contains("\"model.net.weight\" is said to be in") &&
                                         Contains("no name of a file in the folder"));
    }
    place.file = std::string(256, 'x');
    CHECK_THAT(error_of(metadata), Contains("a file with a name of 256 bytes"));
  }
  SECTION("no file") {
    place.file.clear();
    CHECK_THAT(error_of(metadata), Contains("\"model.net.weight\" has no file that holds it"));
  }
  SECTION("an item that is shorter than its tensor") {
    place.bytes = 35;
    CHECK_THAT(error_of(metadata), Contains("36 bytes in an item of 35 bytes of __0_0.distcp"));
  }
  SECTION("numbers below zero") {
    place.offset = uint64_t{1} << 63;
    CHECK_THAT(error_of(metadata), Contains("is no number of bytes"));
  }
  SECTION("items that share bytes, which would give a small folder any size") {
    metadata.items[1].chunks[0].place.offset = 64 + 1499;
    CHECK_THAT(error_of(metadata), Contains("\"model.net.weight\" and \"optimizer_0.state.step\" "
                                            "overlap in __1_0.distcp at 1563"));
  }
}

TEST_CASE("lists that a pickle repeats by reference do not fill the memory", "[checkpoint]") {
  const auto error = [](const std::string& name) { return python().error(name); };

  CHECK_THAT(error("chunks"), Contains("repeats its lists"));
  CHECK_THAT(error("path"), Contains("repeats its lists"));
  CHECK_THAT(error("deep"), Contains("has 300 parts, more than 256"));
}

TEST_CASE("what the ranks wrote is put together, replicas once", "[checkpoint]") {
  auto first = example();
  auto second = example();
  first.items[0].chunks.pop_back();
  second.items[0].chunks.erase(second.items[0].chunks.begin());
  second.items[1].chunks[0].place = {"__2_0.distcp", 0, 1400};
  second.items.pop_back();  // values are written by rank 0 alone
  auto parts = first.items;
  parts.insert(parts.end(), second.items.begin(), second.items.end());

  CHECK(DcpMetadata::merge(parts).to_pickle() == example().to_pickle());

  SECTION("ranks that disagree are told apart") {
    parts[3].dtype = DType::kFloat32;
    CHECK_THAT(error_of([&] { DcpMetadata::merge(parts); }),
               Contains("the ranks disagree on the tensor \"model.net.weight\": bfloat16 [5, 6] "
                        "and float32 [5, 6]"));
  }
  SECTION("a rank that is missing leaves a hole") {
    CHECK_THAT(error_of([&] { DcpMetadata::merge(first.items); }),
               Contains("no chunk of the tensor \"model.net.weight\""));
  }
  SECTION("a value is written once") {
    parts.push_back(parts[2]);
    CHECK_THAT(error_of([&] { DcpMetadata::merge(parts); }),
               Contains("\"optimizer_0.param_groups.0.lr\" is no tensor on one rank"));
  }
}

TEST_CASE("mutated metadata is an error or metadata, never more", "[checkpoint]") {
  const std::string good = example().to_pickle();
  std::mt19937 random(3);
  int errors = 0;
  for (int round = 0; round < 4000; ++round) {
    std::string bytes = good;
    for (uint32_t changes = 1 + random() % 4; changes > 0; --changes) {
      bytes[random() % bytes.size()] = static_cast<char>(random());
    }
    if (random() % 8 == 0) bytes.resize(random() % bytes.size());
    errors += error_of([&] { DcpMetadata::parse(bytes); }) != "no error" ? 1 : 0;
  }
  CHECK(errors > 1000);
}
