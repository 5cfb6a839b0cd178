#include "lightning/checkpoint/torch_archive.h"

#include <unistd.h>

#include <catch2/catch.hpp>
#include <fstream>
#include <iterator>
#include <random>
#include <sstream>
#include <unordered_set>

#include "lightning/errors.h"
#include "tests/support/python.h"
#include "tests/support/temp_dir.h"

using Catch::Matchers::Contains;
using namespace lightning;
using lightning::testing::run_python;
using lightning::testing::TempDir;
using Kind = PickleNode::Kind;

namespace {

// Saves tensors of all kinds and says what each is; then files whose tensors claim what does not
// hold, each in a zip that is whole.
constexpr const char* kFiles = R"py(
import collections, io, os, pickle, sys, warnings, zipfile
import torch
warnings.simplefilter("ignore")
folder = sys.argv[1]
u = torch._utils

class Sub(torch.Tensor):
    pass
base = torch.arange(12.0)
z = torch.tensor([1 + 2j, 3 - 4j])
marked = torch.ones(2); marked.note = "n"
parameter = torch.nn.Parameter(torch.ones(2, 2)); noted = torch.nn.Parameter(torch.ones(3)); noted.note = "n"
names = ("float32 float64 float16 bfloat16 int64 int32 int16 int8 uint8 uint16 uint32 uint64 bool complex32 "
         "complex64 complex128 float8_e4m3fn float8_e5m2 float8_e4m3fnuz float8_e5m2fnuz float8_e8m0fnu").split()
tensors = [torch.arange(6).reshape(2, 3).to(torch.float32).to(getattr(torch, n)) if n != "complex32"
           else torch.zeros(2, 3, dtype=torch.complex32) for n in names] + [
    torch.tensor(1.5), torch.empty(0), torch.empty(0, 3), torch.empty(2, 0, 3), base, base[3:7], base[::3],
    base.reshape(3, 4).t(), base.reshape(3, 4)[1:, 2:], base[5:5], base[:1].expand(1000, 1000), torch.empty(()),
    base.as_strided((2, 2), (1, 1), 3), torch.zeros([1] * 64), torch.zeros(2, requires_grad=True),
    z.conj(), torch._neg_view(torch.ones(2)), torch.ones(1).as_subclass(Sub), marked, parameter, noted,
    torch.nn.Parameter(torch.ones(1), requires_grad=False), torch.nn.Parameter(torch.ones(1).as_subclass(Sub)),
    torch.nn.Buffer(torch.ones(2)), torch.ones(3).as_subclass(Sub).conj(), torch.ones(2, dtype=torch.uint16)[1:],
]
torch.save(tensors, f"{folder}/tensors.pt")
for t in tensors:
    name = str(t.dtype).split(".")[1]
    with torch._C.DisableTorchFunctionSubclass():
        print(name, list(t.shape), list(t.stride()), t.storage_offset(), t.untyped_storage().nbytes(),
              int(t.requires_grad), int(isinstance(t, torch.nn.Parameter)), int(t.is_conj()), int(t.is_neg()),
              bytes(t.untyped_storage()).hex())
others = [torch.ones(2, 2).to_sparse(), torch.ones(2, 2).to_sparse_csr(), torch.empty(2, device="meta"),
          torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8), torch.nested.nested_tensor([torch.ones(1)]),
          torch.ones(1).storage(), torch.ones(1).untyped_storage(), torch.float32, [torch.ones(1)], None, "t",
          torch.nn.Linear(1, 1), torch.nn.Parameter(torch.empty(2, device="meta"))]
torch.save(others, f"{folder}/others.pt")

torch.save(tensors[:2], f"{folder}/legacy.pt", _use_new_zipfile_serialization=False)
torch.jit.script(torch.nn.Linear(1, 1)).save(f"{folder}/script.pt")
with zipfile.ZipFile(f"{folder}/other.pt", "w") as file: file.writestr("archive/readme", "hello")

class Call:
    def __init__(self, *parts): self.parts = parts
    def __reduce__(self): return self.parts
class Id:
    def __init__(self, *parts): self.parts = parts
class Pickler(pickle.Pickler):
    def persistent_id(self, value): return (value.parts[0] if len(value.parts) == 1 else value.parts) if type(value) is Id else None
def write(name, root):
    text = io.BytesIO(); Pickler(text, 2).dump(root)
    with zipfile.ZipFile(f"{folder}/{name}.pt", "w") as file:
        file.writestr("archive/data.pkl", text.getvalue() if root is not Ellipsis else b"\x80\x02]i.")
        file.writestr("archive/data/0", bytes(range(16)))
