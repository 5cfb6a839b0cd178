#include "lightning/checkpoint/safetensors.h"

#include <signal.h>
#include <sys/resource.h>
#include <torch/torch.h>

#include <catch2/catch.hpp>
#include <filesystem>
#include <fstream>
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

const std::vector<at::ScalarType> kAllDtypes = {at::kDouble,
                                                at::kFloat,
                                                at::kHalf,
                                                at::kBFloat16,
                                                at::kLong,
                                                at::kInt,
                                                at::kShort,
                                                at::kChar,
                                                at::kUInt64,
                                                at::kUInt32,
                                                at::kUInt16,
                                                at::kByte,
                                                at::kBool,
                                                at::kComplexFloat,
                                                at::kFloat8_e4m3fn,
                                                at::kFloat8_e5m2,
                                                at::kFloat8_e8m0fnu,
                                                at::kFloat8_e4m3fnuz,
                                                at::kFloat8_e5m2fnuz,
                                                at::kFloat4_e2m1fn_x2};

// A tensor of any dtype with the bytes 0, 1, 2, ... (bools alternate).
at::Tensor counting(at::ScalarType dtype, std::vector<int64_t> sizes) {
  auto tensor = torch::empty(sizes, dtype);
  auto* bytes = static_cast<unsigned char*>(tensor.mutable_data_ptr());
  const auto count = static_cast<size_t>(tensor.numel()) * tensor.element_size();
  for (size_t i = 0; i < count; ++i) bytes[i] = (dtype == at::kBool ? i % 2 : i) & 0x3f;
  return tensor;
}

std::string bytes_of(const at::Tensor& tensor) {
  const auto values = tensor.contiguous();
  return {static_cast<const char*>(values.const_data_ptr()),
          static_cast<size_t>(values.numel()) * values.element_size()};
}

bool same(const at::Tensor& a, const at::Tensor& b) {
  return a.scalar_type() == b.scalar_type() && a.sizes() == b.sizes() && bytes_of(a) == bytes_of(b);
}

const at::Tensor& named(const SafetensorsContent& content, const std::string& name) {
  for (const auto& [key, tensor] : content.tensors) {
    if (key == name) return tensor;
  }
  throw std::out_of_range(name);
}

std::string file_of(const std::string& header, const std::string& data) {
  std::string length(8, '\0');
  for (size_t i = 0; i < 8; ++i) length[i] = static_cast<char>(header.size() >> (8 * i));
  return length + header + data;
}

std::vector<std::string> names_in(const std::string& folder) {
  std::vector<std::string> names;
  for (const auto& item : std::filesystem::directory_iterator(folder)) {
    names.push_back(item.path().filename().string());
  }
  return names;
}

}  // namespace

TEST_CASE("every dtype goes into a safetensors file and comes back, through Python as well",
          "[checkpoint]") {
  TempDir dir;
  SafetensorsContent content;
  for (const auto dtype : kAllDtypes) {
    content.tensors.emplace_back(c10::getDtypeNames(dtype).first, counting(dtype, {3, 4}));
  }
  content.tensors.emplace_back("scalar", torch::tensor(2.5).squeeze());
  content.tensors.emplace_back("none", torch::zeros({0, 3}));
  content.tensors.emplace_back("größe 大", torch::ones(1));
  content.metadata = {{"epoch", "3"}, {"quote\"", "line\nend"}};

  write_safetensors(dir.path("a.safetensors"), content);
  // Python reads it, makes its own file of it, and tells what it found.
  const auto found = run_python(R"(
import sys, torch
from safetensors import safe_open
from safetensors.torch import save_file
with safe_open(sys.argv[1], "pt") as f:
    tensors = {name: f.get_tensor(name) for name in f.keys()}
    save_file(tensors, sys.argv[2], metadata=f.metadata())
    quote = f.metadata()["quote\""]
print(len(tensors), tensors["scalar"].item(), tensors["float64"].shape, quote == "line\nend")
)",
                                {dir.path("a.safetensors"), dir.path("b.safetensors")});
  CHECK(found == "23 2.5 torch.Size([3, 4]) True\n");

  for (const auto* file : {"a.safetensors", "b.safetensors"}) {
    const auto read = read_safetensors(dir.path(file));
    CHECK(read.metadata == content.metadata);
    REQUIRE(read.tensors.size() == content.tensors.size());
    for (const auto& [name, tensor] : content.tensors) {
      INFO(file << " " << name);
      CHECK(same(named(read, name), tensor));
    }
  }
}

