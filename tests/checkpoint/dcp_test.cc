#include "lightning/checkpoint/dcp.h"

#include <sys/stat.h>
#include <torch/torch.h>
#include <unistd.h>

#include <catch2/catch.hpp>
#include <functional>
#include <random>

#include "lightning/checkpoint/checkpoint_file.h"
#include "lightning/checkpoint/torch_file.h"
#include "lightning/errors.h"
#include "lightning/files.h"
#include "tests/support/python.h"
#include "tests/support/temp_dir.h"

using Catch::Matchers::Contains;
using namespace lightning;
using lightning::testing::run_python;
using lightning::testing::TempDir;

namespace {

using Sizes = std::vector<int64_t>;

std::string error_of(const std::function<void()>& work) {
  try {
    work();
  } catch (const CheckpointError& error) {
    return error.what();
  }
  return "no error";
}

bool exists(const std::string& path) { return ::access(path.c_str(), F_OK) == 0; }

bool same_bits(at::Tensor a, at::Tensor b) {
  if (a.scalar_type() != b.scalar_type() || a.sizes() != b.sizes()) return false;
  a = a.resolve_conj().resolve_neg().contiguous();
  b = b.resolve_conj().resolve_neg().contiguous();
  return std::memcmp(a.data_ptr(), b.data_ptr(), a.nbytes()) == 0;
}

// Where two trees differ; empty where they do not. Dicts may have their keys in any order.
std::string difference(const State& a, const State& b, const std::string& path = "") {
  const auto differs = [&] { return path + ": " + a.repr() + " and " + b.repr(); };
  if (a.type_name() != b.type_name()) return differs();
  if (a.is<TensorState>()) return same_bits(a.as_tensor(), b.as_tensor()) ? "" : differs();
  if (a.is_dict()) {
    if (a.as_dict().size() != b.as_dict().size()) return differs();
    for (const auto& [key, value] : a.as_dict()) {
      const auto* other = b.find(key);
      if (other == nullptr) return path + "." + to_string(key) + " is missing";
      const auto found = difference(value, *other, path + "." + to_string(key));
      if (!found.empty()) return found;
    }
    return "";
  }
  if (a.is<State::List>() || a.is<State::Tuple>()) {
    if (a.as_list().size() != b.as_list().size()) return differs();
    for (size_t i = 0; i < a.as_list().size(); ++i) {
      const auto found = difference(a.as_list()[i], b.as_list()[i], path + "." + std::to_string(i));
      if (!found.empty()) return found;
    }
    return "";
  }
  return a.repr() == b.repr() ? "" : differs();
}

// What a training has and what it hardly ever has.
State odd_tree() {
  torch::manual_seed(5);
  const auto random = [](std::vector<int64_t> sizes) { return torch::randn(sizes); };
  return State::dict({
      {"model",
       State::ordered_dict(
           {{"net.weight", random({5, 7})},
            {"net.bias", random({7})},
            {"half", random({9, 2}).to(at::kBFloat16)},
            {"fp8", random({3, 5}).to(at::kFloat8_e4m3fn)},
            {"complex", random({4, 3, 2}).to(at::kComplexFloat)},
            {"conjugate", random({6}).to(at::kComplexFloat).mul(c10::complex<float>(0, 1)).conj()},
            {"mask", random({11}) > 0},
            {"counter", torch::tensor(int64_t{3}).reshape({})},
            {"none", torch::zeros({0, 3})},
            {"columns", random({40, 1000}).narrow(1, 5, 3)},
            {"turned", random({4, 6}).t()},
            {"one row", random({1, 4})},
            {"expanded", random({1, 3}).expand({5, 3})}})},
      {"values", State::dict({{"int", 7},
                              {"float", 0.1},
                              {"text", "Größe \"大\""},
                              {"none", State()},
                              {"true", true},
                              {"bytes", State::Bytes{std::string("\0\xff", 2), false}},
                              {"tuple", State::Tuple{{1, State::Tuple{{2.5, "x"}}}}},
                              {"numbers", State::List{1, 2.5, "three", State()}},
                              {"nested", State::List{State::List{1, 2}, State::List{3}}},
                              {"nothing", State::List{}},
                              {"empty", State::dict()},
                              {"names", State::List{"net.weight", "net.bias"}}})},
      {"split", State::List{torch::arange(3), 5, State::dict({{"a", 1}}),
                            State::List{torch::ones({2})}, State::Tuple{{1, 2}}}},
      {"kept", State::List{State::Tuple{{torch::ones({2}), 1}}}},
      {"state",
       State::dict({{int64_t{0}, State::dict({{"step", torch::tensor(2.0f).reshape({})}})},
                    {int64_t{1}, State::dict({{"step", torch::tensor(3.0f).reshape({})}})}})},
      {"a.b", 1},
  });
}

// Of a tensor what `rank` of `world` holds: rows, or columns of some, in as many as ceil gives
// each. A replica is on all ranks.
TensorState shard(const at::Tensor& whole, int64_t rank, int64_t world, int64_t dim) {
  TensorState state;
  state.sizes = whole.sizes().vec();
  state.dtype = whole.scalar_type();
  if (whole.dim() <= dim) {
    state.chunks.push_back({Sizes(state.sizes.size(), 0), state.sizes, whole});
    return state;
  }
  const int64_t size = whole.size(dim);
  const int64_t each = (size + world - 1) / world;
  const int64_t begin = std::min(size, rank * each);
  const auto part = whole.narrow(dim, begin, std::min(size, begin + each) - begin);
  Sizes offsets(state.sizes.size(), 0);
  offsets[static_cast<size_t>(dim)] = begin;
  state.chunks.push_back({offsets, part.sizes().vec(), part});
  return state;
}

// Rows in the root, columns one level down, rows again below.
State shard_all(const State& state, int64_t rank, int64_t world, int64_t dim = 1) {
  if (state.is<TensorState>()) return shard(state.as_tensor(), rank, world, dim);
  State result = state;
  if (state.is_dict()) {
    for (auto& [key, value] : result.as_dict()) value = shard_all(value, rank, world, 1 - dim);
  } else if (state.is<State::List>()) {
    State::List items;
    for (const auto& item : state.as_list()) items.push_back(shard_all(item, rank, world, dim));
    result = items;
  }
  return result;
}

void write_as(const State& state, const std::string& folder, int64_t world) {
  std::vector<DcpMetadata::Item> items;
  for (int64_t rank = 0; rank < world; ++rank) {
    auto part = write_dcp_rank(shard_all(state, rank, world), folder, rank);
    items.insert(items.end(), part.begin(), part.end());
  }
  write_dcp_metadata(items, folder);
}

// As Lightning's ModelParallelStrategy saves it: a net of Linear(5, 7), BatchNorm1d(7), Linear(7,
// 3) with AdamW.
State lightning_tree() {
  State model = State::ordered_dict();
  State states = State::dict();
  State::List names;
  const auto add = [&](const std::string& name, Sizes sizes) {
    model[name] = torch::randn(sizes);
    states[name] = State::dict({{"step", torch::tensor(3.0f).reshape({})},
                                {"exp_avg", torch::randn(sizes)},
                                {"exp_avg_sq", torch::rand(sizes)}});
    names.emplace_back(name);
  };
  add("0.weight", {7, 5});
  add("0.bias", {7});
  add("1.weight", {7});
  add("1.bias", {7});
  model["1.running_mean"] = torch::randn({7});
  model["1.running_var"] = torch::rand({7});
  model["1.num_batches_tracked"] = torch::tensor(int64_t{3}).reshape({});
  add("2.weight", {3, 7});
  add("2.bias", {3});
  const State group = State::dict({{"lr", 0.125},
                                   {"betas", State::Tuple{{0.9, 0.999}}},
                                   {"eps", 1e-8},
                                   {"weight_decay", 0.01},
                                   {"amsgrad", false},
                                   {"maximize", false},
                                   {"foreach", State()},
                                   {"capturable", false},
                                   {"differentiable", false},
                                   {"fused", State()},
                                   {"decoupled_weight_decay", true},
                                   {"params", names}});
  return State::dict(
      {{"state_dict", model},
       {"optimizer_0", State::dict({{"state", states}, {"param_groups", State::List{group}}})}});
}

// Reads what C++ wrote and writes what C++ reads, in one start of Python; three processes join over
// Gloo for what is sharded.
const char* const kScript = R"(
import sys, torch, torch.distributed as dist, torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
folder = sys.argv[1] + '/'

def same(a, b, where):
    assert type(a) is type(b), (where, type(a), type(b))
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and a.shape == b.shape, where
        bits = lambda t: t.resolve_conj().contiguous().reshape(-1).view(torch.uint8)
        assert torch.equal(bits(a), bits(b)), where
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b)): same(x, y, f'{where}.{i}')
    elif isinstance(a, dict):
        assert set(a) == set(b), where
        for k in a: same(a[k], b[k], f'{where}.{k}')
    else:
        assert a == b, (where, a, b)

