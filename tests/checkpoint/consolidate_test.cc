#include "lightning/checkpoint/consolidate.h"

#include <torch/torch.h>

#include <catch2/catch.hpp>
#include <filesystem>
#include <fstream>

#include "lightning/checkpoint/checkpoint_file.h"
#include "lightning/checkpoint/checkpoint_io.h"
#include "lightning/checkpoint/dcp.h"
#include "lightning/checkpoint/torch_file.h"
#include "lightning/errors.h"
#include "lightning/version.h"
#include "tests/param/live_bytes.h"
#include "tests/support/learner.h"
#include "tests/support/python.h"
#include "tests/support/temp_dir.h"

using namespace lightning;
using namespace lightning::testing;
using Catch::Matchers::Contains;

namespace {

using Sizes = std::vector<int64_t>;

// In boxes of at most these sizes, which are dealt to the ranks in turn.
TensorState part_of(const at::Tensor& whole, const Sizes& most, int64_t rank, int64_t ranks) {
  TensorState state;
  state.sizes = whole.sizes().vec();
  state.dtype = whole.scalar_type();
  int64_t number = 0;
  Sizes offsets(state.sizes.size(), 0);
  while (true) {
    if (number++ % ranks == rank) {
      TensorState::Chunk chunk{offsets, {}, whole};
      for (size_t d = 0; d < offsets.size(); ++d) {
        const auto dim = static_cast<int64_t>(d);
        chunk.sizes.push_back(std::min(most[d], whole.size(dim) - offsets[d]));
        chunk.tensor = chunk.tensor.narrow(dim, offsets[d], chunk.sizes[d]);
      }
      state.chunks.push_back(std::move(chunk));
    }
    size_t d = offsets.size();
    while (d > 0 && (offsets[d - 1] += most[d - 1]) >= state.sizes[d - 1]) offsets[--d] = 0;
    if (d == 0) return state;
  }
}

// What three ranks save of a run, with boxes on all dims.
State run_of(int64_t rank) {
  torch::manual_seed(4);
  const auto part = [rank](const at::Tensor& whole, const Sizes& most) {
    return State(part_of(whole, most, rank, 3));
  };
  auto model = State::dict();
  model["rows"] = part(torch::randn({7, 5}), {3, 5});
  model["columns"] = part(torch::randn({700, 190}), {700, 64});
  model["boxes"] = part(torch::randn({5, 6, 7}).to(at::kBFloat16), {2, 5, 3});
  model["strided"] = part(torch::randn({9, 4}).t(), {4, 2});
  model["complex"] = part(torch::randn({4, 3}, at::kComplexFloat), {3, 3});
  model["scalar"] = part(torch::full({}, 2.5), {});
  model["empty"] = TensorState(torch::zeros({0, 3}));
  model["counts"] = part(torch::arange(11), {4});
  const auto state =
      State::dict({{"rows", State::dict({{"exp_avg", part(torch::randn({7, 5}), {3, 5})},
                                         {"step", part(torch::full({}, 3.0f), {})}})}});
  const auto group = State::dict({{"lr", 0.25},
                                  {"betas", State::Tuple{State::List{0.9, 0.99}}},
                                  {"params", State::List{"rows", "columns"}}});
  return State::dict(
      {{"model", model},
       {"optimizer_0", State::dict({{"state", state}, {"param_groups", State::List{group}}})}});
}

void save_run(const std::string& folder) {
  std::vector<DcpMetadata::Item> items;
  for (int64_t rank = 0; rank < 3; ++rank) {
    for (auto& item : write_dcp_rank(run_of(rank), folder, rank)) items.push_back(std::move(item));
  }
  const auto values = State::dict({{"epoch", 2},
                                   {"global_step", 8},
                                   {"pytorch-lightning_version", kPythonLightningVersion},
                                   {"loops", State::dict()}});
  write_torch_file(values, folder + "/meta.pt");
  write_dcp_metadata(items, folder);
}

}  // namespace

TEST_CASE("a sharded checkpoint becomes a file with all that it holds", "[checkpoint]") {
  const TempDir dir;
  save_run(dir.path("run"));
  consolidate_checkpoint(dir.path("run"), dir.path("run.consolidated"));
  const auto is = read_torch_file(dir.path("run.consolidated"));
  CHECK(differences(leaves_of(is), leaves_of(read_checkpoint_file(dir.path("run")))) == "");
  CHECK(leaves_of(is).size() == 18);

  consolidate_checkpoint(dir.path("run"), dir.path("run.ckpt"), {false, /*as_trainer=*/true});
  const auto trainer = read_torch_file(dir.path("run.ckpt"));
  CHECK(differences(leaves_of(trainer),
                    leaves_of(default_checkpoint_io()->load(dir.path("run")))) == "");
  const auto& optimizer = trainer.at("optimizer_states").as_list().at(0);
  CHECK(optimizer.at("state").at(0).at("exp_avg").as_tensor().sizes() == at::IntArrayRef({7, 5}));
}

