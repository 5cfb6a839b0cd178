#include "lightning/checkpoint/torch_file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <torch/types.h>
#include <unistd.h>

#include <catch2/catch.hpp>
#include <cmath>
#include <functional>
#include <limits>
#include <nlohmann/json.hpp>

#include "lightning/checkpoint/pickle_writer.h"
#include "lightning/checkpoint/zip_writer.h"
#include "lightning/errors.h"
#include "lightning/files.h"
#include "tests/support/python.h"
#include "tests/support/temp_dir.h"

using Catch::Matchers::Contains;
using Catch::Matchers::StartsWith;
using namespace lightning;
using lightning::testing::run_python;
using lightning::testing::TempDir;
using Json = nlohmann::ordered_json;
using How = State::Object::How;

namespace {

// Odd contents. `cases` go both ways; `plain` of them hold no tensor; `whole` come back with
// weights_only=False alone; `foreign` are read, and refused when they are written.
const char* const kCases = R"(
import argparse, collections, datetime, decimal, fractions, json, math, pathlib, struct, sys, types, uuid
import zipfile
from collections import Counter, OrderedDict, defaultdict, deque
import numpy as np
import torch
from torch import nn

class Sub(torch.Tensor):
    pass

class Bag(dict):
    pass

class Point:
    def __init__(self):
        self.x, self.y = 1, torch.ones(2)

def plain_cases():
    nan = math.nan
    deep = []
    for i in range(200):
        deep = [deep] if i % 2 else (deep,)
    return {
        "none": None,
        "bools": [True, False],
        "ints": [0, 1, -1, 255, 256, 65535, 65536, 2**31 - 1, -2**31, 2**31, 2**40, -2**40],
        "ints of 64 bits": [2**63 - 1, -2**63, 2**62, -2**62 - 1],
        "big ints": [2**63, -2**63 - 1, 2**64, 2**70, -2**70, 2**2000, -2**2000, 10**500],
        "floats": [0.0, -0.0, 1.5, math.inf, -math.inf, 5e-324, 2.2e-308, 1e300, 0.1, 1e16, 1e-5],
        "complex": [1 + 2j, complex(0, -0.0), complex(-0.0, math.inf), 0j, 1e20j],
        "texts": ["", "a", "it's", '"', "'\"", "\n\t\r\\", "\x00\x7f\x80", "größe", "大きさ", "😀",
                  "\u2028", "\ufeff", "عربى"],
        "a text of 300 bytes": "x" * 300,
        "a text of 70,000 bytes": ["ß" * 35000, "ß" * 35000],
        "a lone surrogate": ["\udc80.txt"],
        "bytes": [b"", b"a", bytes(range(256)), b"it's", bytearray(b""), bytearray(b"\xff\x00")],
        "tuples": [(), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), ((), ((),)), ([], {})],
        "empty": [[], {}, (), set(), OrderedDict(), "", b""],
        "sets": [{1}, {"a"}, {(1, 2)}, {None}, {2.5}],
        "deep": deep,
        "a long list": list(range(100000)),
        "a long tuple": tuple(range(70000)),
        "lists of 999 to 1001": [list(range(n)) for n in (2, 999, 1000, 1001, 2000, 2001)],
        "dicts of 999 to 1001": [{i: -i for i in range(n)} for n in (1, 2, 999, 1000, 1001, 2001)],
        "OrderedDicts of 999 to 1001": [OrderedDict((i, -i) for i in range(n))
                                        for n in (1, 2, 999, 1000, 1001, 2000, 2001)],
        "keys": {0: "int", -1: "negative", "0": "text", 1.5: "float", None: "none", (1, "a"): "tuple",
                 True: "bool", 2**80: "big", b"k": "bytes", (): "empty", 2j: "complex", math.inf: 1},
        "names": {"größe": 1, "大": {"き": [1]}, "😀": 2, "": 3, "a.b": 4, "ключ": 5, "\n": 6},
        "a Counter": Counter("aaabbc"),
        "an OrderedDict": OrderedDict([("z", 1), ("a", OrderedDict([("y", 2)]))]),
        "sizes": [torch.Size([2, 3]), torch.Size([])],
        "dtypes": [torch.float32, torch.bfloat16, torch.int64, torch.float8_e4m3fn, torch.bool,
                   torch.uint16, torch.complex32, torch.qint8],
        "devices": [torch.device("cpu"), torch.device("cuda", 1), torch.device("meta")],
        "memory that is shared": [[0.9, 0.999]] * 3,
    }

