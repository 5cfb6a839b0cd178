// Trainer::init_module and init_tensor: where, in which dtype and when a model's values are made,
// and that they are those of an ordinary construction.
#include <torch/torch.h>

#include <catch2/catch.hpp>

#include "lightning.h"
#include "lightning/checkpoint/module_state.h"
#include "lightning/checkpoint/torch_file.h"
#include "strategies/fsdp.h"
#include "tests/support/python.h"
#include "tests/support/ranks.h"
#include "tests/support/temp_dir.h"

using namespace lightning;
using namespace lightning::testing;
using Catch::Contains;

namespace {

using Weights = std::map<std::string, at::Tensor>;

struct Net : LightningModule {
  Net() {
    first = register_module("first", torch::nn::Linear(6, 5));
    norm = register_module("norm", torch::nn::BatchNorm1d(5));
    const at::NoGradGuard no_grad;
    torch::nn::init::normal_(first->bias, 0, 0.1);
    offset = register_buffer("offset", torch::rand({5}));
    example_input_array = Batch(torch::full({2, 6}, 0.5));
  }
  at::Tensor loss_of(const at::Tensor& x) { return (norm(first(x)) + offset).square().mean(); }
  StepOutput training_step(const Batch& batch, int64_t) override { return loss_of(batch.tensor()); }
  StepOutput validation_step(const Batch& batch, int64_t) override {
    log("val_loss", loss_of(batch.tensor()));
    return {};
  }
  void on_train_start() override {
    const auto own = trainer().strategy().model_state(*this);
    for (const auto& [name, value] : own.as_dict()) {
      const auto& state = value.as_tensor_state();
      if (!state.chunks.empty()) at_start[to_string(name)] = value.as_tensor().clone();
    }
  }
  Optimizers configure_optimizers() override { return torch::optim::SGD(parameters(), 0.1); }

  torch::nn::Linear first{nullptr};
  torch::nn::BatchNorm1d norm{nullptr};
  at::Tensor offset;
  Weights at_start;
};

Weights constructed(at::ScalarType dtype) {
  const auto before = c10::get_default_dtype();
  const auto back = scope_exit([&] { c10::set_default_dtype(before); });
  c10::set_default_dtype(c10::scalarTypeToTypeMeta(dtype));
  torch::manual_seed(11);
  const Net net;
  Weights weights;
  for (const auto& item : net.named_parameters()) weights[item.key()] = item.value().detach();
  for (const auto& item : net.named_buffers()) weights[item.key()] = item.value();
  return weights;
}

void check_same(const Weights& is, const Weights& should) {
  CHECK(is.size() == should.size());
  for (const auto& [name, weight] : should) {
    INFO(name);
    REQUIRE(is.count(name) == 1);
    CHECK(is.at(name).scalar_type() == weight.scalar_type());
    CHECK(at::equal(is.at(name), weight));
  }
}

TrainerOptions options(const std::string& dir) {
  return TrainerOptions()
      .accelerator("cpu")
      .max_steps(2)
      .logger(false)
      .enable_progress_bar(false)
      .enable_checkpointing(false)
      .enable_model_summary(false)
      .default_root_dir(dir);
}

DataLoader rows() {
  auto generator = at::make_generator<at::CPUGeneratorImpl>(3);
  return DataLoader(TensorDataset(Batch(at::randn({24, 6}, generator))), DataLoaderOptions(4));
}

// Makes a model in the scope, uses the generator for something else, and trains it.
std::shared_ptr<Net> train(Trainer& trainer, std::optional<bool> empty_init, bool is_empty) {
  torch::manual_seed(static_cast<uint64_t>(11 + trainer.global_rank()));
  std::shared_ptr<Net> net;
  {
    const Scope scope = trainer.init_module(empty_init);
    net = std::make_shared<Net>();
  }
  CHECK(net->first->weight.is_meta() == is_empty);
  CHECK(net->offset.is_meta() == is_empty);
  CHECK(net->first->weight.scalar_type() == trainer.precision().parameter_dtype());
  torch::rand({3});
  trainer.fit(net, rows());
  return net;
}

}  // namespace

TEST_CASE("a model of init_module has an ordinary construction's weights", "[lightning]") {
  const auto empty_init = GENERATE(as<std::optional<bool>>(), std::nullopt, true, false);
  const std::string precision = GENERATE("32-true", "bf16-true", "bf16-mixed");
  CAPTURE(empty_init.has_value(), empty_init.value_or(false), precision);
  TempDir dir;
  Trainer trainer(options(dir.path()).precision(precision));
  const auto net = train(trainer, empty_init, empty_init.value_or(false));
  check_same(net->at_start, constructed(trainer.precision().parameter_dtype()));
  CHECK(at::equal(net->example_input_array.tensor().to(at::kFloat), torch::full({2, 6}, 0.5)));
  CHECK_FALSE(at::equal(net->first->weight, net->at_start.at("first.weight")));  // it was trained
  CHECK(c10::get_default_dtype_as_scalartype() == at::kFloat);
}

