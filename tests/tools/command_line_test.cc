#include "tools/lightning/command_line.h"

#include <torch/torch.h>

#include <catch2/catch.hpp>
#include <chrono>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <sstream>

#include "lightning/checkpoint/checkpoint_file.h"
#include "lightning/checkpoint/checkpoint_io.h"
#include "lightning/checkpoint/safetensors.h"
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

struct Result {
  int status;
  std::string out, err;
};

Result checkpoint(std::vector<std::string> arguments) {
  arguments.insert(arguments.begin(), "checkpoint");
  std::ostringstream out, err;
  const int status = tools::run(arguments, out, err);
  return {status, out.str(), err.str()};
}

// Whether a line of the text begins with `begin` (after its indentation) and has `rest`.
bool has_line(const std::string& text, const std::string& begin, const std::string& rest) {
  std::istringstream lines(text);
  for (std::string line; std::getline(lines, line);) {
    const auto at = line.find_first_not_of(' ');
    if (at != std::string::npos && line.compare(at, begin.size(), begin) == 0 &&
        line.find(rest, at + begin.size()) != std::string::npos) {
      return true;
    }
  }
  return false;
}

// A Trainer's checkpoint by Lightning 2.6.6: a.ckpt, with a path among its hyper-parameters.
constexpr const char* kTrain = R"(
import os, pathlib, sys, warnings, logging
warnings.simplefilter("ignore")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
import torch, lightning
from lightning.pytorch.callbacks import ModelCheckpoint, EarlyStopping
os.chdir(sys.argv[1])
class Model(lightning.LightningModule):
    def __init__(self, lr=0.125, folder=None):
        super().__init__()
        self.save_hyperparameters()
        self.encoder = torch.nn.Linear(3, 4, bias=False)
        self.norm = torch.nn.BatchNorm1d(4)
        self.decoder = torch.nn.Linear(4, 3)
        self.tied = torch.nn.Linear(3, 4, bias=False)
        self.tied.weight = self.encoder.weight
    def training_step(self, batch, i):
        loss = self.decoder(self.norm(self.encoder(batch))).square().mean()
        self.log("loss", loss)
        return loss
    def configure_optimizers(self):
        o = torch.optim.Adam(self.parameters(), lr=self.hparams.lr)
        return [o], [torch.optim.lr_scheduler.StepLR(o, 1)]
lightning.seed_everything(1, verbose=False)
data = torch.utils.data.DataLoader(torch.randn(8, 3), batch_size=4)
keep = ModelCheckpoint(dirpath=".", filename="a", monitor="loss")
trainer = lightning.Trainer(max_epochs=2, accelerator="cpu", logger=False, callbacks=[keep, EarlyStopping("loss", patience=9)],
    enable_progress_bar=False, enable_model_summary=False)
trainer.fit(Model(folder=pathlib.Path("/data/x")), data)
c = torch.load(keep.best_model_path, weights_only=False)
c["hyper_parameters"].pop("folder")
torch.save(c, "plain.ckpt")
torch.save(Model().state_dict(), "weights.pt")
print(keep.best_model_path)
)";

// One training for all tests of this file.
const std::string& trained() {
  static const TempDir dir;
  static const std::string path = [] {
    run_python(kTrain, {dir.path()});
    std::string found = dir.path("a.ckpt");
    return std::filesystem::exists(found) ? found : dir.path("missing");
  }();
  return path;
}

std::string plain() { return trained().substr(0, trained().rfind('/')) + "/plain.ckpt"; }

}  // namespace

TEST_CASE("show prints what Lightning's checkpoint holds, with objects by name", "[tools]") {
  const auto result = checkpoint({"show", trained()});
  INFO(result.out << result.err);
  REQUIRE(result.status == 0);
  CHECK(result.err.empty());
  CHECK_THAT(result.out, Contains("Trainer checkpoint of Lightning 2.6.6, torch.save"));
  CHECK(has_line(result.out, "global_step", "4"));
  // encoder, norm (weight, bias, mean, var, batches), decoder (weight, bias), tied
  CHECK(has_line(result.out, "weights", "9 tensors"));
  CHECK(has_line(result.out, "optimizers", "1: "));
  CHECK(has_line(result.out, "EarlyStopping{'monitor': 'loss', 'mode': 'min'}", ""));
  CHECK(has_line(result.out, "lr", "0.125"));
  CHECK(has_line(result.out, "pathlib.", ""));
  CHECK(has_line(result.out, "encoder.weight", "Tensor float32 [4, 3]"));
  CHECK(has_line(result.out, "tied.weight", "the memory of state_dict.encoder.weight"));
  CHECK(has_line(result.out, "norm.num_batches_tracked", "Tensor int64 [] = 4"));
}

