// Models whose trained parameters change in the middle of a run, and parameters of seldom kinds,
// beside one process on the same global batch.
#include <torch/torch.h>

#include <algorithm>
#include <catch2/catch.hpp>

#include "lightning.h"
#include "lightning/checkpoint/torch_file.h"
#include "tests/ranks/in_turn.h"
#include "tests/support/ranks.h"

using namespace lightning;
using namespace lightning::testing;
using Catch::Contains;

namespace {

constexpr int64_t kWidth = 6;

DataLoader rows(std::shared_ptr<Sampler> sampler) { return rows_of(kWidth, std::move(sampler)); }

// From the second epoch on `body` and `late` are trained too: the one was frozen, the other is
// added to the optimizer. `phase` is complex, the gradient of `words` may be sparse.
struct Tuned : LightningModule {
  explicit Tuned(bool sparse) : sparse(sparse) {}

  void configure_model() override {
    namespace nn = torch::nn;
    torch::manual_seed(7);
    words = register_module("words", nn::Embedding(nn::EmbeddingOptions(5, kWidth).sparse(sparse)));
    body = register_module("body", nn::Linear(kWidth, kWidth));
    late = register_module("late", nn::Linear(kWidth, kWidth));
    head = register_module("head", nn::Linear(kWidth, 1));
    phase = register_parameter("phase", at::randn({kWidth}, at::kComplexFloat));
    for (auto& parameter : body->parameters()) parameter.set_requires_grad(false);
  }
  StepOutput training_step(const Batch& batch, int64_t) override {
    const auto& input = batch.tensor();
    const auto word = (input.select(1, 0).abs() * 4).to(at::kLong).clamp_max(4);
    auto hidden = body(input) + words(word);
    hidden = (hidden * phase).abs() + torch::tanh(late(hidden));
    return head(hidden).square().mean();
  }
  void on_train_epoch_start() override {
    if (current_epoch() != 1) return;
    for (auto& parameter : body->parameters()) parameter.set_requires_grad(true);
    optimizer().optimizer().add_param_group(torch::optim::OptimizerParamGroup(late->parameters()));
  }
  Optimizers configure_optimizers() override {
    auto first = parameters();
    for (const auto& parameter : late->parameters()) {
      first.erase(std::find_if(first.begin(), first.end(),
                               [&](const at::Tensor& one) { return one.is_same(parameter); }));
    }
    return torch::optim::SGD(first, torch::optim::SGDOptions(0.02).momentum(0.9));
  }

  bool sparse;
  torch::nn::Embedding words{nullptr};
  torch::nn::Linear body{nullptr}, late{nullptr}, head{nullptr};
  at::Tensor phase;
};

std::string weights_of(const std::string& strategy) { return strategy + " weights"; }

}  // namespace

TEST_CASE("program: fine-tunes", "[.program]") {
  const auto strategy = Ranks::variable("STRATEGY");
  Trainer trainer(options(Ranks::folder()).devices(2).strategy(strategy));
  auto module = std::make_shared<Tuned>(Ranks::variable("SPARSE") == "1");
  trainer.fit(module, rows(nullptr));
  const auto weights = trainer.strategy().model_state(*module);
  if (trainer.is_global_zero()) {
    write_torch_file(weights, file_of(Ranks::folder(), weights_of(strategy)));
  }
}

TEST_CASE(
    "parameters that are unfrozen or given to the optimizer in a run train on all ranks alike",
    "[ranks]") {
  const std::string strategy = GENERATE("ddp", "ddp_find_unused_parameters_true", "fsdp");
  CAPTURE(strategy);
  const bool sparse = strategy != "fsdp";
  Ranks program;
  const auto ended =
      program.run("program: fine-tunes", {{"STRATEGY", strategy}, {"SPARSE", sparse ? "1" : "0"}});
  INFO(ended.output);
  REQUIRE(ended.status == 0);

  Trainer trainer(options(program.dir().path()).devices(1).accumulate_grad_batches(2));
  auto module = std::make_shared<Tuned>(false);
  trainer.fit(module, rows(std::make_shared<InTurn>(2)));
  const auto weights = read_torch_file(file_of(program.dir().path(), weights_of(strategy)));
  const double rounding = Ranks::on_cpu() ? 1e-5 : 1e-4;
  for (const auto& item : module->named_parameters()) {
    const auto is = weights.at(item.key()).as_tensor(), should = item.value().detach().cpu();
    CAPTURE(item.key(), (is - should).abs().max());
    CHECK(at::allclose(is, should, rounding, rounding));
  }
}

TEST_CASE("fsdp refuses a sparse gradient by the parameter's name", "[ranks]") {
  Ranks program;
  const auto ended = program.run("program: fine-tunes", {{"STRATEGY", "fsdp"}, {"SPARSE", "1"}});
  CHECK(ended.status != 0);
  CHECK(ended.still_running == 0);
  CHECK_THAT(ended.output, Contains("Parameter \"words.weight\" got a sparse gradient") &&
                               Contains("sparse(false)"));
}