TEST_CASE("a model that is born empty takes its weights from the checkpoint of the run",
          "[lightning]") {
  TempDir dir;
  Trainer saved(options(dir.path()));
  const auto net = train(saved, false, false);
  saved.save_checkpoint(dir.path("saved.ckpt"));
  Trainer trainer(options(dir.path()));
  std::shared_ptr<Net> empty;
  {
    const Scope scope = trainer.init_module(true);
    empty = std::make_shared<Net>();
    CHECK_THROWS_WITH(load_module_state_dict(*empty, module_state_dict(*net), true),
                      Contains("meta device"));
  }
  trainer.validate(empty, rows(), RunArguments().ckpt_path(dir.path("saved.ckpt")));
  for (const auto& item : net->named_parameters()) {
    CHECK(at::equal(empty->named_parameters()[item.key()], item.value()));
  }
  CHECK(at::equal(empty->norm->running_mean, net->norm->running_mean));
}

TEST_CASE("two empty models of one Trainer are run one after the other", "[lightning]") {
  TempDir dir;
  Trainer trainer(options(dir.path()));
  torch::manual_seed(11);
  std::vector<std::shared_ptr<Net>> nets;
  for (int i = 0; i < 2; ++i) {
    const Scope scope = trainer.init_module(true);
    nets.push_back(std::make_shared<Net>());
  }
  trainer.validate(nets[1], rows());
  CHECK(nets[0]->offset.is_meta());
  trainer.fit(nets[0], rows());
  check_same(nets[0]->at_start, constructed(at::kFloat));
  CHECK_FALSE(at::equal(nets[0]->offset, nets[1]->offset));
}

TEST_CASE("init_tensor makes tensors in the dtype of the precision", "[lightning]") {
  const std::string precision = GENERATE("32-true", "64-true", "bf16-true");
  Trainer trainer(TrainerOptions().accelerator("cpu").logger(false).precision(precision));
  {
    const Scope scope = trainer.init_tensor();
    CHECK(torch::zeros({2}).scalar_type() == trainer.precision().parameter_dtype());
    CHECK(torch::zeros({2}).device() == trainer.strategy().root_device());
    CHECK(torch::arange(2).scalar_type() == at::kLong);
  }
  CHECK(torch::zeros({2}).scalar_type() == at::kFloat);
}

TEST_CASE("init_module makes the weights that Python's makes", "[lightning]") {
  const std::vector<std::string> precisions{"32-true", "64-true", "bf16-true", "bf16-mixed"};
  TempDir dir;
  auto arguments = precisions;
  arguments.insert(arguments.begin(), dir.path("python.pt"));
  run_python(R"(
import sys, torch, lightning
weights = {}
for precision in sys.argv[2:]:
    trainer = lightning.Trainer(accelerator="cpu", logger=False, precision=precision)
    torch.manual_seed(11)
    with trainer.init_module():
        weights[precision] = torch.nn.Linear(6, 5).weight.detach()
torch.save(weights, sys.argv[1])
)",
             arguments);
  const auto python = read_torch_file(dir.path("python.pt"));
  for (const auto& precision : precisions) {
    for (const bool empty : {false, true}) {
      CAPTURE(precision, empty);
      Trainer trainer(options(dir.path()).precision(precision));
      torch::manual_seed(11);
      std::shared_ptr<Net> net;
      {
        const Scope scope = trainer.init_module(empty);
        net = std::make_shared<Net>();
      }
      trainer.validate(net, rows());
      const auto expected = python.at(precision).as_tensor();
      CHECK(net->first->weight.scalar_type() == expected.scalar_type());
      CHECK(at::equal(net->first->weight, expected));
    }
  }
}

TEST_CASE("program: constructs models for all strategies", "[.program]") {
  for (const char* strategy : {"ddp", "fsdp", "fsdp_cpu_offload"}) {
    for (const char* precision : {"32-true", "bf16-true"}) {
      for (const auto& empty_init : {std::optional<bool>(), {true}, {false}}) {
        CAPTURE(strategy, precision, empty_init.has_value(), empty_init.value_or(false));
        Trainer trainer(
            options(Ranks::folder()).devices(2).strategy(strategy).precision(precision));
        const auto net =
            train(trainer, empty_init, empty_init.value_or(std::string(strategy) != "ddp"));
        // Rank 0's hold.
        const auto expected = constructed(trainer.precision().parameter_dtype());
        if (trainer.is_global_zero()) check_same(net->at_start, expected);
      }
    }
  }
}

TEST_CASE("on several ranks a model of init_module has rank 0's weights", "[ranks]") {
  Ranks program;
  const auto ended = program.run("program: constructs models for all strategies");
  INFO(ended.output);
  CHECK(ended.status == 0);
}