def whole_cases():
    return {
        "frozensets": [frozenset(), frozenset([1]), frozenset(["a"])],
        "an int of 300 bytes": [2**2400, -2**2400],
        "numpy scalars": [np.float64(0.1), np.float32(0.5), np.float16(-2), np.int8(-3), np.int16(4),
                          np.int32(-5), np.int64(2**40), np.uint8(255), np.uint16(1), np.uint32(2),
                          np.uint64(2**64 - 1), np.bool_(True), np.complex64(1j), np.complex128(2j),
                          np.str_("größe"), np.float64("nan"), np.dtype(">i4").type(7)],
        "numpy arrays": [np.arange(6.0).reshape(2, 3), np.zeros((0, 2)), np.array(3),
                         np.asfortranarray(np.ones((2, 2), np.int16)), np.array([1], ">i4")],
        "numpy dtypes": [np.dtype("f4"), np.dtype(">i8")],
    }

def tensor_cases():
    g = torch.Generator().manual_seed(0)
    cases = {}
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn,
                  torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz,
                  torch.float8_e8m0fnu, torch.complex32, torch.complex64, torch.complex128):
        size = torch.empty((), dtype=dtype).element_size()
        raw = torch.randint(0, 256, (3, 4 * size), generator=g, dtype=torch.uint8)
        cases[str(dtype)] = raw.view(dtype)
    for dtype in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16,
                  torch.uint32, torch.uint64):
        size = torch.empty((), dtype=dtype).element_size()
        raw = torch.randint(0, 256, (5 * size,), generator=g, dtype=torch.uint8)
        cases[str(dtype)] = raw.view(dtype)
    cases["torch.bool"] = torch.tensor([[True, False], [False, True]])
    base = torch.arange(24.0).view(2, 3, 4)
    shared = torch.arange(10)
    cases["shared storages"] = {"a": shared, "b": shared[2:5], "c": shared.view(2, 5), "d": shared[:0]}
    tied = nn.Parameter(torch.ones(3, 2))
    cases["tied parameters"] = {"in": tied, "out": tied, "data": tied.data, "view": tied.detach().t()}
    cases["one tensor twice"] = [base, {"again": base}, [base]]
    cases["transposed"] = base.transpose(0, 2)
    cases["stepped"] = base[:, ::2, 1::2]
    cases["expanded"] = torch.tensor([1.0, 2.0])[:1].expand(3, 4, 1)
    cases["as_strided"] = torch.as_strided(torch.arange(10.0), (3, 3), (2, 1), 1)
    cases["channels_last"] = torch.ones(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    cases["without elements"] = [torch.zeros(0), torch.zeros(0, 3), torch.zeros(2, 0, 4), base[:0],
                                 torch.zeros(0, dtype=torch.int64), base[2:]]
    cases["0-dim"] = [torch.tensor(3.5), torch.tensor(7), torch.tensor(True), base[1, 2, 3]]
    cases["64 dims"] = torch.ones([1] * 64)
    cases["in the middle of a long storage"] = torch.arange(100000.0)[500:504]
    cases["two parts of a long storage"] = [shared_long[1000:1010], shared_long[2000:2002].flip(0),
                                            shared_long[1500:1500]]
    cases["bytes in the middle"] = torch.arange(200, dtype=torch.uint8)[101:104]
    cases["a float in the middle, three bytes on"] = torch.arange(100.0)[3]
    complex_ = torch.tensor([[1 + 2j, 3 - 4j]])
    cases["conjugate"] = [complex_.conj(), complex_, complex_.mH]
    cases["negative"] = [complex_.conj().imag, complex_.conj().imag[0, 1:]]
    cases["requires_grad"] = [torch.ones(2, requires_grad=True), torch.ones(2)]
    cases["Parameters"] = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2), False),
                           nn.Parameter(base[:, 1]), nn.Parameter(torch.tensor([1, 2]), False)]
    noted = torch.ones(2)
    noted.note, noted.more = "größe", [torch.zeros(1), {"a": (1,)}]
    cases["a tensor with attributes"] = noted
    noted = nn.Parameter(torch.ones(2))
    noted.is_embedding = True
    cases["a Parameter with attributes"] = {"weight": noted}
    net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.ModuleList([nn.Conv2d(1, 2, 3)]))
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.rand(p.shape, generator=g))
    optimizer = {  # of AdamW, whose import takes seconds
        "state": {i: {"step": torch.tensor(1.0), "exp_avg": torch.zeros_like(p),
                      "exp_avg_sq": torch.ones_like(p)} for i, p in enumerate(net[0].parameters())},
        "param_groups": [{"lr": 0.001, "betas": (0.9, 0.999), "eps": 1e-08, "weight_decay": 0.01,
                          "amsgrad": False, "foreach": None, "maximize": False, "capturable": False,
                          "differentiable": False, "fused": None, "decoupled_weight_decay": True,
                          "params": [0, 1]}]}
    cases["a state dict with _metadata"] = net.state_dict()
    cases["an optimizer's state"] = optimizer
    cases["a checkpoint"] = {
        "epoch": 3, "global_step": 1200, "pytorch-lightning_version": "2.6.6",
        "state_dict": net.state_dict(), "optimizer_states": [optimizer],
        "lr_schedulers": [{"_step_count": 4, "base_lrs": [0.1], "milestones": Counter({2: 1})}],
        "callbacks": {"ModelCheckpoint{'monitor': 'val_loss'}": {
            "best_k_models": {"a.ckpt": torch.tensor(0.5)}, "kth_value": torch.tensor(0.5)}},
        "hyper_parameters": {"lr": 0.1, "layers": (64, 64), "name": None}}
    cases["sparse"] = [torch.eye(3).to_sparse(), torch.eye(3).to_sparse_csr()]
    cases["meta"] = torch.ones(2, 3, device="meta")
    cases["300 tensors"] = [torch.full((2,), float(i)) for i in range(300)]
    return cases