TEST_CASE("show prints as many levels as asked for", "[tools]") {
  const auto summary = checkpoint({"show", "--depth", "0", plain()});
  CHECK_FALSE(has_line(summary.out, "encoder.weight", ""));
  CHECK(has_line(summary.out, "weights", "9 tensors"));
  const auto one = checkpoint({"show", "-d", "1", plain()});
  CHECK(has_line(one.out, "state_dict", "OrderedDict, 9 items"));
  CHECK_FALSE(has_line(one.out, "encoder.weight", ""));
  CHECK_FALSE(has_line(checkpoint({"show", plain()}).out, "exp_avg_sq", ""));
  CHECK(has_line(checkpoint({"show", "--all", plain()}).out, "exp_avg_sq", "[4, 3]"));
}

TEST_CASE("show gives programs JSON", "[tools]") {
  const auto result = checkpoint({"show", "--json", "--all", plain()});
  REQUIRE(result.status == 0);
  const auto json = nlohmann::json::parse(result.out);
  CHECK(json["format"] == "torch.save");
  CHECK(json["bytes"] == std::filesystem::file_size(plain()));
  const auto entry = [](const nlohmann::json& node, const std::string& key) {
    for (const auto& below : node.at("entries")) {
      if (below.at("key") == key) return below;
    }
    throw std::out_of_range(key);
  };
  CHECK(entry(json["tree"], "epoch")["value"] == 1);
  const auto weights = entry(json["tree"], "state_dict");
  CHECK(weights["type"] == "OrderedDict");
  const auto weight = entry(weights, "decoder.weight");
  CHECK(weight["dtype"] == "float32");
  CHECK(weight["shape"] == nlohmann::json({3, 4}));
  CHECK(weight["bytes"] == 48);
  CHECK(entry(weights, "tied.weight")["shares"] == "state_dict.encoder.weight");
}

TEST_CASE("show lets no name or text of a file steer the terminal", "[tools]") {
  TempDir dir;
  State state;
  state
      ["\x1b[2J\x07name\r\n\xc2\x9b"
       "31m\xe2\x80\xae"] = "\x1b]0;title\x07";
  state["state_dict"] = State::dict({{"\x1b[31mw", torch::ones(1)}});
  state["hyper_parameters"] = State::dict({{"\x1b[1m", "\x1b[5m"}});
  state["callbacks"] = State::dict({{"\x1b[7mEarly", State::dict()}});
  write_torch_file(state, dir.path("a.ckpt"));
  for (const auto& arguments : std::vector<std::vector<std::string>>{
           {"show", "--all", dir.path("a.ckpt")},
           {"show", "--all", "--json", dir.path("a.ckpt")},
           {"convert", dir.path("a.ckpt"), dir.path("a.safetensors")},
           {"verify", dir.path("a.ckpt"), dir.path("\x1b[2J")}}) {
    const auto result = checkpoint(arguments);
    const auto text = result.out + result.err;
    INFO(text);
    CHECK(text.find_first_of("\x1b\x07\r") == std::string::npos);
    CHECK(text.find("\xc2\x9b") == std::string::npos);
    CHECK(text.find("\xe2\x80\xae") == std::string::npos);
  }
  CHECK_THAT(checkpoint({"show", dir.path("a.ckpt")}).out,
             Contains("\\x1b[2J\\x07name\\r\\n\\x9b31m\\u202e"));
}