def check_ours(name, tree):
    flat, paths = flatten_state_dict(torch.load(folder + tree + '.pt', weights_only=False))
    metadata = FileSystemReader(folder + name).read_metadata()
    assert metadata.planner_data == paths, (metadata.planner_data, paths)
    assert list(metadata.state_dict_metadata) == list(flat)
    dcp_to_torch_save(folder + name, folder + name + '.full')
    read, _ = flatten_state_dict(torch.load(folder + name + '.full', weights_only=False))
    same(read, flat, name)
    return flat

def odd():
    r = torch.randn
    return {
        'plain': r(5, 6), 'zero_dim': torch.tensor(3.5), 'empty': torch.zeros(0, 3),
        'view': r(100, 100)[:, :3], 'turned': r(4, 7).t(), 'bf16': r(9).bfloat16(),
        'fp8': r(3, 5).to(torch.float8_e4m3fn), 'e5m2': r(8).to(torch.float8_e5m2),
        'half': r(2).half(), 'complex': torch.view_as_complex(r(4, 2)),
        'conj': torch.view_as_complex(r(4, 2)).conj(), 'bool': torch.tensor([True, False]),
        'u16': torch.tensor([1, 65535]).to(torch.uint16), 'expanded': torch.ones(1).expand(4),
        'parameter': torch.nn.Parameter(r(3)), 'f64': r(2, 3, 4).double(),
        'values': {'int': 7, 'big': 2**70, 'float': .1, 'str': 'Größe 大', 'none': None,
                   'bytes': b'\x00\xff', 'tuple': (1, (2.5, 'x')), 'tensors': (torch.arange(3), 1),
                   'set': {1}, 'size': torch.Size([2, 3]), 'dtype': torch.bfloat16},
        'numbers': [1, 2.5, 'three', None], 'nested': [[1, 2], [3]], 'nothing': [], 'gone': {},
        'split': [torch.arange(3), 5, {'a': 1}, [torch.ones(2)], (1, 2)],
        'kept': [(torch.ones(1),)], 'state': {0: {'step': torch.tensor(2.)}},
        'keys': {True: 1, None: 2, 1.5: 3, (1, 2): 4}, 'with.dots': torch.ones(2), '': r(1),
    }