shared_long = torch.arange(4000.0)

def cases():
    return {**plain_cases(), **whole_cases(), **tensor_cases()}

class AttributeDict(dict):
    pass

# Lightning itself takes seconds to import.
AttributeDict.__module__ = "lightning.fabric.utilities.data"
for part in ("", ".fabric", ".fabric.utilities", ".fabric.utilities.data"):
    sys.modules["lightning" + part] = types.ModuleType("lightning" + part)
sys.modules[AttributeDict.__module__].AttributeDict = AttributeDict

def foreign_cases():
    a = torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)
    return {
        "a defaultdict": [{"d": defaultdict(list, {"a": [1]})}, "d\": it is a collections.defaultdict"],
        "a path": [[pathlib.PurePosixPath("/a/b")], "0\": it is a Python object made by pathlib"],
        "a date": [{"when": datetime.datetime(2026, 1, 2)}, "when\": it is a Python object made by "
                   "datetime.datetime"],
        "a decimal": [[1, decimal.Decimal("0.1")], "1\": it is"],
        "a fraction": [fractions.Fraction(1, 3), "the state: it is"],
        "a uuid": [uuid.UUID(int=5), "the state: it is"],
        "a namespace": [argparse.Namespace(lr=0.1), "argparse.Namespace"],
        "a function": [{"f": [print]}, "f.0\": it is the Python object builtins.print"],
        "a class": [Point, "__main__.Point"],
        "an object": [{"p": Point()}, "__main__.Point"],
        "a dict of another class": [Bag(a=1), "__main__.Bag"],
        "a deque": [deque([1, 2]), "collections.deque"],
        "a tensor of another class": [{"w": torch.ones(2).as_subclass(Sub)}, "of the class __main__.Sub"],
        "a quantized tensor": [{"q": a}, "q\": it is"],
        "an AttributeDict": [{"hparams": AttributeDict(lr=0.1, more=AttributeDict(a=(1,)))}, ""],
    }
)";

// Writes every case, and what repr() gives of those without a tensor.
const char* const kWrite = R"(
folder = sys.argv[1]
reprs = {}
shown = set(plain_cases()) - {"dtypes", "devices"}
for i, (name, value) in enumerate(cases().items()):
    torch.save(value, f"{folder}/{i}.py")
    if name in shown:
        reprs[name] = repr(value)
