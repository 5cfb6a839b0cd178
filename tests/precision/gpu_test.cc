// The mixed precisions on a GPU: losses beside those of float32, the scaler's state, working copies
// and the memory they take.
#include <torch/cuda.h>
#include <torch/torch.h>

#include <catch2/catch.hpp>
#include <cmath>
#include <vector>

#include "lightning/accelerator.h"
#include "lightning/data/data_loader.h"
#include "lightning/module.h"
#include "lightning/param/working_copy.h"
#include "lightning/registry.h"
#include "lightning/strategy.h"
#include "lightning/trainer.h"
#include "precision/mixed.h"
#include "tests/support/boring.h"
#include "tests/support/temp_dir.h"

namespace lightning::testing {
namespace {

namespace nn = torch::nn;

constexpr int64_t kSteps = 50, kFeatures = 16;

bool stands_aside() {
  if (torch::cuda::is_available()) return false;
  WARN("needs a GPU");
  return true;
}

at::Tensor wave(int64_t count, double phase) {
  return torch::sin(torch::arange(count, torch::kFloat) * 0.7 + phase);
}

DataLoader loader(int64_t count = kSteps) {
  const auto row = [](int64_t i) {
    return Batch(wave(32 * kFeatures, 0.1 * static_cast<double>(i)).view({32, kFeatures}));
  };
  return DataLoader(FunctionDataset(count, row), DataLoaderOptions().batch_size(std::nullopt));
}

struct Regression : LightningModule {
  Regression() {
    net = register_module("net",
                          nn::Sequential(nn::Linear(kFeatures, 64), nn::ReLU(), nn::Linear(64, 1)));
    const at::NoGradGuard no_grad;
    double i = 0;
    for (auto& parameter : net->parameters()) {
      parameter.copy_(wave(parameter.numel(), i++).mul(0.2).view_as(parameter));
    }
  }
  StepOutput training_step(const Batch& batch, int64_t batch_idx) override {
    const auto x = batch.tensor();
    if (reads_copies) read_copies();
    const auto y = net->forward(x);
    output_dtype = y.scalar_type();
    auto loss = (y.squeeze(1) - x.sum(1)).square().mean();
    if (batch_idx == infinite) loss = loss * INFINITY;
    losses.push_back(loss.item<double>());
    return loss;
  }
  // As a layer of lightning/nn does.
  void read_copies() {
    for (const auto& parameter : net->parameters()) {
      const auto copy = working_copy(parameter, at::kBFloat16);
      copies_are_right =
          copies_are_right && torch::equal(copy, parameter.detach().to(at::kBFloat16));
      const auto again = working_copy(parameter, at::kBFloat16);
      copies_are_kept = copies_are_kept && again.data_ptr() == copy.data_ptr();
      places.push_back(copy.data_ptr());
    }
  }
  void on_train_batch_end(const StepOutput&, const Batch&, int64_t) override {
    const auto state = trainer().precision().state_dict();
    if (!state.empty()) scales.push_back(state.at("scale").as_double());
    for (const auto& parameter : parameters()) {
      float32_only = float32_only && parameter.scalar_type() == at::kFloat &&
                     parameter.grad().scalar_type() == at::kFloat;
    }
  }
  Optimizers configure_optimizers() override {
    return torch::optim::AdamW(parameters(), torch::optim::AdamWOptions(1e-2).weight_decay(0.1));
  }

