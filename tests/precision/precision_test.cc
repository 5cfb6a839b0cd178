#include "lightning/precision.h"

#include <ATen/autocast_mode.h>
#include <torch/torch.h>

#include <catch2/catch.hpp>
#include <cstdio>
#include <map>
#include <nlohmann/json.hpp>

#include "lightning/errors.h"
#include "lightning/log.h"
#include "lightning/registry.h"
#include "lightning/trainer_options.h"
#include "lightning/yaml.h"
#include "precision/bf16_support.h"
#include "precision/grad_scaler.h"
#include "precision/mixed.h"
#include "precision/true.h"
#include "tests/support/python.h"

using Catch::Matchers::Contains;
using namespace lightning;
namespace nn = torch::nn;

namespace {

std::string dtype_of(const at::Tensor& tensor) {
  return c10::getDtypeNames(tensor.scalar_type()).first;
}

// A layer, a normalization with buffers of both kinds, and weights that both sides can make.
nn::Sequential make_net() {
  nn::Sequential net(nn::Linear(8, 16), nn::BatchNorm1d(16), nn::ReLU(), nn::Linear(16, 1));
  const torch::NoGradGuard no_grad;
  for (auto& parameter : net->parameters()) {
    parameter.copy_(torch::linspace(-0.5, 0.7, parameter.numel()).view_as(parameter));
  }
  return net;
}

// Four steps as the Trainer takes them, a line for each: dtypes and the loss.
std::string train(const std::string& precision_name) {
  const auto precision = registry<Precision>().make(precision_name);
  precision->set_device(at::kCPU);
  auto net = make_net();
  precision->convert_module(*net);
  torch::optim::SGD sgd(net->parameters(), 0.1);
  std::string lines;
  for (int i = 0; i < 4; ++i) {
    const auto x = torch::linspace(-1, 1 + i, 32).view({4, 8});
    const auto batch = precision->convert_input(Batch::map({{"x", x}, {"row", torch::arange(4)}}));
    sgd.zero_grad();
    at::Tensor loss;
    {
      const auto scope = precision->forward_context();
      const auto y = net->forward(batch["x"]);
      loss = (y - torch::ones({4, 1})).square().mean();
      lines += str(dtype_of(batch["x"]), " ", dtype_of(batch["row"]), " ", dtype_of(y), " ",
                   dtype_of(torch::ones({1})), " ");
    }
    precision->scale_loss(loss).backward();
    sgd.step();
    char number[40];
    std::snprintf(number, sizeof(number), "%.17g", loss.item<double>());
    lines += str(dtype_of(loss), " ", number, "\n");
  }
  for (const auto& item : net->named_parameters()) {
    lines += str(dtype_of(item.value()), " ", dtype_of(item.value().grad()), " ");
  }
  for (const auto& item : net->named_buffers()) lines += dtype_of(item.value()) + " ";
  return str(precision->name(), "\n", lines, "\n");
}

const char* const kPython = R"(
import logging, sys, warnings
import torch
from torch import nn
import lightning.pytorch as pl
warnings.simplefilter("ignore")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
name = lambda t: str(t.dtype)[6:]
class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 1))
        with torch.no_grad():
            for p in self.net.parameters():
                p.copy_(torch.linspace(-0.5, 0.7, p.numel()).view_as(p))
    def training_step(self, batch, batch_idx):
        y = self.net(batch["x"])
        loss = (y - torch.ones(4, 1)).square().mean()
        print(name(batch["x"]), name(batch["row"]), name(y), name(torch.ones(1)), name(loss), "%.17g" % loss.item())
        return loss
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)
data = [{"x": torch.linspace(-1, 1 + i, 32).view(4, 8), "row": torch.arange(4)} for i in range(4)]
torch.set_num_threads(1)
for precision in sys.argv[1:]:
    trainer = pl.Trainer(max_epochs=1, accelerator="cpu", precision=precision, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    print(trainer.precision)
    module = Module()
    trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=None))
    print("".join(f"{name(p)} {name(p.grad)} " for p in module.parameters())
          + "".join(name(b) + " " for b in module.buffers()))
)";

// Warnings, while it lives.
struct Warnings {
  Warnings() {
    set_log_sink([this](const std::string& line) { lines += line + "\n"; });
  }
  ~Warnings() { set_log_sink(nullptr); }
  std::string lines;
};

}  // namespace

TEST_CASE("each precision has the dtypes and losses of the original, under all its names",
          "[precision]") {
  torch::set_num_threads(1);
  const Warnings warnings;
  const std::vector<std::string> names = {"32-true",  "64-true",    "16-true", "bf16-true",
                                          "16-mixed", "bf16-mixed", "32",      "64",
                                          "16",       "bf16"};
  std::string ours;
  for (const auto& name : names) ours += train(name);
  CHECK(ours == testing::run_python(kPython, names));
}