for i, (name, (value, text)) in enumerate(foreign_cases().items()):
    torch.save(value, f"{folder}/foreign{i}.py")
torch.save(foreign_cases()["an AttributeDict"][0], f"{folder}/attribute_dict.py")
with torch.serialization.skip_data():
    torch.save([torch.empty(5 * 2**28), torch.empty(4), {"last": torch.empty((), dtype=torch.int64)}],
               f"{folder}/5GiB.py") if len(sys.argv) > 2 else None
print(json.dumps({"names": list(cases()), "reprs": reprs,
                  "foreign": {n: t for n, (v, t) in foreign_cases().items()}}))
)";

// Compares each file of C++ with the case; the names of those whose pickle or bytes differ from
// Python's are printed.
const char* const kCheck = R"(
folder = sys.argv[1]

def number(x):
    return struct.pack("d", x)

class Same:
    def __init__(self):
        self.storages, self.back, self.tensors, self.kept = {}, {}, {}, []

    def tensor(self, a, b, at):
        assert (a.dtype, a.shape, a.layout, a.requires_grad) == (b.dtype, b.shape, b.layout,
                                                                 b.requires_grad), at
        assert self.tensors.setdefault(id(a), id(b)) == id(b), (at, "identity")
        self(a.__dict__, b.__dict__, at + ".__dict__")
        if a.layout != torch.strided or a.is_meta:
            self.kept += [a.__reduce_ex__(2)[1], b.__reduce_ex__(2)[1]]  # ids stay unique
            return self(*self.kept[-2:], at)
        assert a.stride() == b.stride() and a.is_conj() == b.is_conj() and a.is_neg() == b.is_neg(), at
        key, other = a.untyped_storage()._cdata, b.untyped_storage()._cdata
        if b.untyped_storage().nbytes() > 0:  # Python makes a new one for each that is empty
            assert self.storages.setdefault(key, other) == other, (at, "sharing")
            assert self.back.setdefault(other, key) == key, (at, "sharing")
        x, y = (torch.empty(0, dtype=torch.uint8).set_(t.untyped_storage()).numpy().tobytes()
                for t in (a, b))
        if len(x) == len(y):
            assert x == y and a.storage_offset() == b.storage_offset(), at
        else:
            n = 1 + sum((s - 1) * t for s, t in zip(a.shape, a.stride())) if a.numel() else 0
            size, i, j = a.element_size(), a.storage_offset(), b.storage_offset()
            assert len(y) < len(x) and x[i*size:(i+n)*size] == y[j*size:(j+n)*size], at

    def __call__(self, a, b, at):
        assert type(a) is type(b), (at, type(a), type(b))
        if isinstance(a, torch.Tensor):
            self.tensor(a, b, at)
        elif isinstance(a, dict):
            assert len(a) == len(b), at
            for (k, v), (l, w) in zip(a.items(), b.items()):
                self(k, l, at + ".key")
                self(v, w, f"{at}.{k}")
            self(getattr(a, "__dict__", None), getattr(b, "__dict__", None), at + ".__dict__")
        elif isinstance(a, (list, tuple)):
            assert len(a) == len(b), at
            for i, (v, w) in enumerate(zip(a, b)):
                self(v, w, f"{at}.{i}")
        elif isinstance(a, np.ndarray):
            # numpy gives the machine's byte order to an array that it unpickles.
            assert a.dtype.newbyteorder("=") == b.dtype.newbyteorder("=") and a.shape == b.shape, at
            assert np.array_equal(a, b) and a.flags.f_contiguous == b.flags.f_contiguous, at
        elif isinstance(a, np.generic):
            assert a.dtype == b.dtype and a.tobytes() == b.tobytes(), at
        elif isinstance(a, float):
            assert number(a) == number(b), at
        elif isinstance(a, complex):
            assert number(a.real) == number(b.real) and number(a.imag) == number(b.imag), at
        else:
            assert a == b, (at, a, b)