def work(rank, world):
    torch.set_num_threads(1)  # makes torch's pool of threads anew, as its threads would at once
    dist.init_process_group('gloo', init_method='file://' + folder + 'store', rank=rank,
                            world_size=world)
    from torch.distributed.tensor import DTensor, Replicate, Shard, init_device_mesh
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.checkpoint.state_dict import (
        get_model_state_dict, get_optimizer_state_dict, set_optimizer_state_dict)
    torch.manual_seed(1)
    r = torch.randn
    mesh = init_device_mesh('cpu', (world,))
    grid = init_device_mesh('cpu', (2, 2))
    def spread(tensor, *placements):  # not distribute_tensor: Gloo has no float8
        on = mesh if len(placements) == 1 else grid
        sizes, offsets = compute_local_shape_and_global_offset(tensor.shape, on, placements)
        local = tensor[tuple(slice(o, o + s) for o, s in zip(offsets, sizes))].clone()
        return DTensor.from_local(local, on, placements, run_check=False, shape=tensor.shape,
                                  stride=tensor.contiguous().stride())
    theirs = {
        'rows': spread(r(5, 6), Shard(0)), 'columns': spread(r(7, 5), Shard(1)),
        'few': spread(r(2, 4), Shard(0)), 'whole': spread(r(3, 2), Replicate()),
        'zero_dim': spread(torch.tensor(2.5), Replicate()),
        'bf16': spread(r(9, 2).bfloat16(), Shard(0)), 'none': spread(torch.zeros(0, 3), Shard(0)),
        'complex': spread(torch.view_as_complex(r(5, 2)), Shard(0)),
        'hybrid': spread(r(5, 4), Replicate(), Shard(0)),
        'grid': spread(r(5, 7), Shard(0), Shard(1)), 'deep': spread(r(9, 2), Shard(0), Shard(0)),
        'plain': torch.arange(4.), 'values': {'a': 1, 'b': [1, 2], 't': (1, 2.5)},
        'list': [spread(r(9), Shard(0)), {'x': 3}],
    }
    dcp.save(theirs, checkpoint_id=folder + 'many')

    # Ours, for ranks that hold it in other ways than those that wrote it.
    for name in ('ours_1', 'ours_3'):
        flat, _ = flatten_state_dict(torch.load(folder + 'tree.pt', weights_only=False))
        tensors = {k: v for k, v in flat.items() if isinstance(v, torch.Tensor)}
        target = {}
        for i, (k, v) in enumerate(tensors.items()):
            place = Shard(i % v.dim()) if v.dim() else Replicate()
            target[k] = spread(torch.zeros(v.shape, dtype=v.dtype), place)
        dcp.load(target, checkpoint_id=folder + name)
        for i, (k, v) in enumerate(tensors.items()):
            want = spread(v.resolve_conj().contiguous(), *target[k].placements)
            same(target[k].to_local(), want.to_local(), name + k)

    # Lightning's layouts, with FSDP2 and what its ModelParallelStrategy calls.
    net = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.BatchNorm1d(7),
                              torch.nn.Linear(7, 3))
    fully_shard(net[0]); fully_shard(net[2]); fully_shard(net)
    adam = torch.optim.AdamW(net.parameters(), lr=.1)
    for _ in range(2):
        net(r(4, 5)).square().sum().backward(); adam.step(); adam.zero_grad()
    model, optimizer = get_model_state_dict(net), get_optimizer_state_dict(net, adam)
    for name, key in (('mp', 'state_dict'), ('fsdp', 'model')):
        dcp.save({key: model, 'optimizer_0': optimizer}, checkpoint_id=folder + name)
        if rank == 0: torch.save({'epoch': 1, 'global_step': 2}, folder + name + '/meta.pt')
    state = {'state_dict': get_model_state_dict(net)}
    dcp.load(state, checkpoint_id=folder + 'ours_mp')
    net.load_state_dict(state['state_dict'])
    state = {'optimizer_0': get_optimizer_state_dict(net, adam)}
    dcp.load(state, checkpoint_id=folder + 'ours_mp')
    set_optimizer_state_dict(net, adam, optim_state_dict=state['optimizer_0'])
    def full(tensor): return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    want = torch.load(folder + 'mp_tree.pt')
    for k, v in net.state_dict().items(): same(full(v.detach()), want['state_dict'][k], k)
    got = get_optimizer_state_dict(net, adam)
    for k, v in got['state'].items():
        same({n: full(t) for n, t in v.items()}, want['optimizer_0']['state'][k], k)
    same(got['param_groups'], want['optimizer_0']['param_groups'], 'param_groups')
    dist.destroy_process_group()

