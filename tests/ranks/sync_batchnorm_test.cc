// sync_batchnorm against one process on the global batch: losses, weights and running statistics,
// also where the ranks' batches differ in size.
#include <torch/torch.h>

#include <catch2/catch.hpp>

#include "lightning.h"
#include "lightning/checkpoint/torch_file.h"
#include "lightning/nn/sync_batch_norm.h"
#include "strategies/fsdp.h"
#include "tests/support/ranks.h"

using namespace lightning;
using namespace lightning::testing;

namespace {

namespace nn = torch::nn;

constexpr int64_t kSteps = 6, kRanks = 2;
// Of a global batch: the ranks' share, and that of a rank in it.
constexpr int64_t kRows[kRanks] = {5, 2};
constexpr int64_t kAllRows = kRows[0] + kRows[1];

struct Config {
  std::string name;
  std::string strategy;
  std::string precision;
  double tolerance;
  std::vector<std::string> recomputed;
  bool synchronizes = true;
};

const std::vector<Config>& configs() {
  static const std::vector<Config> all{
      {"ddp", "ddp", "64-true", 1e-10, {}},
      {"ddp in float32", "ddp", "32-true", 1e-4, {}},
      {"ddp in bfloat16", "ddp", "bf16-mixed", 5e-2, {}},
      {"fsdp", "fsdp", "64-true", 1e-10, {}},
      {"fsdp in float32", "fsdp", "32-true", 1e-4, {}},
      {"fsdp with activation checkpointing", "fsdp", "64-true", 1e-10, {"Block"}},
      {"not synchronized", "ddp", "64-true", 1e-10, {}, false},
  };
  return all;
}

struct BlockImpl : nn::Module {
  explicit BlockImpl(int64_t channels) {
    conv = register_module("conv", nn::Conv2d(nn::Conv2dOptions(channels, 4, 3).padding(1)));
    norm = register_module("norm", nn::BatchNorm2d(4));
    // Its statistics are of a sample, though it is computed by the same operator.
    instance = register_module("instance", nn::InstanceNorm2d(4));
  }
  at::Tensor forward(const at::Tensor& x) { return torch::relu(instance(norm(conv(x)) * 2 + 1)); }
  nn::Conv2d conv{nullptr};
  nn::BatchNorm2d norm{nullptr};
  nn::InstanceNorm2d instance{nullptr};
};
TORCH_MODULE(Block);

struct Net : LightningModule {
  Net() {
    torch::manual_seed(5);
    first = register_module("first", Block(2));
    second = register_module("second", Block(4));
    // Without weights; with the mean of all batches as running statistics; without any of these.
    volume = register_module("volume", nn::BatchNorm3d(nn::BatchNorm3dOptions(4).affine(false)));
    wide =
        register_module("wide", nn::BatchNorm1d(nn::BatchNorm1dOptions(4).momentum(std::nullopt)));
    flat = register_module("flat",
                           nn::BatchNorm1d(nn::BatchNorm1dOptions(64).track_running_stats(false)));
    frozen = register_module("frozen", nn::BatchNorm1d(64));
    head = register_module("head", nn::Linear(64, 3));
  }
  at::Tensor logits(const at::Tensor& x) {
    frozen->eval();
    auto y = second(first(x));
    y = volume(y.unsqueeze(2)).squeeze(2);
    y = wide(y.flatten(2)).flatten(1);
    // In validation it would take the statistics of a rank's batch, as the original does.
    if (is_training()) y = flat(y);
    return head(frozen(y));
  }
  StepOutput training_step(const Batch& batch, int64_t) override {
    const auto x = batch.tensor();
    // The mean over ranks is that of all rows.
    const auto loss = logits(x).square().sum() * trainer().world_size() / kAllRows;
    losses.push_back(loss.detach().to(at::kDouble));
    return loss;
  }
  StepOutput validation_step(const Batch& batch, int64_t) override {
    log("val_loss", logits(batch.tensor()).square().sum().to(at::kDouble) / kAllRows,
        LogOptions().sync_dist(true).reduce_fx("sum"));
    return {};
  }
  Optimizers configure_optimizers() override {
    return torch::optim::SGD(parameters(), torch::optim::SGDOptions(0.002).momentum(0.9));
  }

  Block first{nullptr}, second{nullptr};
  nn::BatchNorm3d volume{nullptr};
  nn::BatchNorm1d wide{nullptr}, flat{nullptr}, frozen{nullptr};
  nn::Linear head{nullptr};
  std::vector<at::Tensor> losses;
};

// A batch a step: the rank's rows of the global one, or all.
DataLoader rows(std::optional<int64_t> rank) {
  const auto batch = [rank](int64_t step) {
    auto generator = at::make_generator<at::CPUGeneratorImpl>(static_cast<uint64_t>(step));
    const auto all = at::randn({kAllRows, 2, 4, 4}, generator) * 3 + 1;
    if (!rank) return Batch(all);
    return Batch(all.narrow(0, *rank == 0 ? 0 : kRows[0], kRows[*rank]));
  };
  return DataLoader(FunctionDataset(kSteps, batch), DataLoaderOptions().batch_size(std::nullopt));
}

TrainerOptions options(const Config& config, const std::string& dir) {
  at::globalContext().setAllowTF32CuDNN(false);  // convolutions would round to it
  return TrainerOptions()
      .accelerator(Ranks::accelerator())
      .precision(config.precision)
      .max_epochs(1)
      .limit_val_batches(int64_t{2})
      .logger(false)
      .use_distributed_sampler(false)
      .enable_progress_bar(false)
      .enable_model_summary(false)
      .enable_checkpointing(false)
      .default_root_dir(dir);
}

std::string file_of(const std::string& folder, const Config& config) {
  return folder + "/" + config.name + ".pt";
}

double distance(const at::Tensor& is, const at::Tensor& should) {
  const auto wide = [](const at::Tensor& tensor) { return tensor.to(at::kCPU, at::kDouble); };
  return (wide(is) - wide(should)).abs().max().item<double>();
}

}  // namespace