  nn::Sequential net{nullptr};
  int64_t infinite = -1;
  bool reads_copies = false, copies_are_right = true, copies_are_kept = true, float32_only = true;
  std::vector<double> losses, scales;
  std::vector<const void*> places;
  at::ScalarType output_dtype = at::kFloat;
};

TrainerOptions on_gpu(const TempDir& dir, const Part<Precision>& precision) {
  return quiet(dir).accelerator("cuda").devices(int64_t{1}).max_epochs(1).precision(precision);
}

std::shared_ptr<Regression> train(const Part<Precision>& precision, int64_t infinite = -1) {
  const TempDir dir;
  Trainer trainer(on_gpu(dir, precision));
  auto module = std::make_shared<Regression>();
  module->infinite = infinite;
  trainer.fit(module, loader());
  return module;
}

TEST_CASE("mixed precision on a GPU trains as float32 does, in its dtypes", "[precision][gpu]") {
  if (stands_aside()) return;
  const auto exact = train("32-true");
  // With the scale that a scaler begins with the first losses are beyond float16.
  const auto scaler = std::make_shared<GradScaler>(GradScalerOptions().init_scale(256));
  for (const auto& [name, dtype, tolerance] :
       {std::make_tuple("bf16-mixed", at::kBFloat16, 0.05), {"16-mixed", at::kHalf, 0.01}}) {
    const auto mixed =
        train(std::make_shared<MixedPrecision>(name, dtype == at::kHalf ? scaler : nullptr));
    CHECK(mixed->output_dtype == dtype);
    CHECK(mixed->float32_only);
    REQUIRE(mixed->losses.size() == exact->losses.size());
    double worst = 0;
    for (size_t i = 0; i < exact->losses.size(); ++i) {
      const double error = std::abs(mixed->losses[i] - exact->losses[i]) / exact->losses[0];
      worst = std::max(worst, error);
    }
    INFO(name << ": losses differ by " << worst << " of the first, which is " << exact->losses[0]
              << "; the last is " << mixed->losses.back() << ", in float32 "
              << exact->losses.back());
    CHECK(worst < tolerance);
  }
}

TEST_CASE("16-mixed on a GPU leaves a step out where a gradient is not finite",
          "[precision][gpu]") {
  if (stands_aside()) return;
  const auto plain = train("16-mixed");
  const auto module = train("16-mixed", /*infinite=*/7);
  REQUIRE(module->scales.size() == kSteps);
  INFO("scales " << module->scales[6] << ", " << module->scales[7] << ", " << module->scales[8]);
  CHECK(module->scales[7] == module->scales[6] / 2);
  CHECK(module->scales[8] == module->scales[7]);
  CHECK(module->losses[6] == plain->losses[6]);
  CHECK(std::isinf(module->losses[7]));
  for (const auto& parameter : module->parameters()) CHECK(parameter.isfinite().all().item<bool>());
}

TEST_CASE("a checkpoint holds the scaler of 16-mixed, and a run goes on with it",
          "[precision][gpu]") {
  if (stands_aside()) return;
  const TempDir dir;
  const auto path = dir.path("last.ckpt");
  Trainer first(on_gpu(dir, "16-mixed"));
  const auto module = std::make_shared<Regression>();
  module->infinite = 7;
  first.fit(module, loader(12));
  first.save_checkpoint(path);
  const auto saved = first.strategy().load_checkpoint(path).at("MixedPrecision");
  CHECK(saved.at("scale").as_double() == module->scales.back());
  CHECK(saved.at("_growth_tracker").as_int() == 4);
  CHECK(saved.at("growth_interval").as_int() == 2000);

  Trainer second(on_gpu(dir, "16-mixed").max_epochs(2));
  const auto resumed = std::make_shared<Regression>();
  second.fit(resumed, loader(12), {}, RunArguments().ckpt_path(path));
  CHECK(resumed->scales.front() == module->scales.back());
  CHECK(second.precision().state_dict().at("_growth_tracker").as_int() == 16);
}

TEST_CASE("under bf16-mixed the step writes copies for layers that read them", "[precision][gpu]") {
  if (stands_aside()) return;
  const TempDir dir;
  Trainer trainer(on_gpu(dir, "bf16-mixed"));
  const auto module = std::make_shared<Regression>();
  module->reads_copies = true;
  trainer.fit(module, loader(10));
  CHECK(module->copies_are_right);
  CHECK(module->copies_are_kept);
  const auto count = module->net->parameters().size();
  REQUIRE(module->places.size() == 10 * count);
  for (size_t i = count; i < module->places.size(); ++i) {
    CHECK(module->places[i] == module->places[i - count]);  // the same place in each step
  }
}

TEST_CASE("copies are given back when the run ends", "[precision][gpu]") {
  if (stands_aside()) return;
  const c10::Device device("cuda:0");
  MixedPrecision mixed("bf16-mixed");
  mixed.set_device(device);
  const auto cuda = registry<Accelerator>().make("cuda");
  cuda->setup_device(device);
  const auto weight = torch::ones({1024, 1024}, device).requires_grad_();
  const auto allocated = [&] {
    for (const auto& [name, value] : cuda->device_stats(device)) {
      if (name == "allocated_bytes.all.current") return value;
    }
    return 0.0;
  };
  const double before = allocated();
  {
    const auto scope = mixed.forward_context();
    working_copy(weight, at::kBFloat16);
  }
  CHECK(allocated() - before == 2 * 1024 * 1024);
  mixed.teardown();
  CHECK(allocated() == before);
}

}  // namespace
}  // namespace lightning::testing