torch.manual_seed(0)
torch.set_num_threads(1)
check_ours('ours_1', 'tree')
check_ours('ours_3', 'tree')
check_ours('ours_mp', 'mp_tree')
dcp.save(odd(), checkpoint_id=folder + 'one', no_dist=True)
dcp.save({'x': torch.ones(2), 'y': torch.zeros(3), 'z': 'text'}, checkpoint_id=folder + 'two_files', no_dist=True,
         storage_writer=dcp.FileSystemWriter(folder + 'two_files', thread_count=2))
mp.start_processes(work, args=(4,), nprocs=4, start_method='fork')
for name in ('one', 'many', 'mp', 'fsdp'): dcp_to_torch_save(folder + name, folder + name + '.pt')
print('equal')
)";

struct PythonFolder {
  TempDir dir;
  std::string said;

  PythonFolder() {
    write_torch_file(odd_tree(), dir.path("tree.pt"));
    write_dcp(odd_tree(), dir.path("ours_1"));
    write_as(odd_tree(), dir.path("ours_3"), 3);
    torch::manual_seed(9);
    const State trained = lightning_tree();
    write_torch_file(trained, dir.path("mp_tree.pt"));
    write_as(trained, dir.path("ours_mp"), 3);
    said = run_python(kScript, {dir.path()});
  }
};

