#include "lightning/flop_counter.h"

#include <torch/torch.h>

#include <catch2/catch.hpp>
#include <sstream>

#include "tests/support/python.h"

using namespace lightning;

namespace {

// Prints "name flops" for each submodule and "= flops" for the whole.
constexpr const char* kModels = R"(
import sys, torch
from torch import nn
import torch.nn.functional as F
import lightning.pytorch as pl
from lightning.pytorch.utilities.model_summary import summarize

class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(32, 96)
        self.out = nn.Linear(32, 32)
    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.out(torch.softmax(q @ k.transpose(1, 2), -1) @ v)

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(32)
        self.attention = Attention()
        self.mlp = nn.Sequential(nn.Linear(32, 128), nn.GELU(), nn.Linear(128, 32, bias=False))
    def forward(self, x):
        return self.mlp(x + self.attention(self.norm(x)))

class Model(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.grouped = nn.Conv2d(8, 16, 3, groups=4, dilation=2)
        self.up = nn.ConvTranspose2d(16, 4, 2, stride=2)
        self.line = nn.Conv1d(4, 32, 5)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.unused = nn.Linear(3, 3)
        self.example_input_array = torch.ones(2, 3, 17, 17)
    def forward(self, x):
        x = self.up(self.grouped(self.conv(x)))
        x = self.line(x.flatten(2)).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        return x

summary = summarize(Model(), max_depth=-1)
for name, counts in summary.flop_counts.items():
    print(name, sum(counts.values()))
print('=', summary.total_flops)
)";

namespace nn = torch::nn;

struct AttentionImpl : nn::Module {
  AttentionImpl() {
    register_module("qkv", qkv);
    register_module("out", out);
  }
  at::Tensor forward(const at::Tensor& x) {
    const auto parts = qkv(x).chunk(3, -1);
    return out(at::softmax(at::matmul(parts[0], parts[1].transpose(1, 2)), -1).matmul(parts[2]));
  }
  nn::Linear qkv{32, 96}, out{32, 32};
};
TORCH_MODULE(Attention);

struct BlockImpl : nn::Module {
  BlockImpl() {
    register_module("norm", norm);
    register_module("attention", attention);
    register_module("mlp", mlp);
  }
  at::Tensor forward(const at::Tensor& x) { return mlp->forward(x + attention(norm(x))); }
  nn::LayerNorm norm{nn::LayerNormOptions({32})};
  Attention attention;
  nn::Sequential mlp{nn::Linear(32, 128), nn::GELU(),
                     nn::Linear(nn::LinearOptions(128, 32).bias(false))};
};
TORCH_MODULE(Block);

struct Model : nn::Module {
  Model() {
    register_module("conv", conv);
    register_module("grouped", grouped);
    register_module("up", up);
    register_module("line", line);
    register_module("blocks", blocks);
    register_module("unused", nn::Linear(3, 3));
  }
  at::Tensor forward(at::Tensor x) {
    x = up->forward(grouped(conv(x)));
    x = line(x.flatten(2)).transpose(1, 2);
    for (const auto& block : *blocks) x = block->as<Block>()->forward(x);
    return x;
  }
  nn::Conv2d conv{nn::Conv2dOptions(3, 8, 3).stride(2).padding(1)};
  nn::Conv2d grouped{nn::Conv2dOptions(8, 16, 3).groups(4).dilation(2)};
  nn::ConvTranspose2d up{nn::ConvTranspose2dOptions(16, 4, 2).stride(2)};
  nn::Conv1d line{4, 32, 5};
  nn::ModuleList blocks{Block(), Block()};
};

}  // namespace

TEST_CASE("each submodule's FLOPs are those torch counts with hooks", "[python]") {
  const torch::NoGradGuard no_grad;
  Model model;
  const auto counts = count_flops(model, [&] { model.forward(at::ones({2, 3, 17, 17})); });

  std::istringstream expected(testing::run_python(kModels));
  int names = 0;
  for (std::string name; expected >> name; ++names) {
    int64_t flops = -1;
    expected >> flops;
    INFO(name);
    if (name == "blocks") {
      CHECK(flops == 0);  // a ModuleList has no forward, so the original's hooks never see it
      flops = counts.at("blocks.0") + counts.at("blocks.1");
    }
    const auto found = counts.find(name == "=" ? "" : name);
    CHECK((found == counts.end() ? 0 : found->second) == flops);
  }
  CHECK(names == 25);
}

TEST_CASE("attention in one operator counts its two products") {
  const torch::NoGradGuard no_grad;
  nn::Module none;
  const auto q = at::ones({2, 4, 8, 16});
  const auto counts = count_flops(none, [&] { at::scaled_dot_product_attention(q, q, q); });
  CHECK(counts.at("") == 2 * (2 * (2 * 4) * 8 * 8 * 16));
}

TEST_CASE("an exception leaves nothing behind that counts") {
  const torch::NoGradGuard no_grad;
  nn::Linear layer(3, 3);
  CHECK_THROWS(count_flops(*layer, [&] { layer(at::ones({2, 4})); }));
  const auto counts = count_flops(*layer, [&] { layer(at::ones({2, 3})); });
  CHECK(counts.at("") == 2 * 2 * 3 * 3);
}