TEST_CASE("weights convert to safetensors, which Python reads equal", "[tools]") {
  TempDir dir;
  const auto to = dir.path("a.safetensors");
  const auto result = checkpoint({"convert", trained(), to});
  INFO(result.err);
  REQUIRE(result.status == 0);
  CHECK_THAT(result.err, Contains("left out, no weights: epoch, global_step") &&
                             Contains("optimizer_states") && Contains("hyper_parameters"));
  CHECK_THAT(result.err, Contains("tied tensors, each written on its own: encoder.weight, "
                                  "tied.weight"));
  CHECK(checkpoint({"convert", trained(), dir.path("a.pt")}).status == 0);
  CHECK(checkpoint({"convert", to, dir.path("b.pth")}).status == 0);
  CHECK(checkpoint({"convert", to, dir.path("b.ckpt")}).status == 0);
  CHECK(run_python(R"(
import sys, torch
from safetensors.torch import load_file
want = torch.load(sys.argv[1], weights_only=True)["state_dict"]
def same(got):
    return list(got) == list(want) and all(torch.equal(got[k], v) and got[k].dtype == v.dtype for k, v in want.items())
got = load_file(sys.argv[2])
print(sorted(got) == sorted(want) and same({k: got[k] for k in want}))
a = torch.load(sys.argv[3], weights_only=True)
print(same(a), a["tied.weight"].data_ptr() == a["encoder.weight"].data_ptr())
b = torch.load(sys.argv[4], weights_only=True)
print(same({k: b[k] for k in want}))
c = torch.load(sys.argv[5], weights_only=True)
print(same({k: c["state_dict"][k] for k in want}), c["pytorch-lightning_version"])
)",
                   {plain(), to, dir.path("a.pt"), dir.path("b.pth"), dir.path("b.ckpt")}) ==
        "True\nTrue True\nTrue\nTrue 2.6.6\n");
}

TEST_CASE("a checkpoint becomes a sharded folder and comes back, in Python too", "[tools]") {
  TempDir dir;
  const auto folder = dir.path("sharded");
  const auto result = checkpoint({"convert", plain(), folder});
  INFO(result.err);
  REQUIRE(result.status == 0);
  CHECK_THAT(result.err, Contains("order of the weights"));
  const auto shown = checkpoint({"show", "--all", folder});
  INFO(shown.out);
  CHECK_THAT(shown.out, Contains("torch.distributed.checkpoint"));
  CHECK(has_line(shown.out, "__0_0.distcp", "chunks"));
  CHECK(has_line(shown.out, "encoder.weight", "Tensor float32 [4, 3]"));
  CHECK(has_line(shown.out, "lr", "0.0012"));
  CHECK_THAT(checkpoint({"verify", folder}).out, Contains("ok ") && Contains("CRCs"));
  CHECK(checkpoint({"convert", folder + "/", dir.path("back.ckpt")}).status == 0);
  CHECK(checkpoint({"convert", "--layout", "model_parallel", plain(), dir.path("mp")}).status == 0);
  CHECK(checkpoint({"convert", dir.path("mp"), dir.path("mp.ckpt")}).status == 0);

  CHECK(run_python(R"(
import sys, torch, warnings
warnings.simplefilter("ignore")
from pathlib import Path
from lightning.fabric.utilities.load import _load_distributed_checkpoint
from lightning.pytorch.utilities.consolidate_checkpoint import _format_checkpoint
def same(a, b):
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return sorted(a, key=str) == sorted(b, key=str) and all(same(v, b[k]) for k, v in a.items())
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b
want = torch.load(sys.argv[1], weights_only=True)
for path in sys.argv[2:4]:
    print(same(want, torch.load(path, weights_only=True)))
lightning_reads = _format_checkpoint(_load_distributed_checkpoint(Path(sys.argv[4])))
print(same(dict(want["state_dict"]), dict(lightning_reads["state_dict"])))
state = lightning_reads["optimizer_states"][0]["state"]
print(sorted(state), same(want["optimizer_states"][0]["state"][0], state["encoder.weight"]))
print(same({k: v for k, v in want.items() if k not in ("state_dict", "optimizer_states")},
           {k: v for k, v in lightning_reads.items() if k not in ("state_dict", "optimizer_states")}))
)",
                   {plain(), dir.path("back.ckpt"), dir.path("mp.ckpt"), folder}) ==
        "True\nTrue\nTrue\n['decoder.bias', 'decoder.weight', 'encoder.weight', 'norm.bias', "
        "'norm.weight'] True\nTrue\n");
}