def storage(kind=torch.FloatStorage, numel=4, key="0"): return Id("storage", kind, key, "cpu", numel)
def v2(*args): return Call(u._rebuild_tensor_v2, args + (storage(), 0, (4,), (1,), False, None)[len(args):])
def v3(*args): return Call(u._rebuild_tensor_v3,
    args + (storage(torch.UntypedStorage, 16), 0, (4,), (1,), False, None, torch.uint32)[len(args):])
s = storage()
cases = {
  "good": v2(), "good3": v3(), "good1": Call(u._rebuild_tensor, (s, 1, (3,), (1,))),
  "size": v2(s, 0, torch.Size([2, 2]), (2, 1)), "none": v2(s, 2**60, (0,), (1,)),
  "repeated": v2(s, 0, (2**31, 2**29), (0, 0)),
  "long storage": v2(storage(numel=5)), "huge storage": v2(storage(numel=2**62)),
  "long bytes": v3(storage(torch.UntypedStorage, 17)),
  "big size": v2(s, 0, (5,), (1,)), "big offset": v2(s, 1), "far offset": v2(s, 2**63 - 1),
  "negative stride": v2(s, 3, (4,), (-1,)), "negative size": v2(s, 0, (-4,), (1,)), "negative offset": v2(s, -1),
  "negative storage": v2(storage(numel=-1)), "wide stride": v2(s, 0, (2,), (4,)),
  "overflow": v2(s, 0, (2**32, 2**32), (0, 0)), "overflow bytes": v2(s, 0, (2**61,), (0,)),
  "overflow strides": v2(s, 0, (3,), (2**62,)), "overflow beside none": v2(s, 0, (0, 2**62, 2**62), (1, 1, 1)),
  "odd dims": v2(s, 0, (2, 2), (1,)), "many dims": v2(s, 0, (1,) * 65, (1,) * 65),
  "big int": v2(s, 2**70), "float size": v2(s, 0, (4.0,), (1,)), "bool size": v2(s, 0, (True,), (1,)),
  "list size": v2(s, 0, [4], (1,)), "no key": v2(storage(key="1")), "odd key": v2(storage(key="00")),
  "path key": v2(storage(key="../data/0")), "int key": v2(storage(key=0)),
  "no id": v2(None), "short id": v2(Id("storage", torch.FloatStorage, "0", "cpu")), "int id": v2(Id(5)),
  "module id": v2(Id("module", torch.FloatStorage, "0", "cpu", 4)),
  "odd class": v2(storage(torch.QInt8Storage)), "odd module": v2(storage(collections.OrderedDict)),
  "untyped 2": v2(storage(torch.UntypedStorage, 16)), "typed 3": v3(storage()),
  "odd dtype": v3(storage(torch.UntypedStorage, 16), 0, (4,), (1,), False, None, torch.qint8),
  "int dtype": v3(storage(torch.UntypedStorage, 16), 0, (4,), (1,), False, None, 5),
  "int flag": v2(s, 0, (4,), (1,), 1, None), "few": Call(u._rebuild_tensor_v2, (s, 0, (4,), (1,))),
  "many": v2(s, 0, (4,), (1,), False, None, None, None), "many1": Call(u._rebuild_tensor, (s, 0, (4,), (1,), False)),
  "list metadata": v2(s, 0, (4,), (1,), False, None, []), "odd metadata": v2(s, 0, (4,), (1,), False, None, {"x": True}),
  "real conjugate": v2(s, 0, (4,), (1,), False, None, {"conj": True}),
  "int gradient": v2(storage(torch.IntStorage), 0, (4,), (1,), True, None),
  "int parameter": Call(u._rebuild_parameter, (v2(storage(torch.IntStorage)), True, None)),
  "odd parameter": Call(u._rebuild_parameter, (v2(), None, None)),
  "parameter twice": Call(u._rebuild_parameter, (Call(u._rebuild_parameter, (v2(), True, None)), True, None)),
  "parameter of none": Call(u._rebuild_parameter, (None, True, None)),
  "attributes": Call(u._rebuild_tensor_v2, v2().parts[1], {"a": 1}),
  "torn pickle": Ellipsis,
}
for name, root in cases.items(): write(name, root)
)py";

struct Files {
  TempDir dir;
  std::string said;
  Files() : said(run_python(kFiles, {dir.path()})) {}
};

const Files& files() {
  static const Files made;
  return made;
}

TorchArchive open(const std::string& name) {
  return TorchArchive(MappedFile::open(files().dir.path(name)), true);
}

std::string list(const std::vector<int64_t>& values) {
  std::string out;
  for (const auto value : values) out += (out.empty() ? "" : ", ") + str(value);
  return "[" + out + "]";
}

