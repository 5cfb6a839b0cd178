#include <fcntl.h>
#include <torch/torch.h>
#include <unistd.h>

#include <catch2/catch.hpp>
#include <cerrno>
#include <filesystem>

#include "lightning/checkpoint/checkpoint_io.h"
#include "lightning/checkpoint/dcp.h"
#include "lightning/checkpoint/safetensors.h"
#include "lightning/errors.h"
#include "lightning/files.h"
#include "lightning/log.h"
#include "tests/support/python.h"
#include "tests/support/temp_dir.h"

using Catch::Matchers::Contains;
using namespace lightning;
using lightning::testing::run_python;
using lightning::testing::TempDir;

// Stands in for the system's: a file system without links refuses them so.
namespace {
int refuse_links_with = 0;
}
extern "C" int symlink(const char* target, const char* place) noexcept {
  if (refuse_links_with == 0) return symlinkat(target, AT_FDCWD, place);
  errno = refuse_links_with;
  return -1;
}

namespace {

State checkpoint(int64_t epoch = 3) {
  State state;
  state["epoch"] = epoch;
  state["global_step"] = 12;
  state["pytorch-lightning_version"] = "2.6.6";
  state["state_dict"] = State::ordered_dict(
      {{"net.weight", torch::arange(6, torch::kFloat).view({2, 3})}, {"net.bias", torch::ones(2)}});
  state["loops"] = State::dict();
  return state;
}

std::string target_of(const std::string& link) {
  char text[4096];
  const ssize_t bytes = ::readlink(link.c_str(), text, sizeof(text));
  return bytes < 0 ? "" : std::string(text, static_cast<size_t>(bytes));
}

int64_t epoch_in(const std::string& path) {
  return default_checkpoint_io()->load(path).at("epoch").as_int();
}

std::vector<std::string> names_in(const std::string& folder) {
  std::vector<std::string> names;
  for (const auto& item : std::filesystem::directory_iterator(folder)) {
    names.push_back(item.path().filename().string());
  }
  std::sort(names.begin(), names.end());
  return names;
}

}  // namespace

TEST_CASE("a checkpoint comes back as it was saved, over an earlier one too", "[checkpoint]") {
  TempDir dir;
  const auto io = default_checkpoint_io();
  io->save(checkpoint(1), dir.path("run/a.ckpt"));
  io->save(checkpoint(3), dir.path("run/a.ckpt"));
  const auto state = io->load(dir.path("run/a.ckpt"));
  CHECK(state.repr() == checkpoint(3).repr());
  CHECK(torch::equal(state.at("state_dict").at("net.weight").as_tensor(),
                     torch::arange(6, torch::kFloat).view({2, 3})));
  CHECK(names_in(dir.path("run")) == std::vector<std::string>{"a.ckpt"});
}

TEST_CASE("Python's torch.load(weights_only=True) reads what is saved, and the other way round",
          "[checkpoint]") {
  TempDir dir;
  const auto io = default_checkpoint_io();
  io->save(checkpoint(), dir.path("a.ckpt"));
  CHECK(run_python(R"(
import sys, torch
from collections import OrderedDict
c = torch.load(sys.argv[1], weights_only=True)
print(list(c), c["epoch"], type(c["state_dict"]) is OrderedDict, c["state_dict"]["net.weight"].tolist())
c["epoch"] = 7
torch.save(c, sys.argv[2])
torch.save(c["state_dict"], sys.argv[3])
)",
                   {dir.path("a.ckpt"), dir.path("b.ckpt"), dir.path("weights.pt")}) ==
        "['epoch', 'global_step', 'pytorch-lightning_version', 'state_dict', 'loops'] 3 True "
        "[[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]\n");
  CHECK(epoch_in(dir.path("b.ckpt")) == 7);
  const auto weights = io->load(dir.path("weights.pt"));
  CHECK(torch::equal(weights.at("state_dict").at("net.bias").as_tensor(), torch::ones(2)));
}