TEST_CASE("program: normalizes over all ranks", "[.program]") {
  for (const auto& config : configs()) {
    CAPTURE(config.name);
    auto flags = options(config, Ranks::folder()).devices(kRanks);
    flags.sync_batchnorm(config.synchronizes);
    if (config.strategy == "fsdp") {
      flags.strategy(FSDPStrategyOptions().activation_checkpointing_policy(config.recomputed));
    } else {
      flags.strategy(config.strategy);
    }
    Trainer trainer(flags);
    auto net = std::make_shared<Net>();
    trainer.fit(net, rows(trainer.global_rank()), rows(trainer.global_rank()));
    auto& all = trainer.strategy();
    auto result = State::dict({{"losses", all.reduce(at::stack(net->losses), ReduceOp::kMean)},
                               {"val_loss", *trainer.metric("val_loss")},
                               {"state", all.model_state(*net)}});
    if (trainer.is_global_zero()) write_torch_file(result, file_of(Ranks::folder(), config));
  }
}

TEST_CASE("sync_batchnorm trains as one process does on the global batch", "[ranks]") {
  Ranks program;
  const auto ended =
      program.run("program: normalizes over all ranks", {}, {}, nullptr, std::chrono::seconds(180));
  INFO(ended.output);
  REQUIRE(ended.status == 0);
  for (const auto& config : configs()) {
    CAPTURE(config.name);
    Trainer trainer(options(config, program.dir().path()).devices(1));
    auto net = std::make_shared<Net>();
    trainer.fit(net, rows(std::nullopt), rows(std::nullopt));
    const auto result = read_torch_file(file_of(program.dir().path(), config));
    const auto losses = distance(result.at("losses").as_tensor(), at::stack(net->losses));
    if (!config.synchronizes) {
      CHECK(losses > 1e-3);
      continue;
    }
    CHECK(losses < config.tolerance * 10);  // of about 10
    CHECK(result.at("val_loss").as_double() ==
          Approx(*trainer.metric("val_loss")).epsilon(config.tolerance));
    const auto state = trainer.strategy().model_state(*net);
    CHECK(result.at("state").as_dict().size() == state.as_dict().size());
    for (const auto& [name, value] : state.as_dict()) {
      INFO(to_string(name));
      const auto is = result.at("state").at(name).as_tensor();
      CHECK(is.scalar_type() == value.as_tensor().scalar_type());
      const auto size = value.as_tensor().to(at::kDouble).abs().max().item<double>();
      CHECK(distance(is, value.as_tensor()) < config.tolerance * std::max(size, 1.0));
    }
  }
}

namespace {

// Of one process, which are those of all.
class Alone : public Collectives {};

void check_as_plain(c10::Device device, at::ScalarType dtype, double tolerance) {
  CAPTURE(device, dtype);
  Alone alone;
  torch::manual_seed(2);
  const auto make = [&] {
    nn::BatchNorm2d norm(nn::BatchNorm2dOptions(6));
    norm->weight.set_data(torch::linspace(0.5, 2, 6));
    norm->to(device);
    return norm;
  };
  auto plain = make(), synchronized = make();
  const auto x = (torch::randn({5, 6, 3, 7}) * 2 + 4).to(device, dtype);
  const auto dy = torch::randn({5, 6, 3, 7}).to(device, dtype);
  const auto run = [&](nn::BatchNorm2d& norm, const Scope&) {
    const auto input = x.clone().requires_grad_();
    const auto y = norm(input);
    y.backward(dy);
    return std::vector<at::Tensor>{y,
                                   input.grad(),
                                   norm->weight.grad(),
                                   norm->bias.grad(),
                                   norm->running_mean,
                                   norm->running_var};
  };
  const auto expected = run(plain, nullptr), is = run(synchronized, sync_batch_norm(alone));
  for (size_t i = 0; i < is.size(); ++i) {
    CAPTURE(i);
    CHECK(is[i].scalar_type() == expected[i].scalar_type());
    CHECK(distance(is[i], expected[i]) < tolerance * expected[i].abs().max().item<double>());
  }
}

}  // namespace

TEST_CASE("a synchronized batch norm of one process is a plain one", "[nn]") {
  check_as_plain(at::kCPU, at::kFloat, 1e-5);
  check_as_plain(at::kCPU, at::kBFloat16, 2e-2);
}

TEST_CASE("on a GPU a synchronized batch norm of one process is a plain one", "[nn][gpu]") {
  if (!torch::cuda::is_available()) {
    WARN("needs a GPU");
    return;
  }
  check_as_plain(at::kCUDA, at::kFloat, 1e-5);
  check_as_plain(at::kCUDA, at::kHalf, 1e-2);
  check_as_plain(at::kCUDA, at::kBFloat16, 2e-2);
}