const PythonFolder& python() {
  static const PythonFolder folder;
  return folder;
}

State rows_and_values() {
  return State::dict({{"weight", torch::arange(30.0f).reshape({5, 6})},
                      {"bias", torch::arange(5.0f)},
                      {"epoch", 3}});
}

}  // namespace

TEST_CASE("Python reads sharded folders of one and of three ranks of ours", "[checkpoint]") {
  CHECK(python().said == "equal\n");
}

TEST_CASE("sharded folders of Python are read whole, as Python puts them together",
          "[checkpoint]") {
  const auto& dir = python().dir;
  for (const std::string name : {"one", "many", "mp", "fsdp"}) {
    INFO(name);
    CHECK(difference(DcpReader(dir.path(name)).read_all(),
                     read_torch_file(dir.path(name + ".pt"))) == "");
  }
  const State one = DcpReader(dir.path("one")).read_all();
  CHECK(one.as_dict().begin()->first == State::Key("plain"));  // the tree's order
  CHECK(one.at("values").at("tensors").as_list()[0].as_tensor().equal(torch::arange(3)));
  CHECK(one.at("values").at("dtype").as_object().full_name() == "torch.bfloat16");
}

TEST_CASE("a rank of Python's may have written several files", "[checkpoint]") {
  const DcpReader reader(python().dir.path("two_files"));
  CHECK(reader.metadata().find("x")->chunks[0].place.file !=
        reader.metadata().find("y")->chunks[0].place.file);
  CHECK(reader.read("x").equal(torch::ones({2})));
  CHECK(reader.read("y").equal(torch::zeros({3})));
  CHECK(reader.read_value("z").as_string() == "text");
}

TEST_CASE("any box of a tensor is read from the chunks that meet it", "[checkpoint]") {
  std::mt19937 random(11);
  const auto upto = [&](int64_t most) { return static_cast<int64_t>(random() % (most + 1)); };
  for (const std::string name : {"one", "many", "mp", "ours_3"}) {
    const DcpReader reader(python().dir.path(name));
    for (const auto& item : reader.metadata().items) {
      if (!item.is_tensor) continue;
      const at::Tensor whole = reader.read(item.fqn);
      for (int round = 0; round < 8; ++round) {
        Sizes offsets, sizes;
        at::Tensor expected = whole;
        for (size_t d = 0; d < item.sizes.size(); ++d) {
          offsets.push_back(upto(item.sizes[d]));
          sizes.push_back(upto(item.sizes[d] - offsets[d]));
          expected = expected.narrow(static_cast<int64_t>(d), offsets[d], sizes[d]);
        }
        const at::Tensor box = reader.read(item.fqn, offsets, sizes);
        INFO(name << " " << item.fqn << " " << at::IntArrayRef(offsets) << at::IntArrayRef(sizes));
        CHECK(box.is_contiguous());
        CHECK(same_bits(box, expected));
      }
    }
  }
}