// As the script prints it.
std::string words(const TensorRecord& record, const ZipReader& zip) {
  std::string bytes;
  for (const char c : zip.data(*record.storage)) {
    bytes += "0123456789abcdef"[static_cast<uint8_t>(c) >> 4];
    bytes += "0123456789abcdef"[c & 15];
  }
  return str(info(record.dtype).torch_name, " ", list(record.sizes), " ", list(record.strides), " ",
             record.storage_offset, " ", record.storage_bytes, " ", record.requires_grad, " ",
             record.is_parameter, " ", record.conjugate, " ", record.negative, " ", bytes);
}

std::string error_of(const std::string& name) {
  try {
    const auto archive = open(name);
    if (!TorchArchive::is_tensor(archive.root())) return "no tensor";
    archive.record(archive.root());
  } catch (const CheckpointError& error) {
    return error.what();
  }
  return "no error";
}

// Asks for every tensor there is; nodes are visited once.
size_t read_all(const TorchArchive& archive) {
  size_t tensors = 0;
  std::vector<const PickleNode*> waiting = {&archive.root()};
  std::unordered_set<const PickleNode*> seen;
  while (!waiting.empty()) {
    const auto* node = waiting.back();
    waiting.pop_back();
    if (!seen.insert(node).second) continue;
    if (TorchArchive::is_tensor(*node)) {
      archive.record(*node);
      ++tensors;
    }
    waiting.insert(waiting.end(), node->items.begin(), node->items.end());
    if (const auto* added = node->additions) {
      waiting.insert(waiting.end(), added->items.begin(), added->items.end());
      waiting.insert(waiting.end(), added->entries.begin(), added->entries.end());
      if (added->state != nullptr) waiting.push_back(added->state);
    }
  }
  return tensors;
}

}  // namespace

TEST_CASE("tensors of every kind that torch.save writes claim what they are", "[checkpoint]") {
  const auto archive = open("tensors.pt");
  std::istringstream said(files().said);
  REQUIRE(archive.root().kind == Kind::kList);
  CHECK(archive.root().items.size() == 47);
  size_t i = 0;
  for (std::string line; std::getline(said, line); ++i) {
    REQUIRE(i < archive.root().items.size());
    const auto& node = *archive.root().items[i];
    INFO("tensor " << i);
    REQUIRE(TorchArchive::is_tensor(node));
    CHECK(words(archive.record(node), archive.zip()) == line);
  }
  CHECK(i == archive.root().items.size());
}

TEST_CASE("tensors that share a storage have one record", "[checkpoint]") {
  const auto archive = open("tensors.pt");
  const auto record = [&](size_t i) { return archive.record(*archive.root().items[i]); };
  CHECK(record(25).storage == record(26).storage);
  CHECK(record(25).storage == record(27).storage);
  CHECK(record(25).storage != record(0).storage);
}

TEST_CASE("what is no strided tensor stays an object", "[checkpoint]") {
  const auto archive = open("others.pt");
  for (const auto* node : archive.root().items) {
    CHECK_FALSE(TorchArchive::is_tensor(*node));
    CHECK_THROWS_WITH(archive.record(*node), Contains("what should be a tensor is none"));
  }
  CHECK(archive.root().items[0]->is_made_by("torch._utils", "_rebuild_sparse_tensor"));
}

TEST_CASE("files of other formats are told apart", "[checkpoint]") {
  CHECK_THROWS_WITH(open("legacy.pt"), Contains("legacy.pt") && Contains("before torch 1.6") &&
                                           Contains("save it again"));
  CHECK_THROWS_WITH(open("script.pt"), Contains("script.pt") && Contains("TorchScript"));
  CHECK_THROWS_WITH(open("other.pt"), Contains("other.pt") && Contains("without data.pkl"));
  CHECK_THROWS_WITH(
      open("torn pickle.pt"),
      Contains("data.pkl of ") && Contains("torn pickle.pt: the pickle has the opcode "
                                           "INST at byte 3, which is refused"));
}

TEST_CASE("unusual claims that hold are taken", "[checkpoint]") {
  for (const auto* name :
       {"good.pt", "good1.pt", "good3.pt", "size.pt", "none.pt", "repeated.pt"}) {
    INFO(name);
    CHECK(error_of(name) == "no error");
  }
  for (const auto* name : {"parameter twice.pt", "parameter of none.pt", "attributes.pt"}) {
    INFO(name);
    CHECK(error_of(name) == "no tensor");
  }
}

