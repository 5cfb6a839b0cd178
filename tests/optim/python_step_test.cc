#include "lightning/optim/python_step.h"

#include <torch/optim/adam.h>
#include <torch/torch.h>

#include <catch2/catch.hpp>

#include "lightning/optim/factories.h"
#include "lightning/optim/torch_optimizers.h"
#include "tests/optim/state_json.h"
#include "tests/support/python.h"

using namespace lightning;
using Catch::Matchers::Contains;

namespace {

// 30 steps from seeded weights with seeded gradients: torch draws the same numbers on both sides.
constexpr const char* kScript = R"(
import json, sys, torch
torch.set_num_threads(1)
out = []
for name, options in json.loads(sys.argv[1]):
    torch.manual_seed(5)
    params = [torch.nn.Parameter(torch.randn(s, dtype=getattr(torch, options.get("dtype", "float32"))))
              for s in [(33, 17), (1000,), (1,), ()]]
    opt = getattr(torch.optim, name)(params, **{k: v for k, v in options.items() if k != "dtype"})
    for step in range(30):
        for p in params:
            p.grad = torch.randn(p.shape, dtype=p.dtype)
        opt.step()
        for group in opt.param_groups:
            group["lr"] *= 0.97
    flat = torch.cat([torch.view_as_real(p).flatten() if p.is_complex() else p.flatten() for p in params])
    out.append(flat.double().tolist())
json.dump(out, sys.stdout)
)";

const Json& runs() {
  static const Json runs = Json::parse(R"([
    ["SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.1, "weight_decay": 0.01}],
    ["Adam", {}],
    ["Adam", {"lr": 0.01, "betas": [0.8, 0.95], "weight_decay": 0.1, "amsgrad": true}],
    ["Adam", {"lr": 0.01, "dtype": "float64"}],
    ["Adam", {"lr": 0.01, "dtype": "bfloat16"}],
    ["Adam", {"lr": 0.01, "amsgrad": true, "dtype": "complex64"}],
    ["AdamW", {}],
    ["AdamW", {"lr": 0.01, "weight_decay": 0.2, "amsgrad": true}],
    ["AdamW", {"lr": 0.01, "weight_decay": 0.2, "dtype": "complex64"}],
    ["RMSprop", {"lr": 0.001}],
    ["RMSprop", {"lr": 0.02, "alpha": 0.9, "momentum": 0.5, "centered": true, "weight_decay": 0.1}],
    ["RMSprop", {"lr": 0.02, "centered": true, "dtype": "complex64"}],
    ["Adagrad", {"lr": 0.1, "lr_decay": 0.01, "initial_accumulator_value": 0.1}]
  ])");
  return runs;
}

at::ScalarType dtype_of(const std::string& name) {
  if (name == "float64") return at::kDouble;
  if (name == "bfloat16") return at::kBFloat16;
  return name == "complex64" ? at::kComplexFloat : at::kFloat;
}

std::vector<double> run(const std::string& name, Json options) {
  torch::manual_seed(5);
  const auto dtype = dtype_of(options.value("dtype", "float32"));
  options.erase("dtype");
  std::vector<at::Tensor> params;
  for (const std::vector<int64_t>& shape :
       {std::vector<int64_t>{33, 17}, {1000}, {1}, std::vector<int64_t>{}}) {
    params.push_back(torch::randn(shape, dtype).requires_grad_());
  }
  const auto optimizer = registry<OptimizerFactory>().make(name, options)->make(params);
  for (int i = 0; i < 30; ++i) {
    for (at::Tensor& p : params) p.mutable_grad() = torch::randn(p.sizes(), dtype);
    python_step(*optimizer);
    for (auto& group : optimizer->param_groups()) {
      group.options().set_lr(group.options().get_lr() * 0.97);
    }
  }
  std::vector<double> flat;
  for (const at::Tensor& p : params) {
    const at::Tensor real = p.is_complex() ? torch::view_as_real(p) : p;
    const at::Tensor all = real.detach().to(at::kDouble).flatten().contiguous();
    flat.insert(flat.end(), all.data_ptr<double>(), all.data_ptr<double>() + all.numel());
  }
  return flat;
}

struct Twice : torch::optim::Adam {
  using torch::optim::Adam::Adam;
  at::Tensor step(LossClosure closure) override {
    ++steps;
    return torch::optim::Adam::step(closure);
  }
  int steps = 0;
};

}  // namespace

TEST_CASE("optimizers step bit for bit as Python's do on a CPU", "[optim]") {
  torch::set_num_threads(1);
  const Json expected = Json::parse(testing::run_python(kScript, {runs().dump()}));
  for (size_t i = 0; i < runs().size(); ++i) {
    INFO(runs()[i]);
    CHECK((run(runs()[i][0], runs()[i][1]) == expected[i].get<std::vector<double>>()));
  }
}

TEST_CASE("a step runs its closure with gradients and gives its loss", "[optim]") {
  auto weight = torch::ones({2}).requires_grad_();
  torch::optim::AdamW adamw({weight}, torch::optim::AdamWOptions(0.1));
  const torch::NoGradGuard no_grad;
  const at::Tensor loss = python_step(adamw, [&] {
    CHECK(at::GradMode::is_enabled());
    at::Tensor loss = weight.square().sum();
    loss.backward();
    return loss;
  });
  CHECK(loss.item<double>() == 2);
  CHECK(weight[0].item<double>() < 1);
}

TEST_CASE("a parameter without gradient is left alone and gets no state", "[optim]") {
  auto with = torch::ones({2}).requires_grad_(), without = torch::ones({2}).requires_grad_();
  torch::optim::Adam adam({with, without}, torch::optim::AdamOptions(0.1));
  with.mutable_grad() = torch::ones({2});
  python_step(adam);
  CHECK(adam.state().size() == 1);
  CHECK(torch::equal(without, torch::ones({2})));
}

TEST_CASE("a class derived from an optimizer keeps its own step", "[optim]") {
  auto weight = torch::ones({2}).requires_grad_();
  weight.mutable_grad() = torch::ones({2});
  Twice twice({weight}, torch::optim::AdamOptions(0.1));
  python_step(twice);
  CHECK(twice.steps == 1);
}

TEST_CASE("Adam refuses sparse gradients", "[optim]") {
  auto weight = torch::ones({2}).requires_grad_();
  weight.mutable_grad() = torch::ones({2}).to_sparse();
  torch::optim::Adam adam({weight}, torch::optim::AdamOptions(0.1));
  CHECK_THROWS_WITH(python_step(adam), Contains("does not support sparse gradients"));
}
