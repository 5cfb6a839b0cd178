#include "lightning/checkpoint/module_state.h"

#include <torch/torch.h>

#include <catch2/catch.hpp>

#include "lightning/errors.h"
#include "tests/support/python.h"

using Catch::Matchers::Contains;
using namespace lightning;
namespace nn = torch::nn;

namespace {

// Children are registered before its own parameters and buffers, which come first all the same.
struct Encoder : nn::Module {
  Encoder() {
    net = register_module("net", nn::Sequential(nn::Linear(3, 4), nn::BatchNorm1d(4), nn::ReLU()));
    register_module("rnn", nn::LSTM(4, 2));
    register_buffer("mean", torch::zeros(3));
    scale = register_parameter("scale", torch::ones(3));
  }
  nn::Sequential net{nullptr};
  torch::Tensor scale;
};

// An embedding whose weight is the projection's too.
struct Model : nn::Module {
  Model() {
    register_module("encoder", encoder);
    weight = register_parameter("weight", torch::randn({5, 3}));
    register_module("output", output);
    output->register_parameter("weight", weight);
  }
  std::shared_ptr<Encoder> encoder = std::make_shared<Encoder>();
  std::shared_ptr<nn::Module> output = std::make_shared<nn::Module>("Output");
  torch::Tensor weight;
};

const char* const kPython = R"(
import torch
from torch import nn
class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU())
        self.rnn = nn.LSTM(4, 2)
        self.register_buffer("mean", torch.zeros(3))
        self.scale = nn.Parameter(torch.ones(3))
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = Encoder()
        self.weight = nn.Parameter(torch.randn(5, 3))
        self.output = nn.Module()
        self.output.weight = self.weight
for name, tensor in Model().state_dict().items():
    print(name, str(tensor.dtype)[6:], list(tensor.shape))
)";

std::string listed(const State& state) {
  std::string text;
  for (const auto& [key, value] : state.as_dict()) {
    const auto& tensor = value.as_tensor();
    std::vector<std::string> sizes;
    for (const auto size : tensor.sizes()) sizes.push_back(std::to_string(size));
    text += str(std::get<std::string>(key), " ", c10::getDtypeNames(tensor.scalar_type()).first,
                " [", join(sizes), "]\n");
  }
  return text;
}

}  // namespace

TEST_CASE("a module's state has Python's names, order, shapes and dtypes", "[checkpoint]") {
  CHECK(listed(module_state_dict(Model())) == testing::run_python(kPython));
}

TEST_CASE("a module's state is detached and shares its storage", "[checkpoint]") {
  Model model;
  const auto state = module_state_dict(model);
  const auto& weight = state.at("weight").as_tensor();
  CHECK_FALSE(weight.requires_grad());
  CHECK(weight.data_ptr() == model.weight.data_ptr());
  CHECK(state.at("output.weight").as_tensor().data_ptr() == model.weight.data_ptr());
}

TEST_CASE("a module takes the state of another, and keeps its own dtype", "[checkpoint]") {
  Model from, to;
  torch::nn::init::normal_(from.encoder->scale);
  auto state = module_state_dict(from);
  state["encoder.scale"] = from.encoder->scale.detach().to(torch::kDouble);
  const auto passed_over = load_module_state_dict(to, state, /*strict=*/true);

  CHECK(passed_over.missing.empty());
  CHECK(torch::equal(to.weight, from.weight));
  CHECK(torch::equal(to.encoder->scale, from.encoder->scale));
  CHECK(to.encoder->scale.dtype() == torch::kFloat);
  CHECK(to.encoder->scale.requires_grad());
}

TEST_CASE("a state that does not fit is refused with all that is wrong, and nothing is changed",
          "[checkpoint]") {
  Model model;
  const auto scale = model.encoder->scale.detach().clone();
  auto state = module_state_dict(model);
  state["encoder.scale"] = torch::full({3}, 7.0);
  state["encoder.mean"] = torch::zeros({4, 2}, torch::kDouble);
  state["weight"] = "text";
  state.as_dict().erase(std::string("encoder.net.0.bias"));
  state["decoder.bias"] = torch::zeros(1);
  state[int64_t{12}] = torch::zeros(1);

  CHECK_THROWS_WITH(load_module_state_dict(model, state, true),
                    Contains("missing from the state (1):\n    encoder.net.0.bias") &&
                        Contains("not in the module (2):\n    decoder.bias\n    12") &&
                        Contains("encoder.mean: the state holds float64 [4, 2], the module "
                                 "expects float32 [3]") &&
                        Contains("weight: the state holds a str, the module expects a tensor"));
  CHECK_THROWS_WITH(load_module_state_dict(model, state, false),
                    Contains("encoder.mean") && !Contains("decoder.bias"));
  CHECK(torch::equal(model.encoder->scale, scale));
}

TEST_CASE("a load that is not strict takes what both have and gives back the rest",
          "[checkpoint]") {
  Model model;
  auto state = module_state_dict(Model());
  state.as_dict().erase(std::string("weight"));
  state["decoder.bias"] = torch::zeros(1);
  state["encoder.scale"] = torch::full({3}, 7.0);

  const auto passed_over = load_module_state_dict(model, state, /*strict=*/false);

  CHECK(passed_over.missing == std::vector<std::string>{"weight"});
  CHECK(passed_over.unexpected == std::vector<std::string>{"decoder.bias"});
  CHECK(model.encoder->scale[0].item<float>() == 7.0f);
}

TEST_CASE("keys that differ by a prefix are told", "[checkpoint]") {
  nn::Linear layer(2, 2);
  auto state =
      State::dict({{"model.weight", torch::zeros({2, 2})}, {"model.bias", torch::ones(2)}});
  CHECK_THROWS_WITH(load_module_state_dict(*layer, state, true),
                    Contains("\"model.weight\" and \"weight\" differ by a prefix"));
}

TEST_CASE("complex values are not put into real tensors, nor any into the meta device",
          "[checkpoint]") {
  nn::Linear layer(2, 2);
  auto state = module_state_dict(*layer);
  state["bias"] = torch::zeros(2, torch::kComplexFloat);
  CHECK_THROWS_WITH(load_module_state_dict(*layer, state, true), Contains("complex64 [2]"));

  nn::Module empty("Empty");
  empty.register_parameter("weight", torch::zeros({2}, torch::kMeta));
  CHECK_THROWS_WITH(load_module_state_dict(empty, State::dict({{"weight", torch::ones(2)}}), true),
                    Contains("meta device"));
}