TEST_CASE("weights alone and sharded folders are loaded as a Trainer's checkpoint",
          "[checkpoint]") {
  TempDir dir;
  const auto io = default_checkpoint_io();
  write_safetensors(dir.path("a.safetensors"), {{{"w", torch::ones(3)}}, {}});
  CHECK(torch::equal(io->load(dir.path("a.safetensors")).at("state_dict").at("w").as_tensor(),
                     torch::ones(3)));

  // As Lightning's FSDPStrategy lays it out; optimizers by the names of parameters.
  const auto group = State::dict({{"lr", 0.1}, {"params", State::List{"b", "a"}}});
  State sharded;
  sharded["model"] = State::dict({{"a", torch::ones(1)}, {"b", torch::zeros(1)}});
  sharded["optimizer_0"] = State::dict(
      {{"state", State::dict({{"a", State::dict({{"exp_avg", torch::full({1}, 5.0)}})},
                              {"b", State::dict({{"exp_avg", torch::full({1}, 6.0)}})}})},
       {"param_groups", State::List{group}}});
  write_dcp(sharded, dir.path("sharded"));
  State rest = checkpoint(9);
  rest.as_dict().erase("state_dict");
  io->save(rest, dir.path("sharded/meta.pt"));

  const auto state = io->load(dir.path("sharded"));
  CHECK(state.at("epoch").as_int() == 9);
  CHECK(torch::equal(state.at("state_dict").at("a").as_tensor(), torch::ones(1)));
  const auto& optimizer = state.at("optimizer_states").as_list().at(0);
  CHECK(optimizer.at("state").at(int64_t{0}).at("exp_avg").as_tensor().item<float>() == 6);
  CHECK(optimizer.at("state").at(int64_t{1}).at("exp_avg").as_tensor().item<float>() == 5);
  CHECK(optimizer.at("param_groups").as_list()[0].at("params").repr() == "[0, 1]");
  CHECK_FALSE(state.contains("model"));
  CHECK_FALSE(state.contains("optimizer_0"));
}

TEST_CASE("a flipped bit in a tensor is refused with the record's name", "[checkpoint]") {
  TempDir dir;
  const auto path = dir.path("a.ckpt");
  default_checkpoint_io()->save(checkpoint(), path);
  auto bytes = read_file(path);
  const float two = 2;
  const auto at = bytes.find(std::string(reinterpret_cast<const char*>(&two), sizeof(two)));
  REQUIRE(at != std::string::npos);
  bytes[at] = static_cast<char>(bytes[at] ^ 1);
  write_file(path, bytes);
  CHECK_THROWS_WITH(epoch_in(path), Contains(path) && Contains("data/0"));
}

TEST_CASE("a file that is no checkpoint is refused with what it is and what to do",
          "[checkpoint]") {
  TempDir dir;
  const auto path = dir.path("a.ckpt");
  CHECK_THROWS_WITH(epoch_in(path), Contains(path) && Contains("Check the path"));
  CHECK_THROWS_WITH(epoch_in(dir.path()), Contains("empty folder"));
  const std::string legacy("\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19.", 15);
  const std::vector<std::pair<std::string, std::string>> cases = {
      {"", "is empty"},
      {legacy, "before torch 1.6"},
      {std::string("\x80\x04K\x01.", 5), "plain pickle"},
      {"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"},
      {"<!DOCTYPE html>", "failed download"},
      {"GGUF....", "GGUF"},
      {"\x1f\x8b....", "gzip"},
      {std::string(4096, '\0'), "begins with zeros"},
      {"epoch: 3\n", "no format that is known"},
  };
  for (const auto& [bytes, reason] : cases) {
    INFO(reason);
    write_file(path, bytes);
    CHECK_THROWS_AS(epoch_in(path), CheckpointError);
    CHECK_THROWS_WITH(epoch_in(path), Contains(path) && Contains(reason));
  }
  run_python(R"(
import sys, zipfile
with zipfile.ZipFile(sys.argv[1], "w") as z:
    z.writestr("word/document.xml", "text")
)",
             {path});
  CHECK_THROWS_WITH(epoch_in(path), Contains("zip file of something else"));

  std::filesystem::create_directory(dir.path("half"));
  write_file(dir.path("half/__0_0.distcp"), "x");
  CHECK_THROWS_WITH(epoch_in(dir.path("half")), Contains("not finished"));
  default_checkpoint_io()->save(State::List{1}, path);
  CHECK_THROWS_WITH(epoch_in(path), Contains("holds a list") && Contains(path));
}

