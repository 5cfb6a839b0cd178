#include "lightning/hparams.h"

#include <catch2/catch.hpp>
#include <nlohmann/json.hpp>

#include "lightning/files.h"
#include "tests/support/python.h"
#include "tests/support/temp_dir.h"

using Catch::Contains;
using lightning::Json;
using lightning::load_hparams_from_yaml;
using lightning::merge_hparams;
using lightning::MisconfigurationError;
using lightning::sanitize_hparams;
using lightning::save_hparams_to_yaml;
using lightning::testing::run_python;
using lightning::testing::TempDir;

namespace {

const char* const kHparams = R"({
  "lr": 1e-05, "whole": 2.0, "big": 1e+16, "n": 3, "on": true, "none": null, "name": "adam",
  "list": [1, 2.5, "it's", "a \"b\" 'c'", null, false, [], {"k": 1e-07}, "caf\u00e9\n\t\\"],
  "opt": {"betas": [0.9, 0.999], "inner": {"deep": 1}}, "blocks": [{"w": 1}, {"w": {"x": 2}}],
  "empty_list": [], "empty_map": {}, "text": "yes"
})";

}  // namespace

TEST_CASE("hyper-parameters are flattened and made plain as the original does", "[hparams]") {
  const auto theirs = run_python(R"(
import json, sys
from lightning.fabric.utilities.logger import _flatten_dict, _sanitize_params
print(json.dumps(_sanitize_params(_flatten_dict(json.loads(sys.argv[1])))))
)",
                                 {kHparams});
  CHECK(sanitize_hparams(Json::parse(kHparams)).dump() == Json::parse(theirs).dump());
  CHECK(std::isinf(sanitize_hparams({{"max", ".inf"}})["max"].get<double>()));
}

TEST_CASE("hparams.yaml is the original's and reads back equal", "[hparams]") {
  TempDir dir;
  const auto hparams = Json::parse(kHparams);
  save_hparams_to_yaml(dir.path("ours.yaml"), hparams);
  run_python(R"(
import json, sys
from lightning.pytorch.core.saving import load_hparams_from_yaml, save_hparams_to_yaml
save_hparams_to_yaml(sys.argv[3], json.loads(sys.argv[1]))
assert load_hparams_from_yaml(sys.argv[2]) == json.loads(sys.argv[1])
)",
             {kHparams, dir.path("ours.yaml"), dir.path("theirs.yaml")});
  CHECK(lightning::read_file(dir.path("ours.yaml")) ==
        lightning::read_file(dir.path("theirs.yaml")));

  const auto loaded = load_hparams_from_yaml(dir.path("theirs.yaml"));
  CHECK(loaded.size() == hparams.size());
  for (const auto& [key, value] : hparams.items()) CHECK(loaded[key] == value);
}

TEST_CASE("what is no file of hyper-parameters is refused", "[hparams]") {
  TempDir dir;
  CHECK_THROWS_WITH(load_hparams_from_yaml(dir.path("none.yaml")), Contains("none.yaml"));
  lightning::write_file(dir.path("list.yaml"), "- 1\n");
  CHECK_THROWS_WITH(load_hparams_from_yaml(dir.path("list.yaml")), Contains("expected a map"));
  lightning::write_file(dir.path("empty.yaml"), "");
  CHECK(load_hparams_from_yaml(dir.path("empty.yaml")) == Json::object());
  CHECK_THROWS_AS(save_hparams_to_yaml(dir.path("x.yaml"), Json::array()), MisconfigurationError);
  CHECK_THROWS_WITH(save_hparams_to_yaml(dir.path("no/such/x.yaml"), Json::object()),
                    Contains("no/such/x.yaml") && Contains("No such file or directory"));
}

TEST_CASE("module and data module may share a hyper-parameter, but not disagree on it",
          "[hparams]") {
  const Json module = {
      {"lr", 0.1}, {"batch", 32}, {"opt", {{"a", 1}, {"b", 2}}}, {"_class_path", "M"}};
  const Json data = {
      {"batch", 32}, {"opt", {{"b", 2}, {"a", 1}}}, {"workers", 4}, {"_class_path", "D"}};
  CHECK(merge_hparams(module, data) ==
        Json{{"lr", 0.1}, {"batch", 32}, {"opt", {{"b", 2}, {"a", 1}}}, {"workers", 4}});
  CHECK(merge_hparams(module, nullptr).size() == 3);
  CHECK(merge_hparams(nullptr, data).size() == 3);
  CHECK_THROWS_WITH(merge_hparams({{"batch", 32}}, {{"batch", 64}}),
                    Contains("\"batch\"") && Contains("32") && Contains("64"));
  CHECK_THROWS_AS(merge_hparams({{"x", 1}}, {{"x", 1.0}}), MisconfigurationError);
  CHECK_THROWS_AS(merge_hparams({{"x", 1}}, {{"x", true}}), MisconfigurationError);
}