TEST_CASE("pieces of a tensor of a folder are its bytes in row-major order", "[checkpoint]") {
  const TempDir dir;
  save_run(dir.path("run"));
  const DcpReader reader(dir.path("run"));
  const auto whole = reader.read("model.boxes");
  const auto bytes = static_cast<uint64_t>(whole.nbytes());
  const auto* const expected = static_cast<const char*>(whole.const_data_ptr());
  for (uint64_t begin = 0; begin <= bytes; begin += 14) {
    for (uint64_t end = begin; end <= bytes; end += 2) {
      std::string piece(end - begin, '?');
      reader.read_bytes("model.boxes", begin, end - begin, piece.data());
      if (piece != std::string(expected + begin, end - begin)) FAIL_CHECK(begin << " to " << end);
    }
  }
  char byte = 0;
  CHECK_THROWS_WITH(reader.read_bytes("model.boxes", 1, 2, &byte), Contains("no elements"));
  CHECK_THROWS_WITH(reader.read_bytes("model.boxes", bytes, 2, &byte), Contains("no elements"));
}

TEST_CASE("a checkpoint is consolidated without its tensors in memory", "[checkpoint]") {
  const TempDir dir;
  constexpr int64_t kRows = 1 << 18;
  write_dcp(State::dict({{"weight", part_of(torch::ones({kRows, 32}), {kRows / 4, 16}, 0, 1)}}),
            dir.path("run"));
  LiveBytes::now();
  LiveBytes::take_peak();
  consolidate_checkpoint(dir.path("run"), dir.path("file"));
  CHECK(LiveBytes::take_peak() < 1 << 20);
  CHECK(at::equal(read_torch_file(dir.path("file")).at("weight").as_tensor(),
                  torch::ones({kRows, 32})));
  CHECK(LiveBytes::take_peak() >= kRows * 32 * 4);  // that the counter counts
}

TEST_CASE("a consolidated file is what Python makes of the folder, of either's",
          "[checkpoint][python]") {
  const TempDir dir;
  save_run(dir.path("cpp"));
  run_python(R"(
import sys, torch
import torch.distributed.checkpoint as dcp
folder = sys.argv[1]
torch.manual_seed(1)
state = {"model": {"weight": torch.randn(33, 7), "half": torch.randn(5, 3, dtype=torch.bfloat16),
                   "scalar": torch.tensor(3.0)},
         "optimizer_0": {"param_groups": [{"lr": 0.5, "betas": (0.9, 0.99), "params": ["weight"]}]}}
dcp.save(state, checkpoint_id=folder + "/python")
torch.save({"epoch": 3, "nested": {"list": [1, "two", None]}}, folder + "/python/meta.pt")
)",
             {dir.path()});
  for (const char* name : {"cpp", "python"}) {
    consolidate_checkpoint(dir.path(name), consolidated_name(dir.path(name) + "/"));
  }
  const auto said = run_python(R"(
import pathlib, sys, torch
from lightning.fabric.utilities.load import _load_distributed_checkpoint
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
folder = sys.argv[1]
def same(a, b, path):
    assert type(a) is type(b), (path, type(a), type(b))
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b), path
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), (path, a.keys(), b.keys())
        for key in a: same(a[key], b[key], f"{path}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b)): same(x, y, f"{path}.{i}")
    else:
        assert a == b, (path, a, b)
for name in ("cpp", "python"):
    ours = torch.load(f"{folder}/{name}.consolidated", weights_only=True)
    same(ours, _load_distributed_checkpoint(pathlib.Path(folder) / name), name)
    dcp_to_torch_save(f"{folder}/{name}", f"{folder}/{name}.torch")
    same({key: ours[key] for key in ("model", "optimizer_0")},
         torch.load(f"{folder}/{name}.torch", weights_only=True), name)
    print(name, len(ours["model"]))
)",
                               {dir.path()});
  CHECK(said == "cpp 8\npython 3\n");
}

TEST_CASE("what cannot be consolidated is refused, and the output stays as it was",
          "[checkpoint]") {
  const TempDir dir;
  save_run(dir.path("run"));
  const auto refused = [&](const std::string& from, const std::string& to, const auto& says) {
    CHECK_THROWS_WITH(consolidate_checkpoint(dir.path(from), dir.path(to)), Contains(says));
  };
  refused("absent", "out", "No such file or directory");
  std::ofstream(dir.path("there")) << "mine";
  refused("run", "there", "exists. Move it away");
  refused("run", "run", "is a folder, which a file does not replace");
  write_torch_file(State::dict({{"a", 1}}), dir.path("file.ckpt"));
  refused("file.ckpt", "out", "it is one file already");
  namespace fs = std::filesystem;
  fs::create_directory(dir.path("empty"));
  refused("empty", "out", "it is an empty folder");
  const auto broken = [&](const char* name) {
    fs::copy(dir.path("run"), dir.path(name), fs::copy_options::recursive);
    return dir.path(name);
  };
  fs::remove(broken("unfinished") + "/.metadata");
  refused("unfinished", "out", "without its .metadata");
  fs::remove(broken("lacking") + "/__1_0.distcp");
  refused("lacking", "out", "its file __1_0.distcp, which holds");
  fs::resize_file(broken("cut") + "/__2_0.distcp", 9000);
  refused("cut", "out", "has 9000 bytes");
  const auto flipped = broken("flipped") + "/__0_0.distcp";
  {
    std::fstream file(flipped, std::ios::in | std::ios::out | std::ios::binary);
    file.seekp(static_cast<std::streamoff>(fs::file_size(flipped)) / 2);
    file.put('\x5a');
  }
  refused("flipped", "out", "CRC");
  CHECK_FALSE(fs::exists(dir.path("out")));

  std::string text;
  std::ifstream(dir.path("there")) >> text;
  CHECK(text == "mine");
  consolidate_checkpoint(dir.path("run"), dir.path("there"), {/*overwrite=*/true, false});
  CHECK(read_torch_file(dir.path("there")).at("epoch").as_int() == 2);
}