TEST_CASE("chunks are given as they lie in the files, where they are wanted so", "[checkpoint]") {
  const DcpReader reader(python().dir.path("many"));

  const State parts = reader.read_all(false);

  CHECK(parts.at("rows").as_tensor_state().chunks.size() > 1);
  CHECK(parts.at("hybrid").as_tensor_state().chunks.size() == 2);  // four ranks, two replicas
  for (const auto& item : reader.metadata().items) {
    if (!item.is_tensor || item.path.size() != 1) continue;
    const auto& state = parts.at(item.fqn).as_tensor_state();
    CHECK(state.sizes == item.sizes);
    for (const auto& chunk : state.chunks) {
      CHECK(same_bits(chunk.tensor, reader.read(item.fqn, chunk.offsets, chunk.sizes)));
    }
  }
  TempDir dir;  // and can be written so by a process that never has a whole tensor
  write_dcp(parts, dir.path("copy"));
  CHECK(difference(DcpReader(dir.path("copy")).read_all(), reader.read_all()) == "");
}

TEST_CASE("folders of both of Lightning's strategies are Trainer checkpoints", "[checkpoint]") {
  const auto& dir = python().dir;
  for (const std::string name : {"mp", "fsdp"}) {
    INFO(name);
    REQUIRE(detect_format(dir.path(name)) == CheckpointFormat::kSharded);

    const State checkpoint =
        as_trainer_checkpoint(read_checkpoint_file(dir.path(name)), CheckpointFormat::kSharded);

    CHECK(checkpoint.at("global_step").as_int() == 2);
    CHECK(checkpoint.at("state_dict").at("0.weight").as_tensor().sizes() == Sizes{7, 5});
    REQUIRE(checkpoint.at("optimizer_states").as_list().size() == 1);
    const State& optimizer = checkpoint.at("optimizer_states").as_list()[0];
    CHECK(optimizer.at("param_groups").as_list()[0].at("lr").as_double() == 0.1);
    CHECK(optimizer.at("param_groups").as_list()[0].at("params").as_list()[5].as_int() == 5);
    const State full = read_torch_file(dir.path(name + ".pt")).at("optimizer_0");
    const State& names = full.at("param_groups").as_list()[0].at("params");
    for (int64_t i = 0; i < 6; ++i) {
      const auto& parameter = names.as_list()[static_cast<size_t>(i)].as_string();
      CHECK(difference(optimizer.at("state").at(i), full.at("state").at(parameter)) == "");
    }
  }
}

TEST_CASE("items of ours are aligned and hold no more than their chunk", "[checkpoint]") {
  const DcpReader reader(python().dir.path("ours_1"));
  for (const auto& item : reader.metadata().items) {
    for (const auto& chunk : item.chunks) CHECK(chunk.place.offset % 64 == 0);
  }
  CHECK(reader.metadata().find("model.columns")->chunks[0].place.bytes < 3000);  // of 160,000
  CHECK(reader.metadata().find("values.empty") == nullptr);
  const std::vector<std::variant<int64_t, std::string>> path = {"split", int64_t{2}, "a"};
  CHECK((reader.metadata().find("split.2.a")->path == path));
  CHECK(same_bits(reader.read("model.conjugate"),
                  odd_tree().at("model").at("conjugate").as_tensor()));
  // Values are rank 0's; of four columns in twos, the last of three ranks holds none.
  const DcpReader sharded(python().dir.path("ours_3"));
  CHECK(sharded.metadata().find("values.int")->place.file == "__0_0.distcp");
  CHECK(sharded.metadata().find("model.one row")->chunks.size() == 2);
  CHECK(difference(sharded.read_all(), reader.read_all()) == "");
}

