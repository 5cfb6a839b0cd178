#include "lightning/summary.h"

#include <torch/torch.h>

#include <catch2/catch.hpp>
#include <limits>
#include <sstream>

#include "lightning/errors.h"
#include "tests/support/python.h"

using namespace lightning;
using Catch::Contains;

namespace {

// The same models on both sides.
constexpr const char* kModels = R"(
import sys, torch
from torch import nn
import lightning.pytorch as pl
from lightning.pytorch.utilities.model_summary import summarize

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(16, 16)
        self.norm = nn.LayerNorm(16)

class Plain(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(256, 512), nn.BatchNorm1d(512))
        self.head = nn.Linear(512, 10, bias=False)

class Deep(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 32, 3)
        self.blocks = nn.ModuleList([Block() for _ in range(3)])
        self.blocks[1].eval()
        self.blocks[0].fc.weight.requires_grad_(False)
        self.embedding = nn.Embedding(100000, 300)
        self.drop = nn.Dropout(0.1)

class Tied(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1500))
        self.a = nn.Linear(30, 30)
        self.b = nn.Linear(30, 30)
        self.b.weight = self.a.weight
        self.again = self.a

class Empty(pl.LightningModule):
    pass

class Bare(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(123))

model = dict(Plain=Plain, Deep=Deep, Tied=Tied, Empty=Empty, Bare=Bare)[sys.argv[1]]()
print(summarize(model, max_depth=int(sys.argv[2])))
)";

struct BlockImpl : torch::nn::Module {
  BlockImpl() {
    register_module("fc", torch::nn::Linear(16, 16));
    register_module("norm", torch::nn::LayerNorm(torch::nn::LayerNormOptions({16})));
  }
};
TORCH_MODULE(Block);

std::shared_ptr<torch::nn::Module> make(const std::string& name) {
  auto root = std::make_shared<torch::nn::Module>("Root");
  namespace nn = torch::nn;
  if (name == "Plain") {
    root->register_module("net", nn::Sequential(nn::Linear(256, 512), nn::BatchNorm1d(512)));
    root->register_module("head", nn::Linear(nn::LinearOptions(512, 10).bias(false)));
  } else if (name == "Deep") {
    root->register_module("conv", nn::Conv2d(1, 32, 3));
    nn::ModuleList blocks;
    for (int i = 0; i < 3; ++i) blocks->push_back(Block());
    blocks[1]->eval();
    blocks[0]->named_parameters()["fc.weight"].requires_grad_(false);
    root->register_module("blocks", blocks);
    root->register_module("embedding", nn::Embedding(100000, 300));
    root->register_module("drop", nn::Dropout(0.1));
  } else if (name == "Tied") {
    root->register_parameter("scale", torch::ones(1500));
    auto a = root->register_module("a", nn::Linear(30, 30));
    auto b = nn::Linear(30, 30);
    // The first wins the name, so the tied one is put in place of LibTorch's own.
    b->weight = a->weight;
    struct Access : nn::Module {
      static auto& parameters_of(nn::Module& module) { return module.*(&Access::parameters_); }
    };
    Access::parameters_of(*b)["weight"] = a->weight;
    root->register_module("b", b);
    root->register_module("again", a);
  } else if (name == "Bare") {
    root->register_parameter("w", torch::ones(123));
  }
  return root;
}

}  // namespace

TEST_CASE("the summary is the original's, letter for letter", "[python]") {
  for (const char* name : {"Plain", "Deep", "Tied", "Empty", "Bare"}) {
    for (const int depth : {1, 2, -1}) {
      INFO(name << " at depth " << depth);
      const auto expected = testing::run_python(kModels, {name, std::to_string(depth)});
      CHECK(format_summary(summarize(*make(name), depth)) + "\n" == expected);
    }
  }
}

TEST_CASE("an undefined parameter counts nothing") {
  torch::nn::Module module;
  module.register_parameter("bias", torch::Tensor(), false);
  CHECK(summarize(module).total_parameters == 0);
}

TEST_CASE("the size follows the bits of a parameter") {
  auto model = make("Plain");
  CHECK(summarize(*model, 1, 16).size_mb == Approx(summarize(*model, 1, 32).size_mb / 2));
}

TEST_CASE("a depth below -1 is refused") {
  CHECK_THROWS_WITH(summarize(torch::nn::Module(), -2), Contains("max_depth -2"));
}

TEST_CASE("counts are shortened as the original does") {
  CHECK(human_readable_count(0) == "0  ");
  CHECK(human_readable_count(123) == "123  ");
  CHECK(human_readable_count(999) == "999  ");
  CHECK(human_readable_count(1000) == "1.0 K");
  CHECK(human_readable_count(1234) == "1.2 K");
  CHECK(human_readable_count(2000000) == "2.0 M");
  CHECK(human_readable_count(132000) == "132 K");
  CHECK(human_readable_count(3000000000) == "3.0 B");
  CHECK(human_readable_count(400000000000000) == "400 T");
  CHECK(human_readable_count(5000000000000000) == "5,000 T");
  CHECK(formatted_model_size(1234567.8912) == "1,234,567.891");
}

TEST_CASE("classes are named as in Python") {
  CHECK(layer_type(torch::nn::LinearImpl(1, 1)) == "Linear");
  CHECK(layer_type(torch::nn::SequentialImpl()) == "Sequential");
  CHECK(layer_type(BlockImpl()) == "Block");
}
