// FSDP on one GPU, with what it keeps on the GPU and with what it keeps on the host.
#include <c10/core/CachingDeviceAllocator.h>
#include <torch/cuda.h>
#include <torch/torch.h>

#include <catch2/catch.hpp>

#include "lightning.h"
#include "precision/mixed.h"
#include "strategies/fsdp.h"
#include "tests/support/temp_dir.h"

using namespace lightning;
using lightning::testing::TempDir;

namespace {

constexpr int64_t kWidth = 1024, kLayers = 12;
constexpr int64_t kLayerBytes = kWidth * kWidth * 4;

struct Deep : LightningModule {
  void configure_model() override {
    torch::manual_seed(3);
    layers = register_module("layers", torch::nn::Sequential());
    for (int64_t i = 0; i < kLayers; ++i) layers->push_back(torch::nn::Linear(kWidth, kWidth));
    scale = register_parameter("scale", torch::full({}, 0.5));
  }
  at::Tensor loss_of(at::Tensor x) {
    for (auto& layer : *layers) x = x + torch::gelu(layer.forward(x));
    return (x * scale).square().mean();
  }
  StepOutput training_step(const Batch& batch, int64_t) override {
    auto loss = loss_of(batch.tensor());
    losses.push_back(loss.item<double>());
    return loss;
  }
  void on_before_optimizer_step(torch::optim::Optimizer& optimizer) override {
    for (const auto& parameter : optimizer.param_groups()[0].params()) {
      slices.push_back(parameter);
      gradient_is_on_host = parameter.grad().is_cpu() && gradient_is_on_host;
    }
  }
  StepOutput validation_step(const Batch& batch, int64_t) override {
    log("val_loss", loss_of(batch.tensor()));
    return {};
  }
  Optimizers configure_optimizers() override { return torch::optim::AdamW(parameters(), 1e-3); }

  torch::nn::Sequential layers{nullptr};
  at::Tensor scale;
  std::vector<double> losses;
  std::vector<at::Tensor> slices;
  bool gradient_is_on_host = true;
};

struct Case {
  std::string precision;
  int64_t accumulate;
  std::string sharding;
};

struct Outcome {
  std::shared_ptr<Deep> module;
  std::map<std::string, at::Tensor> weights;
  std::vector<at::Tensor> optimizer_state;
  double val_loss = 0;
  int64_t peak_bytes = 0;
};

Outcome train(const std::string& strategy, const Case& how, const std::string& dir) {
  torch::zeros(1, torch::kCUDA);  // the allocator is there from the first tensor on
  auto* const allocator = c10::getDeviceAllocator(c10::kCUDA);
  allocator->emptyCache();
  allocator->resetPeakStats(0);
  const auto before = allocator->getDeviceStats(0).allocated_bytes[0].current;
  auto options = FSDPStrategyOptions()
                     .sharding_strategy(how.sharding)
                     .auto_wrap_policy({"Linear"})
                     .cpu_offload(strategy == "fsdp_cpu_offload");
  auto flags = TrainerOptions()
                   .accelerator("cuda")
                   .devices(1)
                   .strategy(options)
                   .accumulate_grad_batches(how.accumulate)
                   .gradient_clip_val(1.0)
                   .max_epochs(1)
                   .logger(false)
                   .enable_progress_bar(false)
                   .enable_model_summary(false)
                   .enable_checkpointing(false)
                   .default_root_dir(dir);
  if (how.precision == "16-mixed") {  // with a scale at which nothing overflows
    const auto scaler = std::make_shared<GradScaler>(GradScalerOptions().init_scale(256));
    flags.plugins({std::make_shared<MixedPrecision>(how.precision, scaler)});
  } else {
    flags.precision(how.precision);
  }
  Trainer trainer(flags);
  torch::manual_seed(4);
  const DataLoader rows(TensorDataset(Batch(torch::randn({64, kWidth}))), DataLoaderOptions(8));
  Outcome outcome;
  outcome.module = std::make_shared<Deep>();
  trainer.fit(outcome.module, rows, rows);
  outcome.peak_bytes = allocator->getDeviceStats(0).allocated_bytes[0].peak - before;
  outcome.val_loss = *trainer.metric("val_loss");
  const auto optimizer = trainer.optimizers()[0];
  const auto weights = trainer.strategy().model_state(*outcome.module);
  for (const auto& [name, value] : weights.as_dict()) {
    outcome.weights[to_string(name)] = value.as_tensor().to(at::kCPU, at::kDouble, false, true);
  }
  for (const auto& parameter : optimizer->param_groups()[0].params()) {
    const auto& state = static_cast<const torch::optim::AdamWParamState&>(
        *optimizer->state().at(parameter.unsafeGetTensorImpl()));
    outcome.optimizer_state.push_back(state.exp_avg());
    outcome.optimizer_state.push_back(state.exp_avg_sq());
  }
  return outcome;
}

}  // namespace

TEST_CASE(
    "fsdp_cpu_offload trains on a GPU as fsdp does, from the host's memory and with less of "
    "the GPU's",
    "[ranks][gpu]") {
  if (!torch::cuda::is_available()) {
    WARN("needs a GPU");
    return;
  }
  const auto how = GENERATE(values<Case>({{"32-true", 1, "FULL_SHARD"},
                                          {"32-true", 4, "FULL_SHARD"},
                                          {"bf16-mixed", 1, "FULL_SHARD"},
                                          {"16-mixed", 1, "FULL_SHARD"},
                                          {"bf16-true", 1, "FULL_SHARD"},
                                          {"32-true", 1, "SHARD_GRAD_OP"}}));
  CAPTURE(how.precision, how.accumulate, how.sharding);
  TempDir dir;
  const auto fsdp = train("fsdp", how, dir.path());
  const auto offload = train("fsdp_cpu_offload", how, dir.path());
  // Adam rounds otherwise on a CPU.
  const double tolerance = how.precision == "32-true" ? 1e-4 : 3e-2;
  REQUIRE(fsdp.module->losses.size() == 8);
  REQUIRE(offload.module->losses.size() == 8);
  CHECK(offload.module->losses[0] == fsdp.module->losses[0]);
  CHECK(offload.module->losses.back() < 0.9 * offload.module->losses[0]);
  for (size_t i = 0; i < fsdp.module->losses.size(); ++i) {
    CHECK(offload.module->losses[i] == Approx(fsdp.module->losses[i]).epsilon(tolerance));
  }
  CHECK(offload.val_loss == Approx(fsdp.val_loss).epsilon(tolerance));
  REQUIRE(offload.weights.size() == fsdp.weights.size());
  for (const auto& [name, weight] : fsdp.weights) {
    INFO(name);
    CHECK(at::allclose(offload.weights.at(name), weight, tolerance, tolerance));
  }
  REQUIRE(!offload.module->slices.empty());
  for (const auto& slice : offload.module->slices) {
    CHECK(slice.is_cpu());
    CHECK(slice.is_pinned());
  }
  CHECK(offload.module->gradient_is_on_host);
  for (const auto& state : offload.optimizer_state) CHECK(state.is_cpu());
  if (how.accumulate > 1 || how.sharding != "FULL_SHARD") return;  // those hold more on the GPU
  CAPTURE(offload.peak_bytes, fsdp.peak_bytes);
  CHECK(fsdp.peak_bytes > 3 * kLayers * kLayerBytes / 2);
  CHECK(offload.peak_bytes < fsdp.peak_bytes / 2);
  CHECK(offload.peak_bytes < kLayers * kLayerBytes);
}