TEST_CASE("tensors of any strides are written row by row", "[checkpoint]") {
  TempDir dir;
  const auto base = torch::arange(24, torch::kFloat).view({4, 6});
  const std::vector<std::pair<std::string, at::Tensor>> tensors = {
      {"transposed", base.t()},
      {"every other", base.slice(1, 0, 6, 2)},
      {"expanded", torch::ones({1}).expand({3, 2})},
      {"conjugate", torch::complex(base, base).conj()},
      {"needs grad", torch::ones(2, torch::requires_grad())},
      {"packed", counting(at::kFloat4_e2m1fn_x2, {4, 6}).slice(0, 0, 4, 2)}};
  write_safetensors(dir.path("a"), {tensors, {}});
  const auto read = read_safetensors(dir.path("a"));
  CHECK(torch::equal(named(read, "transposed"), base.t()));
  CHECK(torch::equal(named(read, "every other"), base.slice(1, 0, 6, 2)));
  CHECK(torch::equal(named(read, "expanded"), torch::ones({3, 2})));
  CHECK(torch::equal(named(read, "conjugate"), torch::complex(base, -base)));
  CHECK(torch::equal(named(read, "needs grad"), torch::ones(2)));
  CHECK(named(read, "packed").sizes() == c10::IntArrayRef({2, 6}));
}

TEST_CASE("the bytes of a safetensors file are those of the format's page", "[checkpoint]") {
  TempDir dir;
  write_safetensors(
      dir.path("a"),
      {{{"n", torch::tensor({1, 2}, torch::kByte)}, {"w", torch::tensor({1.0f})}}, {{"k", "v"}}});
  const std::string header =
      R"({"__metadata__":{"k":"v"},"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},)"
      R"("n":{"dtype":"U8","shape":[2],"data_offsets":[4,6]}})";
  const std::string padding((8 - header.size() % 8) % 8, ' ');
  CHECK(read_file(dir.path("a")) ==
        file_of(header + padding, std::string("\x00\x00\x80\x3f\x01\x02", 6)));
}

TEST_CASE("what the format cannot hold is refused by name, and no file is begun", "[checkpoint]") {
  TempDir dir;
  const auto writing = [&](SafetensorsContent content) {
    write_safetensors(dir.path("a"), content);
  };
  CHECK_THROWS_WITH(writing({{{"w.x", torch::zeros(1, torch::kComplexDouble)}}, {}}),
                    Contains("\"w.x\" is complex128") && Contains("float32"));
  CHECK_THROWS_WITH(writing({{{"s", torch::zeros({2, 2}).to_sparse()}}, {}}),
                    Contains("\"s\"") && Contains("dense"));
  CHECK_THROWS_WITH(writing({{{"m", torch::zeros(1, torch::kMeta)}}, {}}), Contains("\"m\""));
  CHECK_THROWS_WITH(writing({{{"a", torch::zeros(1)}, {"a", torch::zeros(1)}}, {}}),
                    Contains("\"a\" is taken twice"));
  CHECK_THROWS_WITH(writing({{{"__metadata__", torch::zeros(1)}}, {}}), Contains("format's own"));
  CHECK_THROWS_WITH(writing({{{"\xff", torch::zeros(1)}}, {}}), Contains("not UTF-8"));
  CHECK(names_in(dir.path()).empty());
}

TEST_CASE("a broken safetensors file is refused with its name and what is wrong", "[checkpoint]") {
  TempDir dir;
  const std::string four(4, '\0');
  const auto entry = [](const std::string& name, const std::string& dtype, const std::string& shape,
                        const std::string& offsets) {
    return '"' + name + R"(":{"dtype":")" + dtype + R"(","shape":)" + shape +
           R"(,"data_offsets":)" + offsets + "}";
  };
  const auto good = entry("a", "F32", "[1]", "[0,4]");
  const std::vector<std::pair<std::string, std::string>> cases = {
      {"", "only 0 bytes"},
      {"1234567", "only 7 bytes"},
      {"PK\3\4 and so on, a zip file", "not a safetensors file"},
      {file_of("{" + good + "}", four).substr(0, 30), "cut short"},
      {file_of("{" + good + "}", ""), "take 4 bytes, the file has 0"},
      {file_of("{" + good + "}", four + four), "take 4 bytes, the file has 8"},
      {file_of(" {" + good + "}", four), "does not begin with {"},
      {file_of("{" + good, four), "no JSON"},
      {file_of("{" + good + "} x", four), "no JSON"},
      {file_of("{" + good + "," + good + "}", four), "the key \"a\" is there twice"},
      {file_of("{" + good + "," + entry("b", "F32", "[1]", "[2,6]") + "}", four + "12"),
       "begins at"},
      {file_of("{" + good + "," + entry("b", "F32", "[1]", "[5,9]") + "}", four + "12345"),
       "begins at"},
      {file_of("{" + entry("a", "F32", "[2]", "[0,4]") + "}", four), "needs 8 bytes"},
      {file_of("{" + entry("a", "F32", "[1]", "[4,0]") + "}", four), "lies at [4, 0)"},
      {file_of("{" + entry("a", "F32", "[4294967296,4294967296,4]", "[0,0]") + "}", ""), "counted"},
      {file_of(
           "{" + entry("a", "F32", "[0,9223372036854775807,9223372036854775807]", "[0,0]") + "}",
           ""),
       "counted"},
      {file_of("{" + entry("a", "F32", "[18446744073709551615]", "[0,4]") + "}", four), "counted"},
      {file_of("{" + entry("a", "F32", "[-1]", "[0,4]") + "}", four), "negative"},
      {file_of("{" + entry("a", "F32", "[1.0]", "[0,4]") + "}", four), "fraction"},
      {file_of("{" + entry("a", "F99", "[1]", "[0,4]") + "}", four), "dtype F99"},
      {file_of("{" + entry("a", "F4", "[3]", "[0,2]") + "}", "12"), "odd number"},
      {file_of("{" + entry("a", "F32", "[1]", "[0]") + "}", four), "lacks"},
      {file_of("{" + entry("a", "F32", "[[1]]", "[0,4]") + "}", four), "a list"},
      {file_of("{" + entry("a", "F32", "{}", "[0,4]") + "}", four), "a map"},
      {file_of("{" + entry("a", "F32", "[" + std::string(200, '1') + "]", "[0,4]") + "}", four),
       "a"},
      {file_of(R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4],"x":1}})", four), "\"x\""},
      {file_of(R"({"a":1})", ""), "a number"},
      {file_of(R"({"__metadata__":{"a":1}})", ""), "a number"},
      {file_of(R"({"__metadata__":{"a":null}})", ""), "null"},
      {file_of(std::string(100000, '['), ""), "does not begin"},
      {file_of("{\"a\":" + std::string(100000, '['), ""), "a list"},
      {file_of("{" + entry("a", "BOOL", "[4]", "[0,4]") + "}", "\1\1\2\1"), "no bools"},
  };
  for (const auto& [bytes, reason] : cases) {
    INFO(bytes.substr(0, 200));
    write_file(dir.path("a"), bytes);
    CHECK_THROWS_AS(read_safetensors(dir.path("a")), CheckpointError);
    CHECK_THROWS_WITH(read_safetensors(dir.path("a")), Contains(dir.path("a")) && Contains(reason));
  }
  CHECK_THROWS_WITH(read_safetensors(dir.path("absent")), Contains("No such file"));
  CHECK_THROWS_WITH(read_safetensors(dir.path()), Contains("Is a directory"));
}