TEST_CASE("a save that was not finished leaves no checkpoint, nor an older one", "[checkpoint]") {
  TempDir dir;
  const std::string folder = dir.path("x");
  write_as(rows_and_values(), folder, 3);
  REQUIRE(exists(folder + "/__2_0.distcp"));
  State other = rows_and_values();
  other["weight"] = torch::zeros({5, 6});

  const auto items = write_dcp_rank(other, folder, 0);

  CHECK_THAT(error_of([&] { DcpReader reader(folder); }),
             Contains(folder) && Contains("no .metadata") && Contains("was not finished"));
  write_dcp_metadata(items, folder);
  CHECK(DcpReader(folder).read("weight").equal(torch::zeros({5, 6})));
  CHECK_FALSE(exists(folder + "/__1_0.distcp"));  // of the older save
  CHECK_FALSE(exists(folder + "/__2_0.distcp"));
  // Other files of the folder are nobody's business.
  for (const char* name : {"meta.pt", "__1.distcp", "__1_0.distcp.bak", "x__1_0.distcp"}) {
    write_file(folder + "/" + name, "x");
  }
  write_dcp(other, folder);
  for (const char* name : {"meta.pt", "__1.distcp", "__1_0.distcp.bak", "x__1_0.distcp"}) {
    CHECK(exists(folder + "/" + name));
  }
}

TEST_CASE("folders that are damaged are refused with what is wrong and where", "[checkpoint]") {
  TempDir dir;
  const std::string folder = dir.path("x");
  write_as(rows_and_values(), folder, 2);
  const auto error = [&] { return error_of([&] { DcpReader(folder).read_all(); }); };
  REQUIRE(error() == "no error");
  const std::string second = folder + "/__1_0.distcp";
  const std::string content = read_file(second);

  SECTION("a file is missing") {
    ::unlink(second.c_str());
    CHECK_THAT(error(), Contains(folder) && Contains("its file __1_0.distcp, which holds") &&
                            Contains("No such file") && Contains("Copy the files of all ranks"));
  }
  SECTION("a file is short") {
    REQUIRE(::truncate(second.c_str(), static_cast<off_t>(content.size() - 1)) == 0);
    CHECK_THAT(error(), Contains(str("__1_0.distcp has ", content.size() - 1, " bytes")) &&
                            Contains("copy it again"));
  }
  SECTION("a bit is flipped in a tensor") {
    const auto metadata = DcpReader(folder).metadata();
    const auto& place = metadata.find("weight")->chunks[1].place;
    REQUIRE(place.file == "__1_0.distcp");
    std::string bytes = content;
    const float value = DcpReader(folder).read("weight")[4][3].item<float>();
    const auto at = bytes.find(std::string(reinterpret_cast<const char*>(&value), 4), place.offset);
    REQUIRE(at < place.offset + place.bytes);
    bytes[at] ^= 1;
    write_file(second, bytes);
    CHECK_THAT(error(), Contains("\"weight\"") && Contains("data/0"));
    CHECK(error_of([&] { DcpReader(folder, false).read_all(); }) == "no error");
    // Nor does it harm what is elsewhere.
    CHECK(DcpReader(folder).read("weight", {0, 0}, {2, 6}).numel() == 12);
  }
  SECTION("the metadata is of another save") {
    auto metadata = DcpReader(folder).metadata();
    for (auto& item : metadata.items) {
      if (item.fqn == "weight") item.dtype = DType::kInt32;
    }
    write_file(folder + "/.metadata", metadata.to_pickle());
    CHECK_THAT(error(), Contains("\"weight\"") && Contains("holds float32 [") &&
                            Contains("expected int32 ["));
    CHECK_THAT(error_of([&] { DcpReader(folder).read_all(false); }), Contains("expected int32 ["));
  }
  SECTION("a value where a tensor should be") {
    auto metadata = DcpReader(folder).metadata();
    DcpMetadata::Place place;
    for (auto& item : metadata.items) {
      if (item.fqn == "epoch") std::swap(place, item.place);
    }
    for (auto& item : metadata.items) {
      if (item.fqn == "bias") std::swap(place, item.chunks[0].place);
    }
    for (auto& item : metadata.items) {
      if (item.fqn == "epoch") std::swap(place, item.place);
    }
    write_file(folder + "/.metadata", metadata.to_pickle());
    CHECK_THAT(error(), Contains("\"bias\": its item holds no tensor"));
  }
  SECTION("the metadata is cut") {
    const std::string bytes = read_file(folder + "/.metadata");
    write_file(folder + "/.metadata", bytes.substr(0, bytes.size() / 2));
    CHECK_THAT(error(), Contains(folder) && Contains("its .metadata cannot be used"));
  }
  SECTION("paths that cannot be a tree") {
    auto metadata = DcpReader(folder).metadata();
    metadata.items[0].path = {"a"};
    metadata.items[1].path = {"a", "b"};
    write_file(folder + "/.metadata", metadata.to_pickle());
    CHECK_THAT(error(), Contains("leads through another value"));
    metadata.items[0].path = {"a", int64_t{1} << 40};
    metadata.items[1].path = {"b", int64_t{2}};
    write_file(folder + "/.metadata", metadata.to_pickle());
    CHECK_THAT(error(), Contains("a list of it has an entry 1099511627776"));
    metadata.items[0].path = {"a", int64_t{1}};
    write_file(folder + "/.metadata", metadata.to_pickle());
    const State state = DcpReader(folder).read_all();
    CHECK(state.at("a").as_list()[0].is_none());  // Python leaves such holes for empty dicts
    CHECK(state.at("b").as_list().size() == 3);
  }
  SECTION("ranks that did not agree on one .metadata") {
    REQUIRE(::rename((folder + "/.metadata").c_str(), (folder + "/__0.metadata").c_str()) == 0);
    CHECK_THAT(error(), Contains("use_collectives=True"));
  }
  SECTION("no folder") {
    CHECK_THAT(error_of([&] { DcpReader reader(second); }), Contains("it is a file"));
    CHECK_THAT(error_of([&] { DcpReader reader(dir.path("y")); }), Contains("No such file"));
  }
}

