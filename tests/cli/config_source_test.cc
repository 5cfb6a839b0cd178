#include "lightning/cli/config_source.h"

#include <catch2/catch.hpp>
#include <fstream>
#include <nlohmann/json.hpp>

#include "tests/support/python.h"
#include "tests/support/temp_dir.h"

namespace lightning::cli {
namespace {

using Catch::Contains;
using Catch::StartsWith;
using testing::TempDir;

Json read(const std::string& text) { return *parse_config(text, "c.yaml").value; }

TEST_CASE("a configuration's scalars have the types that Python's command line gives them",
          "[cli]") {
  const std::string text = R"(
a: 1
b: 1.0
c: 1e-3
d: 1.e3
e: -2E+4
f: "1e-3"
g: 'true'
h: true
i: null
j: ~
k:
l: text with spaces
m: 0x1f
n: 1_000
o: [1, 2.5, x]
p: {q: 1}
r: -0.5
s: "12"
t: e5
u: 1e
v: off
w: 1.2.3
x: 2024-01-01
)";
  const std::string python = R"(
import json, sys
from jsonargparse._loaders_dumpers import yaml_load
print(json.dumps(yaml_load(sys.argv[1])))
)";
  CHECK(read(text).dump() == Json::parse(testing::run_python(python, {text})).dump());
}

TEST_CASE("infinity is a number, and a time of day is text", "[cli]") {
  CHECK(read("a: .inf\nb: -.INF\nc: .nan").dump() == R"({"a":".inf","b":"-.inf","c":".nan"})");
  CHECK(read("a: 10:30:00:00").dump() == R"({"a":"10:30:00:00"})");
}

TEST_CASE("a key that is written twice is refused, with both lines", "[cli]") {
  CHECK_THROWS_WITH(read("model:\n  lr: 1\n  width: 2\n  lr: 3\n"),
                    StartsWith("c.yaml:4 ") && Contains("\"lr\"") && Contains("line 2"));
}

TEST_CASE("bad YAML is refused with file and line", "[cli]") {
  CHECK_THROWS_WITH(read("model:\n  lr: 1\n width: 3\n"),
                    StartsWith("c.yaml:3") && Contains("not valid YAML"));
  CHECK_THROWS_WITH(read("a: !!python/object:os.system x"), Contains("tag"));
  CHECK_THROWS_WITH(read("a: &a [*a]"), Contains("anchor"));
}

TEST_CASE("anchors and merges are followed", "[cli]") {
  CHECK(read("base: &b {lr: 1, width: 2}\nmodel:\n  <<: *b\n  lr: 3\n")["model"].dump() ==
        R"({"lr":3,"width":2})");
}

TEST_CASE("JSON is read too", "[cli]") {
  CHECK(read("{\"trainer\": {\"max_epochs\": 3, \"logger\": false}}").dump() ==
        R"({"trainer":{"max_epochs":3,"logger":false}})");
}

TEST_CASE("a source knows the line of each key", "[cli]") {
  const auto source = parse_config("a:\n- b: 1\n  c: 2\n- d: 3\n", "f.yaml");
  CHECK(source.place("a[0].c") == "f.yaml:3: ");
  CHECK(source.place("a[1]") == "f.yaml:4: ");
  CHECK(source.place("a[1].d.deeper") == "f.yaml:4: ");
  CHECK(source.place("elsewhere") == "f.yaml: ");
}

TEST_CASE("a missing file is named", "[cli]") {
  CHECK_THROWS_WITH(read_config("/no/such/config.yaml"),
                    Contains("/no/such/config.yaml") && Contains("does not exist"));
}

TEST_CASE("a configuration is written as it is read, with comments where they belong", "[cli]") {
  const Json value = read("b: {c: [], d: 1.0e-08, e: {x: 'yes'}}\na: [{k: 1, l: 2}]\n");
  CHECK(read(write_config(value)) == value);
  CHECK(write_config(value, {{"b.d", "small"}, {"a[0].l", "ell"}, {"a[0].k", "kay"}}) ==
        "b:\n  c: []\n  # small\n  d: 1.0e-08\n  e:\n    x: 'yes'\na:\n  # kay\n- k: 1\n  # ell\n"
        "  l: 2\n");
}

}  // namespace
}  // namespace lightning::cli