TEST_CASE("optimizers whose parameters cannot be told by name are refused, not guessed",
          "[tools]") {
  TempDir dir;
  State state = read_torch_file(plain());
  const auto convert = [&](const State& changed, std::vector<std::string> more = {}) {
    write_torch_file(changed, dir.path("odd.ckpt"));
    std::vector<std::string> arguments = {"convert", "--force", dir.path("odd.ckpt"),
                                          dir.path("d")};
    arguments.insert(arguments.end(), more.begin(), more.end());
    return checkpoint(arguments);
  };
  const State optimizer = state.at("optimizer_states").as_list()[0];
  State two_groups = optimizer;
  two_groups["param_groups"] = State::List{optimizer.at("param_groups").as_list()[0],
                                           optimizer.at("param_groups").as_list()[0]};
  State changed = state;
  changed["optimizer_states"] = State::List{two_groups};
  CHECK_THAT(convert(changed).err, Contains("2 groups") && Contains("--weights-only"));
  CHECK(convert(changed).status == 1);
  CHECK(convert(changed, {"--weights-only"}).status == 0);

  changed = state;
  changed["state_dict"]["extra.weight"] = torch::ones(1);
  CHECK_THAT(convert(changed).err, Contains("6 weights that are neither buffers nor tied"));
  changed = state;
  const auto larger = torch::ones({9, 3});
  changed["state_dict"]["encoder.weight"] = larger;
  changed["state_dict"]["tied.weight"] = larger;
  CHECK_THAT(convert(changed).err, Contains("encoder.weight") && Contains("[9, 3]"));
}

TEST_CASE("convert replaces nothing without --force, and never its input", "[tools]") {
  TempDir dir;
  const auto path = dir.path("w.safetensors");
  write_safetensors(path, {{{"w", torch::ones(3)}}, {{"note", "kept"}}});
  write_file(dir.path("b.pt"), "something");
  const auto refused = checkpoint({"convert", path, dir.path("b.pt")});
  CHECK(refused.status == 1);
  CHECK_THAT(refused.err, Contains("error: The output") && Contains("--force"));
  CHECK(read_file(dir.path("b.pt")) == "something");
  CHECK(checkpoint({"convert", "--force", path, dir.path("b.pt")}).status == 0);
  CHECK(detect_format(dir.path("b.pt")) == CheckpointFormat::kTorch);

  CHECK_THAT(checkpoint({"convert", "--force", path, path}).err, Contains("is the input"));
  CHECK(checkpoint({"convert", path, dir.path("c.safetensors")}).status == 0);
  CHECK(read_safetensors(dir.path("c.safetensors")).metadata.at("note") == "kept");
  CHECK(checkpoint({"convert", path, dir.path("c.txt")}).status == 2);
  CHECK(checkpoint({"convert", "--format", "onnx", path, dir.path("c")}).status == 2);
  CHECK(checkpoint({"convert", "--layout", "plain", path, dir.path("c.pt")}).status == 2);
  CHECK(checkpoint({"convert", path, dir.path("plain")}).status == 0);
  CHECK_FALSE(std::filesystem::exists(dir.path("plain/meta.pt")));
  write_torch_file(State::dict({{"epoch", 1}}), dir.path("none.pt"));
  CHECK_THAT(checkpoint({"convert", dir.path("none.pt"), dir.path("d.safetensors")}).err,
             Contains("no weights") && Contains("\"epoch\""));
  CHECK_FALSE(std::filesystem::exists(dir.path("d.safetensors")));
}

TEST_CASE("verify tells sound files from damaged and absent ones, with a line for each",
          "[tools]") {
  TempDir dir;
  write_safetensors(dir.path("w.safetensors"), {{{"w", torch::ones(3)}}, {}});
  const auto sound = checkpoint({"verify", trained(), dir.path("w.safetensors")});
  CHECK(sound.status == 0);
  CHECK(has_line(sound.out, "ok ", trained() + "  torch.save, "));
  CHECK(has_line(sound.out, "ok ", "safetensors, 1 tensor, "));
  CHECK_THAT(sound.out, Contains("no CRCs"));

  auto bytes = read_file(plain());
  bytes[bytes.find("data/3") + 200] ^= 1;
  write_file(dir.path("bad.ckpt"), bytes);
  write_file(dir.path("torn.ckpt"), bytes.substr(0, bytes.size() / 2));
  const auto broken = checkpoint({"verify", dir.path("bad.ckpt"), dir.path("torn.ckpt"), plain()});
  INFO(broken.out);
  CHECK(broken.status == 1);
  CHECK(has_line(broken.out, "broken ", "bad.ckpt"));
  CHECK(has_line(broken.out, "broken ", "torn.ckpt"));
  CHECK(has_line(broken.out, "ok ", "plain.ckpt"));
  const auto absent = checkpoint({"verify", dir.path("absent.ckpt"), plain()});
  CHECK(absent.status == 2);
  CHECK(has_line(absent.out, "absent ", "absent.ckpt"));
}