TEST_CASE("a link is relative, and replaces a link, a file or a folder", "[checkpoint]") {
  TempDir dir;
  const auto io = default_checkpoint_io();
  io->save(checkpoint(1), dir.path("run/epoch=1.ckpt"));
  io->save(checkpoint(2), dir.path("run/epoch=2.ckpt"));
  const auto last = dir.path("run/last.ckpt");

  io->link(dir.path("run/epoch=1.ckpt"), last);
  CHECK(target_of(last) == "epoch=1.ckpt");
  io->link(dir.path("run/epoch=2.ckpt"), last);
  CHECK(target_of(last) == "epoch=2.ckpt");
  CHECK(epoch_in(last) == 2);

  io->remove(last);  // the link alone
  CHECK(epoch_in(dir.path("run/epoch=2.ckpt")) == 2);
  io->save(checkpoint(5), last);
  io->link(dir.path("run/epoch=1.ckpt"), last);
  CHECK(target_of(last) == "epoch=1.ckpt");

  io->remove(last);
  io->save(checkpoint(5), last + "/inner/file");
  io->link(dir.path("run/epoch=1.ckpt"), last);
  CHECK(target_of(last) == "epoch=1.ckpt");
  CHECK(names_in(dir.path("run")) ==
        std::vector<std::string>{"epoch=1.ckpt", "epoch=2.ckpt", "last.ckpt"});

  io->link(dir.path("run/epoch=1.ckpt"), dir.path("links/deep/last.ckpt"));
  CHECK(target_of(dir.path("links/deep/last.ckpt")) == "../../run/epoch=1.ckpt");
  CHECK(epoch_in(dir.path("links/deep/last.ckpt")) == 1);
  io->link(dir.path("run/epoch=1.ckpt"), dir.path("run/epoch=1.ckpt"));  // itself: it stays
  CHECK(epoch_in(dir.path("run/epoch=1.ckpt")) == 1);
  CHECK_THROWS_WITH(io->link(dir.path("run/absent.ckpt"), last), Contains("absent.ckpt"));
}

TEST_CASE("where there are no links a file or a folder is copied", "[checkpoint]") {
  TempDir dir;
  const auto io = default_checkpoint_io();
  io->save(checkpoint(1), dir.path("a.ckpt"));
  write_dcp(State::dict({{"epoch", 8}, {"w", torch::ones(3)}}), dir.path("sharded"));
  refuse_links_with = EPERM;
  io->link(dir.path("a.ckpt"), dir.path("last.ckpt"));
  CHECK(read_file(dir.path("a.ckpt")) == read_file(dir.path("last.ckpt")));
  io->link(dir.path("sharded"), dir.path("last.ckpt"));
  io->link(dir.path("sharded"), dir.path("last.ckpt"));
  refuse_links_with = ENOSPC;
  CHECK_THROWS_WITH(io->link(dir.path("a.ckpt"), dir.path("last.ckpt")), Contains("No space"));
  refuse_links_with = 0;
  CHECK(target_of(dir.path("last.ckpt")).empty());
  CHECK(epoch_in(dir.path("last.ckpt")) == 8);
  CHECK(names_in(dir.path()) == std::vector<std::string>{"a.ckpt", "last.ckpt", "sharded"});
}

TEST_CASE("a checkpoint is removed, be it a file, a folder, a link or not there", "[checkpoint]") {
  TempDir dir;
  const auto io = default_checkpoint_io();
  io->save(checkpoint(), dir.path("a.ckpt"));
  io->link(dir.path("a.ckpt"), dir.path("last.ckpt"));
  write_dcp(State::dict({{"w", torch::ones(3)}}), dir.path("sharded"));
  for (const char* name : {"last.ckpt", "a.ckpt", "sharded"}) io->remove(dir.path(name));
  CHECK_NOTHROW(io->remove(dir.path("absent")));
  CHECK(std::filesystem::is_empty(dir.path()));
}
