#include "lightning/cli/config_tree.h"

#include <catch2/catch.hpp>
#include <fstream>
#include <nlohmann/json.hpp>

#include "tests/support/temp_dir.h"

namespace lightning::cli {

class Gadget {
 public:
  static constexpr const char* kPartKind = "gadget";
};

namespace {

using Catch::Contains;
using Catch::StartsWith;
using testing::TempDir;

struct HammerOptions : Options<HammerOptions> {
  OPTION(double, weight, 1.0, "In kilograms.");
  OPTION(std::string, owner, "", "Who has it.");
  OPTION(std::optional<Part<Gadget>>, spare, std::nullopt, "Another one.");
};
struct SawOptions : Options<SawOptions> {
  OPTION(std::string, owner, "nobody", "Who has it.");
  OPTION(int64_t, teeth, 40, "How many.");
};
const Registration<Gadget> kHammer{"Hammer", "Drives nails.",
                                   [](const HammerOptions&) { return std::make_unique<Gadget>(); }};
const Registration<Gadget> kSaw{"Saw", "Cuts boards.",
                                [](const SawOptions&) { return std::make_unique<Gadget>(); }};
const Registration<Gadget> kWord{"quiet", "None.", [] { return std::make_unique<Gadget>(); }};

struct SizeOptions : Options<SizeOptions> {
  OPTION(int64_t, width, 3, "In metres.");
  OPTION(std::vector<int64_t>, steps, (std::vector<int64_t>{1, 2}), "Sizes.");
};
using Share = std::variant<int64_t, double>;
struct ShopOptions : Options<ShopOptions> {
  OPTION(std::optional<int64_t>, limit, std::nullopt, "At most.");
  OPTION(double, rate, 0.5, "Per day.");
  OPTION(std::string, name, "shop", "Its name.");
  OPTION(Share, share, 1.0, "Count or part.");
  OPTION(Part<Gadget>, tool, "quiet", "The tool.");
  OPTION(std::vector<Part<Gadget>>, tools, {}, "More tools.");
  OPTION(SizeOptions, size, SizeOptions(), "How large.");
};

ConfigTree shop() {
  Json defaults;
  ShopOptions().write(defaults);
  return {places_of<ShopOptions>(), defaults};
}

void read_into(ConfigTree& tree, const std::string& text, const std::string& name = "shop.yaml") {
  tree.apply(parse_config(text, name));
}

TEST_CASE("what is said later wins, and the rest keeps its value", "[cli]") {
  auto tree = shop();
  read_into(tree, "limit: 3\nname: a\nsize: {width: 8}");
  tree.set("limit", "4");
  read_into(tree, "name: b");
  const Json values = tree.values();
  CHECK(values["limit"] == 4);
  CHECK(values["name"] == "b");
  CHECK(values["size"].dump() == R"({"width":8,"steps":[1,2]})");
  CHECK(values["rate"] == 0.5);
}

TEST_CASE("a word of the command line is typed by the option that takes it", "[cli]") {
  auto tree = shop();
  tree.set("name", "2024");
  tree.set("share", "1");
  tree.set("rate", "1e-3");
  tree.set("size.width", "7");
  tree.set("size.steps", "[3]");
  Json values = tree.values();
  CHECK(values["name"] == "2024");
  CHECK(values["share"].is_number_integer());
  CHECK(values["rate"] == 1e-3);
  CHECK(values["size"].dump() == R"({"width":7,"steps":[3]})");
  tree.set("share", "1.0");
  tree.set("name", "1e-3");
  tree.set("size.steps+", "4");
  values = tree.values();
  CHECK(values["share"].is_number_float());
  CHECK(values["name"] == "1e-3");
  CHECK(values["size"]["steps"].dump() == "[3,4]");
}

TEST_CASE(
    "text that looks like a number with an exponent stays text in a file, where text is wanted",
    "[cli]") {
  auto tree = shop();
  read_into(tree, "name: 1e-3\nrate: 1e-3\n");
  CHECK(tree.values()["name"] == "1e-3");
  CHECK(tree.values()["rate"] == 1e-3);
}

TEST_CASE("a part takes its options one by one, and its defaults are shown", "[cli]") {
  auto tree = shop();
  tree.set("tool", "path.to.Hammer");
  tree.set("tool.weight", "2");
  CHECK(tree.values()["tool"].dump() ==
        R"({"class_path":"Hammer","init_args":{"weight":2.0,"owner":"","spare":null}})");
  tree.set("tool", "quiet");
  CHECK(tree.values()["tool"] == "quiet");
}

TEST_CASE("another class keeps the options that both know", "[cli]") {
  auto tree = shop();
  read_into(tree, "tool: {class_path: Hammer, init_args: {owner: Ann, weight: 3}}");
  tree.set("tool", "Saw");
  CHECK(tree.values()["tool"]["init_args"].dump() == R"({"owner":"Ann","teeth":40})");
}

TEST_CASE("a list of parts grows, and its last part takes options", "[cli]") {
  auto tree = shop();
  tree.set("tools+", "Hammer");
  tree.set("tools.weight", "5");
  tree.set("tools+", "Saw");
  tree.set("tools.teeth", "9");
  read_into(tree, "tools+: [{class_path: Saw, init_args: {owner: Bo}}]");
  const Json tools = tree.values()["tools"];
  REQUIRE(tools.size() == 3);
  CHECK(tools[0]["init_args"]["weight"] == 5.0);
  CHECK(tools[1]["init_args"]["teeth"] == 9);
  CHECK(tools[2]["init_args"]["owner"] == "Bo");
  tree.set("tools", "Saw");
  CHECK(part_name(tree.values()["tools"]) == "Saw");
}

TEST_CASE("parts nest", "[cli]") {
  auto tree = shop();
  tree.set("tool", "Hammer");
  tree.set("tool.spare", "Saw");
  tree.set("tool.spare.teeth", "3");
  CHECK(tree.values()["tool"]["init_args"]["spare"]["init_args"]["teeth"] == 3);
  CHECK_THROWS_WITH(tree.set("tool.spare.teth", "3"), Contains("\"teeth\""));
}

TEST_CASE("mistakes are named with file, line, key and what is near", "[cli]") {
  auto tree = shop();
  CHECK_THROWS_WITH(read_into(tree, "limit: 1\nnmae: x\n"),
                    StartsWith("shop.yaml:2: nmae is not an option.") && Contains("\"name\""));
  CHECK_THROWS_WITH(read_into(tree, "limit: 1\nrate: fast\n"),
                    StartsWith("shop.yaml:2: rate got \"fast\", expected a number"));
  CHECK_THROWS_WITH(read_into(tree, "size:\n  width: 1\n  steps: [a]\n"),
                    StartsWith("shop.yaml:3: size.steps[0] got \"a\""));
  CHECK_THROWS_WITH(read_into(tree, "tools:\n- class_path: Saw\n  init_args:\n    tteth: 3\n"),
                    StartsWith("shop.yaml:4: tools[0].init_args.tteth") && Contains("\"teeth\""));
  CHECK_THROWS_WITH(read_into(tree, "tools:\n- Saws\n"),
                    StartsWith("shop.yaml:2: tools[0]: ") && Contains("Did you mean \"Saw\""));
  CHECK_THROWS_WITH(read_into(tree, "tool: {name: Saw}"), Contains("class_path"));
  CHECK_THROWS_WITH(read_into(tree, "[1, 2]"), Contains("expected a map"));
  CHECK_THROWS_WITH(tree.set("limit", "many"), StartsWith("limit got \"many\""));
  CHECK_THROWS_WITH(tree.set("limit", "1.5"), StartsWith("limit got 1.5, expected an integer"));
  CHECK_THROWS_WITH(tree.set("size.wdith", "1"), Contains("\"width\""));
  CHECK_THROWS_WITH(tree.set("tools.teeth", "1"), Contains("--tools+=NAME") && Contains("Hammer"));
  CHECK_THROWS_WITH(tree.set("limit+", "1"), Contains("adds to a list"));
  CHECK_THROWS_WITH(tree.check_key("size.wdith"), Contains("\"width\""));
}

TEST_CASE("a mistake changes nothing", "[cli]") {
  auto tree = shop();
  const Json before = tree.values();
  CHECK_THROWS(tree.set("size.width", "wide"));
  CHECK_THROWS(tree.set("tools+", "Nothing"));
  CHECK(tree.values() == before);
}

TEST_CASE("a group or a part may be a file, found from the file that names it", "[cli]") {
  const TempDir dir;
  std::ofstream(dir.path("size.yaml")) << "width: 11\n";
  std::ofstream(dir.path("tool.yaml")) << "class_path: Saw\ninit_args:\n  teeth: x\n";
  std::ofstream(dir.path("shop.yaml")) << "size: size.yaml\n";
  auto tree = shop();
  tree.apply(read_config(dir.path("shop.yaml")));
  CHECK(tree.values()["size"]["width"] == 11);
  CHECK_THROWS_WITH(tree.set("tool", dir.path("tool.yaml")), Contains("tool.yaml:3: "));
  CHECK_THROWS_WITH(tree.set("size", dir.path("none.yaml")), Contains("does not exist"));
}

TEST_CASE("the values without defaults make the same values again", "[cli]") {
  auto tree = shop();
  tree.set("share", "1");
  tree.set("tools+", "Hammer");
  tree.set("tools+", "Saw");
  tree.set("tools.teeth", "9");
  const Json few = tree.without_defaults(tree.values());
  CHECK(
      few.dump() ==
      R"({"share":1,"tools":[{"class_path":"Hammer"},{"class_path":"Saw","init_args":{"teeth":9}}]})");
  auto again = shop();
  read_into(again, write_config(few));
  CHECK(again.values().dump() == tree.values().dump());
}

TEST_CASE("comments say what each key is for", "[cli]") {
  auto tree = shop();
  tree.set("tools+", "Saw");
  const Json values = tree.values();
  const std::string text = write_config(values, tree.comments(values));
  CHECK_THAT(text, Contains("# At most. (type: int or null)\nlimit: null\n"));
  CHECK_THAT(text, Contains("    # How many. (type: int)\n    teeth: 40\n"));
  CHECK(*parse_config(text).value == values);
}

}  // namespace
}  // namespace lightning::cli