differ = []
whole = set(whole_cases())
sys.setrecursionlimit(20000)
for i, (name, value) in enumerate(cases().items()):
    ours = f"{folder}/{i}.cc"
    Same()(value, torch.load(ours, weights_only=name not in whole), name)
    a, b = zipfile.ZipFile(f"{folder}/{i}.py"), zipfile.ZipFile(ours)
    assert b.testzip() is None
    records = lambda z: {n.split("/", 1)[1]: z.read(n) for n in z.namelist() if "serialization_id" not in n}
    if list(records(a).items()) != list(records(b).items()):
        differ.append(name)
Same()({"hparams": {"lr": 0.1, "more": {"a": (1,)}}},
       torch.load(f"{folder}/attribute_dict.cc", weights_only=True), "AttributeDict")
lazy = torch.load(f"{folder}/{list(cases()).index('a checkpoint')}.cc", mmap=True, weights_only=True)
Same()(tensor_cases()["a checkpoint"], lazy, "mmap")
d = torch.load(f"{folder}/dtypes.cc", weights_only=True)
assert [d["ints"].tolist(), d["bytes"].tolist(), d["longs"].tolist()] == [
    [1, 2, 3, 4, 5, 6, 7], [3, 0], [2 + (3 << 32), 4 + (5 << 32)]]
assert len({t.untyped_storage().data_ptr() for t in d.values()}) == 1
print(json.dumps(differ))
)";

std::string script(const char* rest) { return std::string(kCases) + rest; }

State several_dtypes(const at::Tensor& base) {
  return State::dict({{"ints", base.slice(0, 1, 8)},
                      {"bytes", base.view(torch::kByte).slice(0, 12, 14)},
                      {"longs", base.view(torch::kLong).slice(0, 1, 3)}});
}

State value_of(const std::function<void(PickleWriter&)>& write, TempDir& dir) {
  PickleWriter out;
  write(out);
  std::vector<ZipSource> records;
  records.push_back(ZipSource::of_text("data.pkl", out.finish()));
  const ZipWriter zip("archive", std::move(records));
  AtomicFile file(dir.path("made"), zip.bytes());
  zip.write(file);
  file.commit();
  return read_torch_file(dir.path("made"));
}

State back(const State& state, TempDir& dir) {
  write_torch_file(state, dir.path("back"));
  return read_torch_file(dir.path("back"));
}

uint64_t size_of(const std::string& path) {
  struct stat data = {};
  REQUIRE(stat(path.c_str(), &data) == 0);
  return static_cast<uint64_t>(data.st_size);
}

bool room_for_sparse_files(const std::string& folder) {
  struct statvfs disk = {};
  return statvfs(folder.c_str(), &disk) == 0 && disk.f_bavail * disk.f_frsize > uint64_t{6} << 30;
}

State object(const std::string& module, const std::string& name, State::List arguments = {}) {
  return State::Object{How::kCall, module, name, std::move(arguments), {}, {}, {}};
}

}  // namespace

