#include "lightning/param/unit_plan.h"

#include <torch/torch.h>

#include <catch2/catch.hpp>

using Catch::Matchers::Contains;
using namespace lightning;
namespace nn = torch::nn;

namespace {

struct ExpertImpl : nn::Module {
  ExpertImpl() { up = register_module("up", nn::Linear(2, 2)); }
  nn::Linear up{nullptr};
};
TORCH_MODULE(Expert);

struct BlockImpl : nn::Module {
  explicit BlockImpl(int64_t experts = 0) {
    norm = register_module("norm", nn::LayerNorm(nn::LayerNormOptions({2})));
    mlp = register_module("mlp", nn::Sequential(nn::Linear(2, 4), nn::GELU(), nn::Linear(4, 2)));
    nn::ModuleList list;
    for (int64_t i = 0; i < experts; ++i) list->push_back(Expert());
    if (experts > 0) register_module("experts", list);
  }
  nn::LayerNorm norm{nullptr};
  nn::Sequential mlp{nullptr};
};
TORCH_MODULE(Block);

struct GPT : nn::Module {
  explicit GPT(int64_t depth, int64_t experts = 0) {
    words = register_module("words", nn::Embedding(5, 2));
    positions = register_module("positions", nn::Embedding(5, 2));
    nn::ModuleList list;
    for (int64_t i = 0; i < depth; ++i) list->push_back(Block(experts));
    register_module("blocks", list);
    head = register_module("head", nn::Linear(2, 5));
  }
  nn::Embedding words{nullptr}, positions{nullptr};
  nn::Linear head{nullptr};
};

// "name(parent): parameters" of each unit.
std::vector<std::string> lines(const std::vector<UnitPlan>& units) {
  std::vector<std::string> lines;
  for (const auto& unit : units) {
    std::string line = unit.name + "(" + std::to_string(unit.parent) + "):";
    for (const auto& parameter : unit.parameters) line += " " + parameter.name;
    lines.push_back(line);
  }
  return lines;
}

std::vector<std::string> names(const std::vector<UnitPlan>& units) {
  std::vector<std::string> names;
  for (const auto& unit : units) names.push_back(unit.name);
  return names;
}

using Lines = std::vector<std::string>;

}  // namespace

TEST_CASE("a model's repeated blocks are its units, and the rest is the root", "[param]") {
  const auto units = plan_units(GPT(2));
  CHECK(lines(units) ==
        Lines{"(-1): words.weight positions.weight head.weight head.bias",
              "blocks.0(0): blocks.0.norm.weight blocks.0.norm.bias blocks.0.mlp.0.weight "
              "blocks.0.mlp.0.bias blocks.0.mlp.2.weight blocks.0.mlp.2.bias",
              "blocks.1(0): blocks.1.norm.weight blocks.1.norm.bias blocks.1.mlp.0.weight "
              "blocks.1.mlp.0.bias blocks.1.mlp.2.weight blocks.1.mlp.2.bias"});
  CHECK(units[1].type == "BlockImpl");
}

TEST_CASE("experts of a block are units inside of it", "[param]") {
  const auto units = plan_units(GPT(2, 3));
  CHECK(names(units) == Lines{"", "blocks.0", "blocks.0.experts.0", "blocks.0.experts.1",
                              "blocks.0.experts.2", "blocks.1", "blocks.1.experts.0",
                              "blocks.1.experts.1", "blocks.1.experts.2"});
  CHECK(units[4].parent == 1);
  CHECK(units[5].parent == 0);
}

TEST_CASE("a model without blocks is divided by its layers, but for tables", "[param]") {
  nn::Sequential net(nn::Linear(2, 2), nn::ReLU(), nn::Linear(2, 2));
  CHECK(names(plan_units(*net)) == Lines{"", "0", "2"});
  CHECK(names(plan_units(GPT(1))) == Lines{"", "blocks.0.mlp.0", "blocks.0.mlp.2"});
  CHECK(names(plan_units(*nn::Linear(2, 2))) == Lines{""});
}

TEST_CASE("a policy names types or modules", "[param]") {
  const GPT model(2);
  CHECK(names(plan_units(model, {"Embedding", "blocks.1"})) ==
        Lines{"", "words", "positions", "blocks.1"});
  CHECK(names(plan_units(model, {"BlockImpl"})) == Lines{"", "blocks.0", "blocks.1"});
  CHECK(names(plan_units(model, {"torch::nn::LayerNorm"})) ==
        Lines{"", "blocks.0.norm", "blocks.1.norm"});
  CHECK_THROWS_WITH(plan_units(model, {"Blok"}), Contains("\"Blok\"") &&
                                                     Contains("Did you mean \"Block\"") &&
                                                     Contains("Embedding, GELU, GPT, LayerNorm"));
}

TEST_CASE("a parameter that units share belongs to what holds them all, under its first name",
          "[param]") {
  GPT model(2);
  const auto blocks = model.named_children()["blocks"];
  const auto shared = torch::ones(2);
  for (const auto& block : blocks->children()) block->register_parameter("shared", shared);
  const auto units = plan_units(model);
  CHECK(units[0].parameters[2].name == "blocks.0.shared");
  size_t count = 0;
  for (const auto& unit : units) count += unit.parameters.size();
  CHECK(count == 2 + 2 + 6 + 6 + 1);
}