TEST_CASE("reading what is not there is an error that helps", "[checkpoint]") {
  TempDir dir;
  write_dcp(rows_and_values(), dir.path("x"));
  const DcpReader reader(dir.path("x"));

  CHECK_THAT(error_of([&] { reader.read("wieght"); }),
             Contains("has no \"wieght\"") && Contains("Did you mean \"weight\"?"));
  CHECK_THAT(error_of([&] { reader.read("epoch"); }), Contains("\"epoch\" is no tensor"));
  CHECK(reader.read_value("epoch").as_int() == 3);
  CHECK(reader.read_value("bias").as_tensor().numel() == 5);
  for (const auto& box : std::vector<std::pair<Sizes, Sizes>>{{{0, 0}, {6, 6}},
                                                              {{-1, 0}, {1, 6}},
                                                              {{0, 0}, {5, -1}},
                                                              {{0}, {5}},
                                                              {{INT64_MAX, 0}, {INT64_MAX, 1}}}) {
    CHECK_THAT(error_of([&] { reader.read("weight", box.first, box.second); }),
               Contains("does not lie in \"weight\" of shape [5, 6]"));
  }
}

TEST_CASE("trees that a sharded folder cannot hold are refused with the name", "[checkpoint]") {
  TempDir dir;
  const auto error = [&](const State& state) {
    return error_of([&] { write_dcp(state, dir.path("x")); });
  };
  CHECK_THAT(error(State(3)), Contains("is made of a dict, got a int"));
  CHECK_THAT(error(State::dict({{"a.b", 1}, {"a", State::dict({{"b", 2}})}})),
             Contains("the name \"a.b\""));
  CHECK_THAT(error(State::dict({{int64_t{1}, 1}, {"1", 2}})), Contains("the name \"1\""));
  State deep = 1;
  for (int i = 0; i < 400; ++i) deep = State::dict({{"x", deep}});
  CHECK_THAT(error(deep), Contains("deeper than 256"));
  TensorState wrong = shard(torch::ones({5, 6}), 0, 2, 0);
  wrong.chunks[0].tensor = torch::ones({2, 6});
  CHECK_THAT(
      error(State::dict({{"w", wrong}})),
      Contains("\"w\"") && Contains("is said to have [3, 6] at [0, 0] and holds float32 [2, 6]"));
  CHECK_THAT(error(State::dict({{"w", shard(torch::ones({5, 6}), 0, 2, 0)}})),
             Contains("no chunk of the tensor \"w\" of shape [5, 6] holds its element at [3, 0]"));
  CHECK_FALSE(exists(dir.path("x/.metadata")));
}