TEST_CASE("mutants of a safetensors file are read or refused, never more", "[checkpoint]") {
  TempDir dir;
  SafetensorsContent content{{{"a.weight", torch::ones({2, 3})},
                              {"b", torch::ones({4}, torch::kBool)},
                              {"c", torch::ones({}, torch::kLong)}},
                             {{"key", "value"}}};
  write_safetensors(dir.path("a"), content);
  const auto whole = read_file(dir.path("a"));
  std::mt19937 random(7);
  const auto below = [&](size_t n) { return static_cast<size_t>(random() % n); };
  int refused = 0;
  for (int i = 0; i < 1000; ++i) {
    auto mutant = whole;
    for (size_t edits = 1 + below(3); edits > 0; --edits) {
      switch (below(4)) {
        case 0:
          mutant[below(mutant.size())] = static_cast<char>(random());
          break;
        case 1:
          mutant.resize(1 + below(mutant.size()));
          break;
        case 2:
          mutant.insert(below(mutant.size()), 1 + below(9), "0[{\"9,:-"[below(8)]);
          break;
        default:
          mutant.erase(below(mutant.size()), 1 + below(4));
      }
      if (mutant.empty()) mutant = whole;
    }
    std::ofstream(dir.path("b"), std::ios::binary) << mutant;
    try {
      read_safetensors(dir.path("b"));
    } catch (const CheckpointError&) {
      ++refused;
    }
  }
  CHECK(refused > 500);
}

TEST_CASE("a write that fails keeps the earlier file and leaves nothing beside it",
          "[checkpoint]") {
  TempDir dir;
  const auto path = dir.path("a");
  write_safetensors(path, {{{"w", torch::ones(3)}}, {}});

  // A full disk, as far as it can be had without one: files may not grow beyond 4 KiB.
  signal(SIGXFSZ, SIG_IGN);
  rlimit before{};
  getrlimit(RLIMIT_FSIZE, &before);
  const rlimit tight{4096, before.rlim_max};
  setrlimit(RLIMIT_FSIZE, &tight);
  std::string message;
  try {
    write_safetensors(path, {{{"w", torch::ones(100000)}}, {}});
  } catch (const CheckpointError& error) {
    message = error.what();
  }
  setrlimit(RLIMIT_FSIZE, &before);
  signal(SIGXFSZ, SIG_DFL);

  CHECK_THAT(message, Contains(path) && Contains("400072 bytes") && Contains("File too large"));
  CHECK(torch::equal(named(read_safetensors(path), "w"), torch::ones(3)));
  CHECK(names_in(dir.path()) == std::vector<std::string>{"a"});
}

TEST_CASE("a path that cannot be a file is refused", "[checkpoint]") {
  TempDir dir;
  const SafetensorsContent content{{{"w", torch::ones(3)}}, {}};
  CHECK_THROWS_WITH(write_safetensors(dir.path(), content),
                    Contains("Is a directory") && Contains("another name"));
  write_safetensors(dir.path("new/folders/a"), content);
  CHECK_THROWS_WITH(write_safetensors(dir.path("new/folders/a/b"), content),
                    Contains("new/folders/a"));
}