TEST_CASE("a tensor that claims what does not hold is refused with what it claims",
          "[checkpoint]") {
  const std::vector<std::pair<std::string, std::string>> cases = {
      {"long storage", "claims a storage of 5 elements of 4 bytes, but its record has 16 bytes"},
      {"huge storage", "claims a storage of 4611686018427387904 elements of 4 bytes"},
      {"long bytes", "claims a storage of 17 elements of 1 bytes, but its record has 16"},
      {"big size",
       "ends at byte 20 of its storage, which has 16: sizes [5], strides [1], offset 0"},
      {"big offset",
       "ends at byte 20 of its storage, which has 16: sizes [4], strides [1], offset 1"},
      {"far offset", "overflows 64 bits: sizes [4], strides [1], offset 9223372036854775807"},
      {"negative stride", "has the stride -1, expected 0 or more"},
      {"negative size", "has the size -4, expected 0 or more"},
      {"negative offset", "has the offset -1, expected 0 or more"},
      {"negative storage", "has the storage length -1"},
      {"wide stride", "ends at byte 20 of its storage"},
      {"overflow", "overflows 64 bits: sizes [4294967296, 4294967296]"},
      {"overflow bytes", "overflows 64 bits: sizes [2305843009213693952]"},
      {"overflow strides", "overflows 64 bits: sizes [3], strides [4611686018427387904]"},
      {"overflow beside none", "overflows 64 bits"},
      {"odd dims", "has 2 sizes and 1 strides"},
      {"many dims", "has 65 dims, at most 64 are possible"},
      {"big int", "has no int of 64 bits as its offset"},
      {"float size", "has no int of 64 bits as its size"},
      {"bool size", "has no int of 64 bits as its size"},
      {"list size", "has a size that is no tuple"},
      {"no key", "the tensor of storage \"1\" has no record data/\"1\" in the file"},
      {"odd key", "has no record data/\"00\" in the file"},
      {"path key", "has no record data/\"../data/0\" in the file"},
      {"int key", "has a storage that is not (\"storage\", class, key, location, elements)"},
      {"no id", "a tensor has no storage where its first argument is"},
      {"short id", "has a storage that is not (\"storage\", class"},
      {"int id", "has a storage that is not (\"storage\", class"},
      {"module id", "has a storage that is not (\"storage\", class"},
      {"odd class", "has a storage of the unknown class \"QInt8Storage\""},
      {"odd module", "has a storage of the unknown class \"OrderedDict\""},
      {"untyped 2", "has an UntypedStorage and no dtype"},
      {"typed 3", "has a dtype beside that of its storage"},
      {"odd dtype", "has the unknown dtype \"qint8\""},
      {"int dtype", "has the unknown dtype \"\""},
      {"int flag", "has a requires_grad that is no bool"},
      {"few", "has 4 arguments, expected 6"},
      {"many", "has 8 arguments, expected 6"},
      {"many1", "has 5 arguments, expected 4"},
      {"list metadata", "has metadata that is no dict"},
      {"odd metadata", "has the unknown metadata \"x\""},
      {"real conjugate", "is a conjugate of float32"},
      {"int gradient", "requires gradients and is of int32"},
      {"int parameter", "requires gradients and is of int32"},
      {"odd parameter", "has a requires_grad that is no bool"},
  };
  for (const auto& [name, expected] : cases) {
    const auto error = error_of(name + ".pt");
    INFO(name);
    CHECK_THAT(error, Contains(expected) && Contains("Cannot read ") && Contains(name + ".pt: "));
  }
}

TEST_CASE("mutated files are read or refused, and nothing else", "[checkpoint]") {
  std::ifstream file(files().dir.path("tensors.pt"), std::ios::binary);
  const std::string content(std::istreambuf_iterator<char>(file), {});
  const auto pickle = content.find("\x80\x02]q");
  REQUIRE(pickle < 1000);
  const auto path = files().dir.path("mutant.pt");
  std::mt19937 random(2);
  size_t refused = 0;
  for (int i = 0; i < 1500; ++i) {
    auto mutant = content;
    // Most changes in the pickle, others anywhere (the directory is the last third).
    for (size_t changes = 1 + random() % 3; changes > 0; --changes) {
      const size_t at = i % 4 == 0 ? random() % mutant.size() : pickle + random() % 7000;
      mutant[at] = static_cast<char>(random() % 2 == 0 ? random() : mutant[random() % 7000]);
    }
    if (i % 10 == 0) mutant.resize(random() % mutant.size());
    // A file that is mapped keeps its content while the next takes its name.
    unlink(path.c_str());
    std::ofstream(path, std::ios::binary) << mutant;
    try {
      read_all(TorchArchive(MappedFile::open(path), i % 8 == 0));
    } catch (const CheckpointError&) {
      ++refused;
    }
  }
  CHECK(refused > 500);
  CHECK(read_all(open("tensors.pt")) >= 47);
}