TEST_CASE("every registered precision leaves the default dtype and autocast as they were",
          "[precision]") {
  const Warnings warnings;
  for (const auto& name : registry<Precision>().names()) {
    INFO(name);
    const auto precision = registry<Precision>().make(name);
    precision->set_device(at::kCPU);
    try {
      const auto forward = precision->forward_context();
      const auto module = precision->module_init_context();
      CHECK(dtype_of(nn::Linear(1, 1)->weight) ==
            c10::getDtypeNames(precision->parameter_dtype()).first);
      throw std::runtime_error("a step failed");
    } catch (const std::runtime_error&) {
    }
    CHECK(dtype_of(torch::ones(1)) == "float32");
    CHECK_FALSE(at::autocast::is_autocast_enabled(at::kCPU));
    CHECK(at::autocast::is_autocast_cache_enabled());
    const auto output = precision->convert_output(
        Batch::list({torch::ones(1, torch::kBFloat16), torch::ones(1, torch::kInt)}));
    CHECK(dtype_of(output[0]) == (precision->name() == "32-true" ? "bfloat16" : "float32"));
    CHECK(dtype_of(output[1]) == "int32");
    CHECK(precision->state_dict().empty());
  }
}

TEST_CASE("contexts of precisions nest", "[precision]") {
  MixedPrecision mixed("bf16-mixed");
  mixed.set_device(at::kCPU);
  DoublePrecision twice;
  const auto a = torch::ones({2, 2});
  const auto outer = mixed.forward_context();
  {
    const auto inner = mixed.forward_context();
    const auto dtype = twice.forward_context();
    CHECK(dtype_of(torch::mm(a, a)) == "bfloat16");
    CHECK(dtype_of(torch::ones(1)) == "float64");
  }
  CHECK(dtype_of(torch::mm(a, a)) == "bfloat16");
  CHECK(dtype_of(torch::ones(1)) == "float32");
}

TEST_CASE("a cast model keeps tied parameters tied and its gradients", "[precision]") {
  nn::Module model("Tied");
  const auto weight = model.register_parameter("a", torch::ones(3));
  model.register_parameter("b", weight);
  model.register_buffer("count", torch::zeros({}, torch::kLong));
  weight.sum().backward();
  HalfPrecision("bf16-true").convert_module(model);
  CHECK(dtype_of(weight) == "bfloat16");
  CHECK(dtype_of(weight.grad()) == "bfloat16");
  CHECK(model.parameters()[0].data_ptr() == model.parameters()[1].data_ptr());
  CHECK(dtype_of(model.buffers()[0]) == "int64");
}

TEST_CASE("old names and a float16 that the CPU lacks are told", "[precision]") {
  Warnings warnings;
  registry<Precision>().make("bf16");
  CHECK_THAT(warnings.lines, Contains("`precision=bf16` is supported for historical reasons") &&
                                 Contains("bf16-mixed instead!"));
  warnings.lines.clear();
  registry<Precision>().make("32");
  CHECK(warnings.lines.empty());
  const auto half = registry<Precision>().make("16-mixed");
  half->set_device(at::kCPU);
  CHECK(half->name() == "bf16-mixed");
  CHECK_THAT(warnings.lines, Contains("AMP with fp16 is not supported on CPU"));
}

TEST_CASE("what cannot be had is refused with what can", "[precision]") {
  CHECK_THROWS_WITH(registry<Precision>().make("bf16-tru"), Contains("Did you mean \"bf16-true\""));
  CHECK_THROWS_WITH(HalfPrecision("half"), Contains("got \"half\"") && Contains("16-true"));
  CHECK_THROWS_WITH(MixedPrecision("32"), Contains("got \"32\"") && Contains("bf16-mixed"));
  CHECK_THROWS_WITH(MixedPrecision("bf16-mixed", std::make_shared<GradScaler>()),
                    Contains("does not need") && Contains("16-mixed"));
  CHECK_THROWS_WITH(MixedPrecision("bf16-mixed").set_device(at::kMeta), Contains("32-true"));
  CHECK_THROWS_WITH(MixedPrecision("bf16-mixed").forward_context(), Contains("set_device()"));
}

TEST_CASE("a GPU without bfloat16 is refused by its name, with what works there", "[precision]") {
  const c10::Device gpu("cuda:0");
  const auto check = [&](int capability) {
    lightning::detail::check_bf16("bf16-mixed", "\"16-mixed\"", gpu, "Tesla V100", capability);
  };
  CHECK_THROWS_WITH(check(70), Contains("cuda:0, a Tesla V100 of compute capability 7.0") &&
                                   Contains("Use \"16-mixed\""));
  CHECK_THROWS_WITH(check(75), Contains("7.5"));
  CHECK_NOTHROW(check(80));
  CHECK_NOTHROW(check(90));
  CHECK_NOTHROW(check(0));  // no driver tells: nothing is known against it
  CHECK_NOTHROW(check_bf16("bf16-mixed", "\"16-mixed\"", at::kCPU));
}

