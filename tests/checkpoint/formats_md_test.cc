// FORMATS.md shows the formats by example: its bytes are files, and the files are what it says.
#include <torch/torch.h>

#include <catch2/catch.hpp>
#include <map>
#include <sstream>

#include "lightning/checkpoint/checkpoint_file.h"
#include "lightning/checkpoint/dcp_metadata.h"
#include "lightning/checkpoint/safetensors.h"
#include "lightning/checkpoint/torch_file.h"
#include "lightning/files.h"
#include "tests/support/python.h"
#include "tests/support/temp_dir.h"

using namespace lightning;
using lightning::testing::run_python;
using lightning::testing::TempDir;

namespace {

// The bytes of a dump as `hexdump -C` prints it.
std::string bytes_of(const std::string& dump) {
  std::istringstream lines(dump);
  std::string bytes, before;
  bool repeats = false;
  for (std::string line; std::getline(lines, line);) {
    if (line == "*") {
      repeats = true;
      continue;
    }
    const auto offset = std::stoull(line.substr(0, 8), nullptr, 16);
    while (repeats && bytes.size() < offset) bytes += before;
    repeats = false;
    REQUIRE(bytes.size() == offset);
    std::istringstream values(line.substr(8, line.find('|') == std::string::npos ? 0 : 50));
    before.clear();
    for (std::string value; values >> value;) {
      before += static_cast<char>(std::stoi(value, nullptr, 16));
    }
    bytes += before;
  }
  return bytes;
}

// The dumps of the page by the names of their files.
std::map<std::string, std::string> examples() {
  const auto page = read_file("lightning/checkpoint/FORMATS.md");
  const std::string begin = "```hexdump ";
  std::map<std::string, std::string> found;
  for (auto at = page.find(begin); at != std::string::npos; at = page.find(begin, at + 1)) {
    const auto name = at + begin.size();
    const auto dump = page.find('\n', name) + 1;
    found[page.substr(name, dump - 1 - name)] =
        bytes_of(page.substr(dump, page.find("```", dump) - dump));
  }
  return found;
}

at::Tensor weight() { return torch::tensor({1.0F, 2.0F}); }

State tree() {
  State state;
  state["epoch"] = 1;
  state["state_dict"] = State::ordered_dict({{"w", weight()}});
  return state;
}

}  // namespace

TEST_CASE("the file of torch.save in FORMATS.md is read, and written to the byte", "[checkpoint]") {
  TempDir dir;
  const auto bytes = examples().at("example.ckpt");
  CHECK(bytes.size() == 1641);
  write_file(dir.path("example.ckpt"), bytes);
  const auto state = read_checkpoint_file(dir.path("example.ckpt"));
  CHECK(state.repr() == tree().repr());
  CHECK(torch::equal(state.at("state_dict").at("w").as_tensor(), weight()));

  write_torch_file(tree(), dir.path("ours.ckpt"));
  CHECK(read_file(dir.path("ours.ckpt")) == bytes);
  CHECK(run_python(R"(
import sys, torch
c = torch.load(sys.argv[1], weights_only=True)
print(c["epoch"], type(c["state_dict"]).__name__, dict(c["state_dict"])))",
                   {dir.path("example.ckpt")}) == "1 OrderedDict {'w': tensor([1., 2.])}\n");
}

TEST_CASE("the safetensors file in FORMATS.md is read, and written to the byte", "[checkpoint]") {
  TempDir dir;
  const auto bytes = examples().at("example.safetensors");
  write_file(dir.path("a"), bytes);
  const auto content = read_safetensors(dir.path("a"));
  const auto small = torch::tensor({1, 2}, torch::kByte);
  REQUIRE(content.tensors.size() == 2);
  CHECK(content.tensors[0].first == "w");
  CHECK(torch::equal(content.tensors[0].second, weight()));
  CHECK(content.tensors[1].first == "n");
  CHECK(torch::equal(content.tensors[1].second, small));
  write_safetensors(dir.path("b"), {{{"n", small}, {"w", weight()}}, {{"format", "pt"}}});
  CHECK(read_file(dir.path("b")) == bytes);
}

TEST_CASE("the .metadata in FORMATS.md is read, and written to the byte", "[checkpoint]") {
  const auto bytes = examples().at(".metadata");
  const auto metadata = DcpMetadata::parse(bytes);
  REQUIRE(metadata.items.size() == 1);
  const auto& item = metadata.items[0];
  CHECK(item.fqn == "w");
  CHECK(item.is_tensor);
  CHECK(item.dtype == DType::kFloat32);
  CHECK(item.sizes == std::vector<int64_t>{2});
  REQUIRE(item.chunks.size() == 1);
  CHECK(item.chunks[0].sizes == std::vector<int64_t>{2});
  CHECK(item.chunks[0].place.file == "__0_0.distcp");
  CHECK(item.chunks[0].place.offset == 0);
  CHECK(item.chunks[0].place.bytes == 1577);
  CHECK(metadata.to_pickle() == bytes);
}