TEST_CASE("what Python saves comes back to Python as it was, through C++", "[checkpoint][torch]") {
  TempDir dir;
  const bool room = room_for_sparse_files(dir.path());
  std::vector<std::string> arguments = {dir.path()};
  if (room) arguments.push_back("sparse");
  const Json python = Json::parse(run_python(script(kWrite), arguments));
  const auto names = python["names"].get<std::vector<std::string>>();
  REQUIRE(names.size() >= 80);
  for (size_t i = 0; i < names.size(); ++i) {
    INFO(names[i]);
    const State state = read_torch_file(dir.path(str(i, ".py")));
    if (python["reprs"].contains(names[i])) {
      CHECK(state.repr(std::numeric_limits<size_t>::max()) == python["reprs"][names[i]]);
    }
    write_torch_file(state, dir.path(str(i, ".cc")));
  }
  write_torch_file(read_torch_file(dir.path("attribute_dict.py")), dir.path("attribute_dict.cc"));

  write_torch_file(several_dtypes(torch::arange(8, torch::kInt)), dir.path("dtypes.cc"));

  size_t i = 0;
  for (const auto& item : python["foreign"].items()) {
    INFO(item.key());
    const State state = read_torch_file(dir.path(str("foreign", i++, ".py")));
    const auto expected = item.value().get<std::string>();
    if (expected.empty()) continue;
    CHECK_THROWS_WITH(write_torch_file(state, dir.path("refused")), Contains(expected));
    CHECK_THROWS_AS(write_torch_file(state, dir.path("refused")), CheckpointError);
  }
  CHECK(access(dir.path("refused").c_str(), F_OK) != 0);

  // All others are byte for byte as Python wrote them.
  const Json differ = Json::parse(run_python(script(kCheck), {dir.path()}));
  CHECK(differ.get<std::vector<std::string>>() ==
        std::vector<std::string>{
            // Python writes b"" as weights_only refuses it.
            "bytes", "empty",
            // Lists, and numpy's dtypes, that are one object in Python are written once there.
            "memory that is shared", "numpy scalars", "numpy arrays",
            // Python writes the whole of a storage.
            "stepped", "expanded", "as_strided", "without elements", "0-dim",
            "in the middle of a long storage", "two parts of a long storage", "bytes in the middle",
            "a float in the middle, three bytes on", "negative", "Parameters", "sparse"});

  if (!room) {
    WARN("the disk has no room for a file of 5 GiB");
    return;
  }
  const auto big = dir.path("5GiB.py");
  {
    const TorchArchive archive(MappedFile::open(big), /*verify=*/false);
    const int fd = open(big.c_str(), O_WRONLY);
    const float floats[] = {1, 2, 3, 4};
    const int64_t last = 7;
    const auto& four = archive.zip().at("data/1");
    CHECK(four.offset > uint64_t{5} << 30);
    REQUIRE(pwrite(fd, floats, sizeof(floats), static_cast<off_t>(four.offset)) == 16);
    const auto one = static_cast<off_t>(archive.zip().at("data/2").offset);
    REQUIRE(pwrite(fd, &last, sizeof(last), one) == 8);
    close(fd);
  }
  const State state = read_torch_file(big, /*verify=*/false);
  CHECK(state.as_list()[0].as_tensor().numel() == int64_t{5} << 28);
  CHECK(state.as_list()[0].as_tensor()[-1].item<float>() == 0);
  CHECK(torch::equal(state.as_list()[1].as_tensor(), torch::tensor({1.f, 2.f, 3.f, 4.f})));
  CHECK(state.as_list()[2].at("last").as_tensor().item<int64_t>() == 7);
}

TEST_CASE("tensors lie in the file: they share storages, keep it open and leave it unchanged",
          "[checkpoint][torch]") {
  TempDir dir;
  const auto base = torch::arange(12, torch::kFloat).view({3, 4});
  State state;
  state["a"] = base;
  state["rows"] = base.slice(0, 1, 3);
  state["turned"] = base.t();
  state["same"] = base;
  write_torch_file(state, dir.path("a"));
  const auto bytes = read_file(dir.path("a"));

  State read = read_torch_file(dir.path("a"));
  const auto a = read.at("a").as_tensor();
  CHECK(a.is_same(read.at("same").as_tensor()));
  CHECK(a.data_ptr() == read.at("turned").as_tensor().data_ptr());
  CHECK(reinterpret_cast<uintptr_t>(a.data_ptr()) % 64 == 0);
  a.fill_(7);
  CHECK(read.at("rows").as_tensor()[1][3].item<float>() == 7);
  CHECK(read_file(dir.path("a")) == bytes);
  read = State();
  remove(dir.path("a").c_str());
  CHECK(a.sum().item<float>() == 84);
}

TEST_CASE("of a long storage the part in use is written", "[checkpoint][torch]") {
  TempDir dir;
  const auto base = torch::arange(1'000'000);
  State state;
  state["a"] = base.slice(0, 1000, 1010);
  state["b"] = base.slice(0, 1005, 1030, 5);
  write_torch_file(state, dir.path("a"));
  CHECK(size_of(dir.path("a")) < 2500);
  const State read = read_torch_file(dir.path("a"));
  CHECK(torch::equal(read.at("a").as_tensor(), base.slice(0, 1000, 1010)));
  CHECK(torch::equal(read.at("b").as_tensor(), base.slice(0, 1005, 1030, 5)));
  CHECK(read.at("a").as_tensor().is_alias_of(read.at("b").as_tensor()));
}