TEST_CASE("the short forms are known as numbers and as text, in YAML too", "[precision]") {
  const Warnings warnings;
  const std::map<std::string, std::string> forms = {
      {"64", "64-true"},     {"32", "32-true"},      {"16", "bf16-mixed"},
      {"\"64\"", "64-true"}, {"bf16", "bf16-mixed"}, {"\"16\"", "bf16-mixed"},
      {"16-true", "16-true"}};
  for (const auto& [text, name] : forms) {
    INFO(text);
    TrainerOptions options;
    options.read(from_yaml("precision: " + text, "the test"), "trainer");
    const auto precision = options.precision()->make("trainer.precision");
    precision->set_device(at::kCPU);
    CHECK(precision->name() == name);
  }
}

TEST_CASE("a gradient scaler tells what it cannot do", "[precision]") {
  CHECK_THROWS_WITH(GradScaler(GradScalerOptions().growth_factor(1)),
                    Contains("growth_factor=1") && Contains("above 1"));
  CHECK_THROWS_WITH(GradScaler(GradScalerOptions().backoff_factor(1)),
                    Contains("backoff_factor=1"));
  CHECK_THROWS_WITH(GradScaler(GradScalerOptions().init_scale(0)), Contains("init_scale=0"));
  CHECK_THROWS_WITH(GradScaler(GradScalerOptions().growth_interval(0)),
                    Contains("growth_interval"));

  const auto weight = torch::ones(3).requires_grad_();
  torch::optim::SGD sgd({weight}, 0.1);
  GradScaler scaler;
  CHECK(scaler.get_scale() == 65536);
  CHECK_THROWS_WITH(scaler.unscale_(sgd), Contains("before any loss was scaled"));
  scaler.scale(weight.sum());
  CHECK_THROWS_WITH(scaler.step(sgd), Contains("without a single gradient"));
  scaler.abandon();
  CHECK_THROWS_WITH(scaler.update(), Contains("without step()"));
  scaler.scale(weight.sum()).backward();
  scaler.unscale_(sgd);
  CHECK(torch::equal(weight.grad(), torch::ones(3)));
  CHECK_THROWS_WITH(scaler.unscale_(sgd), Contains("a second time"));
  scaler.step(sgd);
  CHECK_THROWS_WITH(scaler.step(sgd), Contains("a second time"));
  CHECK_THROWS_WITH(scaler.unscale_(sgd), Contains("after step()"));
  scaler.update();

  const auto half = torch::ones(3, torch::kHalf).requires_grad_();
  torch::optim::SGD of_half({half}, 0.1);
  half.mutable_grad() = torch::ones(3, torch::kHalf);
  CHECK_THROWS_WITH(scaler.step(of_half), Contains("float16") && Contains("16-true"));
  CHECK_THROWS_WITH(scaler.load_state_dict(State::dict()), Contains("is empty"));
  CHECK_THROWS_AS(scaler.load_state_dict(State::dict({{"scale", 1.0}})), CheckpointError);
  CHECK(scaler.get_scale() == 65536);
}

TEST_CASE("sparse gradients are unscaled by their values", "[precision]") {
  nn::Embedding embedding(nn::EmbeddingOptions(5, 2).sparse(true));
  torch::optim::SGD sgd(embedding->parameters(), 0.5);
  const auto before = embedding->weight.detach().clone();
  GradScaler scaler;
  scaler.scale(embedding(torch::tensor({1, 3, 3})).sum()).backward();
  scaler.step(sgd);
  scaler.update();
  const auto moved = before - embedding->weight.detach();
  CHECK(torch::allclose(moved.select(1, 0), torch::tensor({0.0F, 0.5F, 0.0F, 1.0F, 0.0F})));
}

TEST_CASE("LBFGS is refused under a gradient scaler", "[precision]") {
  MixedPrecision mixed("16-mixed", std::make_shared<GradScaler>());
  mixed.set_device(at::kCPU);
  CHECK(mixed.name() == "16-mixed");  // a scaler of the user's own: float16 on the CPU too
  const auto weight = torch::ones(3).requires_grad_();
  torch::optim::LBFGS lbfgs({weight});
  CHECK_THROWS_WITH(mixed.optimizer_step({lbfgs, [] { return at::Tensor(); }, [] {}}),
                    Contains("LBFGS optimizer are not compatible") && Contains("bf16-mixed"));
}

TEST_CASE("bf16-mixed on a GPU leaves the CPU's operators alone", "[precision][gpu]") {
  if (!torch::cuda::is_available()) {
    WARN("needs a GPU");
    return;
  }
  MixedPrecision mixed("bf16-mixed");
  mixed.set_device(c10::Device("cuda:0"));
  const auto scope = mixed.forward_context();
  const auto here = torch::ones({4, 4});
  const auto there = here.to("cuda:0").requires_grad_();
  const auto product = torch::mm(there, there);
  CHECK(dtype_of(product) == "bfloat16");
  CHECK(dtype_of(torch::mm(here, here)) == "float32");
  product.sum().backward();
  CHECK(dtype_of(there.grad()) == "float32");
}