TEST_CASE("verify and show tell a Trainer's folder from one that no run can go on from",
          "[tools]") {
  TempDir dir;
  const auto whole = dir.path("whole"), lost = dir.path("lost"), empty = dir.path("empty");
  for (const auto& folder : {whole, lost, empty}) {
    REQUIRE(checkpoint({"convert", plain(), folder}).status == 0);
  }
  std::filesystem::remove(lost + "/meta.pt");
  write_file(empty + "/meta.pt", "");
  const auto sound = checkpoint({"verify", whole});
  CHECK(sound.status == 0);
  CHECK_THAT(sound.out, !Contains("meta.pt"));
  CHECK_THAT(checkpoint({"show", whole}).out, !Contains("cannot resume"));

  const auto without = checkpoint({"verify", lost});
  CHECK(without.status == 1);
  CHECK(has_line(without.out, "broken ", "fit cannot resume from it. Copy meta.pt"));
  CHECK(has_line(checkpoint({"show", lost}).out, "meta.pt", "not there: fit cannot resume"));
  CHECK_THAT(checkpoint({"show", "--json", lost}).out, Contains("\"has_meta\": false"));
  CHECK(checkpoint({"verify", empty}).status == 1);

  write_torch_file(State::dict({{"w", torch::ones(3)}}), dir.path("w.pt"));
  REQUIRE(checkpoint({"convert", dir.path("w.pt"), dir.path("alone")}).status == 0);
  const auto alone = checkpoint({"verify", dir.path("alone")});
  CHECK(alone.status == 0);
  CHECK(has_line(alone.out, "ok ", "without meta.pt: values to load, no run to resume"));
}

TEST_CASE("show opens a file of 50 GB at once", "[tools]") {
  TempDir dir;
  const auto path = dir.path("large.safetensors");
  const int64_t count = int64_t{50} << 28;
  const std::string header = R"({"w":{"dtype":"F32","shape":[)" + std::to_string(count) +
                             R"(],"data_offsets":[0,)" + std::to_string(4 * count) + "]}}";
  std::string begin(8, '\0');
  for (size_t i = 0; i < 8; ++i) begin[i] = static_cast<char>(header.size() >> (8 * i));
  std::ofstream(path, std::ios::binary) << begin << header;
  std::filesystem::resize_file(path, 8 + header.size() + static_cast<uint64_t>(4 * count));
  const auto start = std::chrono::steady_clock::now();
  const auto result = checkpoint({"show", path});
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
  std::filesystem::remove(path);
  CHECK(has_line(result.out, "w ", "50.0 GiB"));
  CHECK(seconds.count() < 1);
}

TEST_CASE("arguments that make no sense end with status 2, help with 0", "[tools]") {
  CHECK(checkpoint({}).status == 2);
  CHECK(checkpoint({"show"}).status == 2);
  CHECK(checkpoint({"shw", "x"}).status == 2);
  CHECK(checkpoint({"show", "x", "--depth", "-1"}).status == 2);
  CHECK_THAT(checkpoint({"show"}).err, Contains("error:") && Contains("FILE"));
  const auto help = checkpoint({"show", "--help"});
  CHECK(help.status == 0);
  CHECK_THAT(help.out, Contains("--json") && Contains("--depth"));
  std::ostringstream out, err;
  CHECK(tools::run({"--version"}, out, err) == 0);
  CHECK_THAT(out.str(), Contains("lightning "));
  const auto absent = checkpoint({"show", "/absent.ckpt"});
  CHECK(absent.status == 1);
  CHECK_THAT(absent.err, Contains("error: ") && Contains("/absent.ckpt"));
}