TEST_CASE("a storage that is seen as several dtypes is written once", "[checkpoint][torch]") {
  TempDir dir;
  const auto base = torch::arange(8, torch::kInt);
  const State read = back(several_dtypes(base), dir);
  CHECK(torch::equal(read.at("ints").as_tensor(), base.slice(0, 1, 8)));
  CHECK(torch::equal(read.at("longs").as_tensor(), base.view(torch::kLong).slice(0, 1, 3)));
  CHECK(read.at("ints").as_tensor().is_alias_of(read.at("bytes").as_tensor()));
}

TEST_CASE("tensors of an archive at any byte are copied to where they can be used",
          "[checkpoint][torch]") {
  TempDir dir;
  const auto values = torch::randn({3}, torch::kDouble);
  State state;
  state["a"] = values;
  state["b"] = values.slice(0, 1);
  write_torch_file(state, dir.path("a"));
  write_file(dir.path("b"), "123" + read_file(dir.path("a")) + "4");
  const auto file = MappedFile::open(dir.path("b"));
  const State read = read_torch_archive(TorchArchive(file, 3, file->size() - 4, /*verify=*/true));
  CHECK(reinterpret_cast<uintptr_t>(read.at("a").as_tensor().data_ptr()) % 8 == 0);
  CHECK(torch::equal(read.at("a").as_tensor(), values));
  CHECK(read.at("a").as_tensor().is_alias_of(read.at("b").as_tensor()));
}

TEST_CASE("a state that is written twice gives the same bytes", "[checkpoint][torch]") {
  TempDir dir;
  State state;
  for (int64_t i = 0; i < 50; ++i) state[str("w", i)] = torch::full({i}, i);
  write_torch_file(state, dir.path("a"));
  write_torch_file(read_torch_file(dir.path("a")), dir.path("b"));
  CHECK(read_file(dir.path("a")) == read_file(dir.path("b")));
}

TEST_CASE("what a file cannot hold is refused by its path, and no file is left",
          "[checkpoint][torch]") {
  TempDir dir;
  // What is said of an entry deep in the state.
  const auto refusal = [&](State inner) -> std::string {
    State state;
    state["optimizer_states"] =
        State::List{State::dict({{"state", State::dict({{int64_t{3}, std::move(inner)}})}})};
    try {
      write_torch_file(state, dir.path("a"));
    } catch (const CheckpointError& error) {
      const std::string begin = "Cannot save \"optimizer_states.0.state.3";
      const std::string text = error.what();
      return text.compare(0, begin.size(), begin) == 0 ? text.substr(begin.size()) : text;
    }
    return "not refused";
  };
  const auto entry = [](State value) { return State::dict({{"exp_avg", std::move(value)}}); };
  TensorState shard;
  shard.sizes = {4};
  shard.chunks.push_back({{0}, {2}, torch::zeros(2)});
  CHECK_THAT(refusal(entry(shard)),
             StartsWith(".exp_avg\": it is a tensor of shape [4] of which 1"));
  CHECK_THAT(refusal(entry(at::Tensor())), StartsWith(".exp_avg\": it is an undefined tensor"));
  CHECK_THAT(refusal(entry(torch::ones(2, torch::kMeta))), Contains("it is a tensor of the meta"));
  CHECK_THAT(refusal(entry(torch::eye(2).to_sparse())), Contains("of layout Sparse"));
  const auto quantized = torch::quantize_per_tensor(torch::ones(2), 0.1, 0, torch::kQInt8);
  CHECK_THAT(refusal(entry(quantized)), Contains("it is a quantized tensor"));
  auto freed = torch::ones(4);
  freed.storage().unsafeGetStorageImpl()->set_nbytes(0);
  CHECK_THAT(refusal(entry(freed)), Contains("Was its memory freed?"));
  CHECK_THAT(refusal(entry("\xff")), Contains(".exp_avg\": it holds text") && Contains("UTF-8"));
  CHECK_THAT(refusal(State::dict({{"\xff", 1}})), Contains("UTF-8"));
  CHECK_THAT(refusal(entry(object("posix", "system", {"ls"}))), Contains("made by posix.system"));
  CHECK_THAT(refusal(State::List{1, object("builtins", "eval", {"1"})}), StartsWith(".1\": it is"));
  CHECK_THAT(refusal(State::Object{How::kNew, "torch", "Size", {}, {}, {}, {}}),
             Contains("torch.Size"));
  CHECK_THROWS_WITH(write_torch_file(object("os", "getcwd"), dir.path("a")),
                    Contains("Cannot save the state: it is a Python object made by os.getcwd"));
  State deep;
  for (int i = 0; i < 1001; ++i) deep = State::List{std::move(deep)};
  CHECK_THROWS_WITH(write_torch_file(deep, dir.path("a")), Contains("more than 1000 deep"));
  CHECK(access(dir.path("a").c_str(), F_OK) != 0);
}

TEST_CASE("a tree a thousand deep goes both ways", "[checkpoint][torch]") {
  TempDir dir;
  State deep;
  for (int i = 0; i < 1000; ++i) {
    State outer;
    outer["a"] = std::move(deep);
    deep = std::move(outer);
  }
  CHECK(back(deep, dir).repr(100'000) == deep.repr(100'000));
}

TEST_CASE("pickles that refer to themselves are refused by their path", "[checkpoint][torch]") {
  TempDir dir;
  const auto list = [](PickleWriter& out) {
    out.empty_dict();
    out.text("a");
    out.empty_list();
    out.again(out.last_memo());
    out.append();
    out.setitem();
  };
  CHECK_THROWS_WITH(value_of(list, dir), Contains(dir.path("made")) && Contains("\"a.0.0.0") &&
                                             Contains("refers to itself"));
  const auto dict = [](PickleWriter& out) {
    out.empty_dict();
    const auto memo = out.last_memo();
    out.begin_items();
    for (int i = 0; i < 5000; ++i) {
      out.integer(i);
      out.none();
    }
    out.text("self");
    out.again(memo);
    out.end_setitems();
  };
  CHECK_THROWS_WITH(value_of(dict, dir), Contains("refers to itself"));
}

TEST_CASE("a small pickle that means a huge tree is refused before the memory is gone",
          "[checkpoint][torch]") {
  TempDir dir;
  // A list of two, each of them a list of two, ...
  const auto doubled = [](PickleWriter& out) {
    for (int i = 0; i < 100; ++i) {
      const auto memo = out.last_memo();
      out.again(memo);
      out.begin_tuple(2);
      out.end_tuple();
    }
  };
  const auto tuples = [&](PickleWriter& out) {
    out.bytes("x");
    doubled(out);
  };
  CHECK_THROWS_WITH(value_of(tuples, dir), Contains("names the same parts again and again"));
  const auto keys = [&](PickleWriter& out) {
    out.empty_dict();
    out.bytes("x");
    doubled(out);
    out.none();
    out.setitem();
  };
  CHECK_THROWS_WITH(value_of(keys, dir), Contains("again and again"));
  const auto texts = [](PickleWriter& out) {
    out.empty_list();
    out.begin_items();
    out.text(std::string(1'000'000, 'x'));
    const auto memo = out.last_memo();
    for (int i = 0; i < 100'000; ++i) out.again(memo);
    out.end_appends();
  };
  CHECK_THROWS_WITH(value_of(texts, dir), Contains("again and again"));
}

TEST_CASE("nesting beyond a thousand is refused, however deep", "[checkpoint][torch]") {
  TempDir dir;
  for (const int depth : {1001, 1'000'000}) {
    const auto deep = [&](PickleWriter& out) {
      for (int i = 0; i < depth; ++i) out.begin_tuple(1);
      out.none();
      for (int i = 0; i < depth; ++i) out.end_tuple();
    };
    CHECK_THROWS_WITH(value_of(deep, dir), Contains("nested more than 1000 deep"));
  }
}

TEST_CASE("what a pickle would run is shown and not run", "[checkpoint][torch]") {
  TempDir dir;
  const State state = value_of(
      [](PickleWriter& out) {
        out.global("posix", "system");
        out.begin_tuple(1);
        out.text("touch /tmp/never");
        out.end_tuple();
        out.call();
      },
      dir);
  REQUIRE(state.is_object());
  CHECK(state.as_object().full_name() == "posix.system");
  CHECK(state.repr() == "posix.system('touch /tmp/never')");
}
