// The loops ask a strategy and a precision, and never know which they are: a test-only strategy
// answers everything in its own way, and the run must show it.
#include "lightning/strategy.h"

#include <torch/torch.h>

#include <catch2/catch.hpp>
#include <map>
#include <nlohmann/json.hpp>

#include "lightning/accelerator.h"
#include "lightning/data/data_loader.h"
#include "lightning/module.h"
#include "lightning/registry.h"
#include "lightning/step/entry.h"
#include "lightning/trainer.h"
#include "tests/support/python.h"
#include "tests/support/temp_dir.h"

using namespace lightning;
using lightning::testing::TempDir;

namespace lightning {
class DeviceMesh {};
}  // namespace lightning

namespace {

// Counts every question, and answers otherwise than a single device would.
class AskedStrategy : public Strategy {
 public:
  std::map<std::string, int> asked;
  bool restores_after_setup = false;
  bool accumulates = false;
  bool clips = false;
  bool module_was_configured_at_setup = false;
  int open_step_scopes = 0;
  std::vector<double> norms_wanted;

  Scope counted(const char* name) {
    ++asked[name];
    return scope_exit([this, name] { ++asked[str(name, " ended")]; });
  }

  void setup_environment() override {
    ++asked["setup_environment"];
    Strategy::setup_environment();
  }
  std::shared_ptr<DeviceMesh> device_mesh() const override {
    return std::make_shared<DeviceMesh>();
  }
  Scope module_init_context(std::optional<bool> empty) override {
    auto outer = Strategy::module_init_context(empty);
    auto scope = counted("module_init_context");
    return scope_exit([outer, scope] {});
  }
  Scope tensor_init_context() override { return counted("tensor_init_context"); }
  void setup(torch::nn::Module& module, const ConfigureOptimizers& configure) override {
    ++asked["setup"];
    module_was_configured_at_setup = !module.parameters().empty();
    Strategy::setup(module, configure);
  }
  bool restore_checkpoint_after_setup() const override { return restores_after_setup; }
  Scope step_scope() override {
    ++open_step_scopes;
    ++asked["step_scope"];
    return scope_exit([this] { --open_step_scopes; });
  }
  void backward(const at::Tensor& loss,
                const std::function<void(const at::Tensor&)>& run_backward) override {
    ++asked["backward"];
    run_backward(loss * 2);  // visible in the gradients
  }
  at::Tensor optimizer_step(const OptimizerStep& step) override {
    ++asked["optimizer_step"];
    return Strategy::optimizer_step(step);
  }
  Scope no_backward_sync(torch::nn::Module&) override { return counted("no_backward_sync"); }
  bool owns_gradient_accumulation() const override { return accumulates; }
  bool owns_gradient_clipping() const override { return clips; }
  at::Tensor gradient_norm(torch::optim::Optimizer& optimizer) override {
    ++asked["gradient_norm"];
    return Strategy::gradient_norm(optimizer);
  }
  void clip_gradients(torch::optim::Optimizer& optimizer, double limit,
                      ClipAlgorithm algorithm) override {
    ++asked["clip_gradients"];
    norms_wanted.push_back(limit);
    Strategy::clip_gradients(optimizer, limit, algorithm);
  }
  void on_step_end() override { ++asked["on_step_end"]; }
  void on_train_start() override { ++asked["on_train_start"]; }
  void on_train_end() override { ++asked["on_train_end"]; }
  void on_evaluation_start() override { ++asked["on_evaluation_start"]; }
  void on_evaluation_end() override { ++asked["on_evaluation_end"]; }
  std::shared_ptr<Loader> process_dataloader(std::shared_ptr<Loader> loader) override {
    ++asked["process_dataloader"];
    return loader;
  }
  std::optional<SamplerArguments> sampler_arguments() const override {
    return SamplerArguments{2, 1};  // the second half of the data
  }
  bool supports_inference_mode() const override { return false; }
  void barrier(const std::string& name) override { ++asked["barrier " + name]; }
  bool reduce_any(bool value) override {
    ++asked["reduce_any"];
    return value;
  }
  State model_state(const torch::nn::Module& module) override {
    ++asked["model_state"];
    return Strategy::model_state(module);
  }
  void load_model_state(torch::nn::Module& module, const State& state, bool strict) override {
    ++asked["load_model_state"];
    Strategy::load_model_state(module, state, strict);
  }
  State optimizer_state(torch::optim::Optimizer& optimizer,
                        const torch::nn::Module& module) override {
    ++asked["optimizer_state"];
    return Strategy::optimizer_state(optimizer, module);
  }
  void load_optimizer_state(torch::optim::Optimizer& optimizer, const torch::nn::Module& module,
                            const State& state) override {
    ++asked["load_optimizer_state"];
    Strategy::load_optimizer_state(optimizer, module, state);
  }
  void save_checkpoint(const State& checkpoint, const std::string& path) override {
    ++asked["save_checkpoint"];
    Strategy::save_checkpoint(checkpoint, path);
  }
  State load_checkpoint(const std::string& path) override {
    ++asked["load_checkpoint"];
    return Strategy::load_checkpoint(path);
  }
  void remove_checkpoint(const std::string& path) override {
    ++asked["remove_checkpoint"];
    Strategy::remove_checkpoint(path);
  }
  void on_exception(const std::exception&) override { ++asked["on_exception"]; }
  void teardown(torch::nn::Module* module,
                const std::vector<torch::optim::Optimizer*>& optimizers) override {
    ++asked["teardown"];
    Strategy::teardown(module, optimizers);
  }
};

class AskedPrecision : public Precision {
 public:
  mutable std::map<std::string, int> asked;

  std::string name() const override { return "asked"; }
  void convert_module(torch::nn::Module&) override { ++asked["convert_module"]; }
  Batch convert_input(Batch batch) override {
    ++asked["convert_input"];
    return batch.apply([](const at::Tensor& tensor) { return tensor * 0 + 1; });
  }
  Scope forward_context() override {
    ++asked["forward_context"];
    return nullptr;
  }
  Scope module_init_context() override {
    ++asked["module_init_context"];
    return nullptr;
  }
  at::Tensor scale_loss(at::Tensor loss) override {
    ++asked["scale_loss"];
    return loss * 4;
  }
  at::Tensor optimizer_step(const OptimizerStep& step) override {
    ++asked["optimizer_step"];
    return Precision::optimizer_step(step);
  }
  std::string state_key() const override { return "AskedPrecision"; }
  State state_dict() const override { return State::dict({{"scale", 4.0}}); }
  void load_state_dict(const State& state) override {
    ++asked["load_state_dict"];
    CHECK(state.at("scale").as_double() == 4.0);
  }
  void teardown() override { ++asked["teardown"]; }
};

struct Line : LightningModule {
  torch::nn::Linear layer{nullptr};
  AskedStrategy* strategy = nullptr;
  std::vector<double> gradients;
  std::vector<double> inputs;
  bool inference = false;
  bool had_mesh = false;

  void configure_model() override {
    had_mesh = device_mesh() != nullptr;
    layer = register_module("layer", torch::nn::Linear(1, 1));
  }
  StepOutput training_step(const Batch& batch, int64_t) override {
    if (strategy != nullptr) CHECK(strategy->open_step_scopes == 1);
    inputs.push_back(batch[0].flatten()[0].item<double>());
    return layer->forward(batch[0]).mean();
  }
  StepOutput validation_step(const Batch& batch, int64_t) override {
    inference = c10::InferenceMode::is_enabled();
    return layer->forward(batch[0]).mean();
  }
  void on_before_optimizer_step(torch::optim::Optimizer&) override {
    gradients.push_back(layer->bias.grad().item<double>());
  }
  Optimizers configure_optimizers() override { return torch::optim::SGD(parameters(), 0.01); }
};

DataLoader numbers(int64_t rows) {
  return DataLoader(std::make_shared<TensorDataset>(std::initializer_list<at::Tensor>{
                        torch::arange(static_cast<double>(rows)).reshape({rows, 1}) + 1}),
                    DataLoaderOptions().batch_size(1));
}

TrainerOptions quiet(const TempDir& dir) {
  return TrainerOptions()
      .enable_progress_bar(false)
      .enable_model_summary(false)
      .logger(false)
      .max_epochs(1)
      .default_root_dir(dir.path());
}

}  // namespace

TEST_CASE("the loops ask a strategy for everything it may answer", "[strategy]") {
  TempDir dir;
  auto strategy = std::make_shared<AskedStrategy>();
  auto module = std::make_shared<Line>();
  module->strategy = strategy.get();
  Trainer trainer(quiet(dir).strategy(strategy).accumulate_grad_batches(2).gradient_clip_val(0.5));
  trainer.fit(module, numbers(8), numbers(4));
  auto& asked = strategy->asked;

  CHECK(module->had_mesh);
  CHECK(strategy->module_was_configured_at_setup);
  CHECK_FALSE(module->inference);
  CHECK(asked["setup_environment"] == 1);
  CHECK(asked["setup"] == 1);
  CHECK(asked["module_init_context"] == 1);
  CHECK(asked["module_init_context ended"] == 1);
  CHECK(asked["tensor_init_context"] == 1);
  CHECK(asked["backward"] == 4);  // half of the 8 batches are this process's
  CHECK(asked["optimizer_step"] == 2);
  CHECK(asked["no_backward_sync"] == 2);
  CHECK(asked["no_backward_sync ended"] == 2);
  CHECK(asked["clip_gradients"] == 2);
  CHECK(asked["gradient_norm"] == 2);
  CHECK(strategy->norms_wanted == std::vector<double>{0.5, 0.5});
  CHECK(asked["on_step_end"] == 4);
  CHECK(asked["on_train_start"] == 1);
  CHECK(asked["on_train_end"] == 1);
  CHECK(asked["on_evaluation_start"] == 2);  // sanity check, epoch
  CHECK(asked["on_evaluation_end"] == 2);
  CHECK(asked["process_dataloader"] == 2);
  CHECK(asked["barrier train_dataloader()"] == 1);
  CHECK(asked["barrier pre_setup"] == 1);
  CHECK(asked["barrier Trainer.save_checkpoint"] == 1);
  CHECK(asked["model_state"] == 1);
  CHECK(asked["optimizer_state"] == 1);
  CHECK(asked["save_checkpoint"] == 1);
  CHECK(asked["teardown"] == 1);
  CHECK(module->gradients == std::vector<double>{2.0, 2.0});  // twice 0.5 + 0.5: its own backward
}

TEST_CASE("a strategy that restores after set-up gets the weights only then", "[strategy]") {
  TempDir dir;
  const auto path = dir.path() + "/one.ckpt";
  {
    Trainer trainer(quiet(dir));
    trainer.fit(std::make_shared<Line>(), numbers(2));
    trainer.save_checkpoint(path);
  }
  for (const bool after : {false, true}) {
    auto strategy = std::make_shared<AskedStrategy>();
    strategy->restores_after_setup = after;
    Trainer trainer(quiet(dir).strategy(strategy).max_epochs(2));
    trainer.fit(std::make_shared<Line>(), numbers(2), Loaders(), RunArguments().ckpt_path(path));
    CHECK(strategy->asked["load_checkpoint"] == 1);
    CHECK(strategy->asked["load_model_state"] == 1);
    CHECK(strategy->asked["load_optimizer_state"] == 1);
    CHECK(trainer.current_epoch() == 2);
  }
}

TEST_CASE("a strategy that accumulates and clips by itself is asked at every batch", "[strategy]") {
  TempDir dir;
  auto strategy = std::make_shared<AskedStrategy>();
  strategy->accumulates = strategy->clips = true;
  Trainer trainer(quiet(dir).strategy(strategy).accumulate_grad_batches(3).gradient_clip_val(0.5));
  trainer.fit(std::make_shared<Line>(), numbers(8));
  CHECK(strategy->asked["optimizer_step"] == 4);
  CHECK(strategy->asked["no_backward_sync"] == 0);
  CHECK(strategy->asked["clip_gradients"] == 0);
  CHECK(trainer.global_step() == 1);  // the last, incomplete window is not stepped
}

TEST_CASE("a strategy hears of an exception, and is torn down after it", "[strategy]") {
  struct Failing : Line {
    StepOutput training_step(const Batch&, int64_t) override { throw std::runtime_error("no"); }
  };
  TempDir dir;
  auto strategy = std::make_shared<AskedStrategy>();
  Trainer trainer(quiet(dir).strategy(strategy));
  CHECK_THROWS_WITH(trainer.fit(std::make_shared<Failing>(), numbers(8)), "no");
  CHECK(strategy->asked["on_exception"] == 1);
  CHECK(strategy->asked["teardown"] == 1);
  CHECK(trainer.interrupted());
}

TEST_CASE("the loops ask a precision for everything it may answer", "[precision]") {
  TempDir dir;
  auto precision = std::make_shared<AskedPrecision>();
  auto module = std::make_shared<Line>();
  Trainer trainer(quiet(dir).plugins({precision}));
  trainer.fit(module, numbers(4), numbers(1));
  auto& asked = precision->asked;
  CHECK(asked["convert_module"] == 1);
  CHECK(asked["module_init_context"] == 1);
  CHECK(asked["convert_input"] == 4 + 1 + 1);  // training, sanity check, validation
  CHECK(asked["forward_context"] == 4 + 1 + 1);
  CHECK(asked["scale_loss"] == 4);
  CHECK(asked["optimizer_step"] == 4);
  CHECK(asked["teardown"] == 1);
  CHECK(module->inputs == std::vector<double>{1, 1, 1, 1});
  CHECK(module->gradients == std::vector<double>{4, 4, 4, 4});

  const auto path = dir.path() + "/scaled.ckpt";
  trainer.save_checkpoint(path);
  auto resumed = std::make_shared<AskedPrecision>();
  Trainer second(quiet(dir).plugins({resumed}).max_epochs(2));
  second.fit(std::make_shared<Line>(), numbers(4), numbers(1), RunArguments().ckpt_path(path));
  CHECK(resumed->asked["load_state_dict"] == 1);
}

TEST_CASE("a model's method is entered in the precision's dtype and leaves it again",
          "[precision]") {
  AskedStrategy strategy;
  strategy.connect(registry<Accelerator>().make("cpu"), registry<Precision>().make("bf16-mixed"),
                   {c10::Device(c10::kCPU)}, default_checkpoint_io());
  at::ScalarType seen = at::kFloat;
  const auto input =
      Batch::map({{"x", torch::ones({2, 3})}, {"label", torch::ones({2}, torch::kLong)}});
  const auto output = enter_converted(strategy, input, [&](const Batch& batch) {
    CHECK(strategy.open_step_scopes == 1);
    CHECK(batch["label"].scalar_type() == at::kLong);
    seen = batch["x"].scalar_type();
    return torch::matmul(batch["x"], torch::ones({3, 1}));
  });
  CHECK(seen == at::kBFloat16);
  CHECK(output.tensor().scalar_type() == at::kFloat);
  CHECK(strategy.open_step_scopes == 0);
}

// ---- Clipping -----------------------------------------------------------------------------------

namespace {

constexpr const char* kClippingScript = R"(
import json, sys, torch
torch.set_num_threads(1)
out = []
for dtypes, limit, algorithm in json.loads(sys.argv[1]):
    torch.manual_seed(7)
    params = []
    for i, dtype in enumerate(dtypes):
        params.append(torch.nn.Parameter(torch.zeros(3 + 40 * i, dtype=getattr(torch, dtype))))
        params[-1].grad = torch.randn(3 + 40 * i, dtype=torch.float64).to(params[-1].dtype)
    params.append(torch.nn.Parameter(torch.zeros(4)))  # without a gradient
    norm = torch.nn.utils.get_total_norm([p.grad for p in params[:-1]]).double().item()
    if algorithm == "norm":
        torch.nn.utils.clip_grad_norm_(params, limit)
    else:
        torch.nn.utils.clip_grad_value_(params, limit)
    out.append([norm] + torch.cat([p.grad.double() for p in params[:-1]]).tolist())
json.dump(out, sys.stdout)
)";

at::ScalarType dtype_named(const std::string& name) {
  static const std::map<std::string, at::ScalarType> dtypes = {{"float64", at::kDouble},
                                                               {"float32", at::kFloat},
                                                               {"float16", at::kHalf},
                                                               {"bfloat16", at::kBFloat16}};
  return dtypes.at(name);
}

// The norm of the gradients as they were, and all of them after clipping.
std::vector<double> clipped(const nlohmann::json& run, c10::Device device) {
  torch::manual_seed(7);
  std::vector<at::Tensor> params;
  for (size_t i = 0; i < run[0].size(); ++i) {
    const auto size = static_cast<int64_t>(3 + 40 * i);
    const auto options = at::TensorOptions(device).dtype(dtype_named(run[0][i]));
    params.push_back(torch::zeros(size, options).requires_grad_());
    params.back().mutable_grad() = torch::randn(size, at::kDouble).to(options);
  }
  params.push_back(torch::zeros(4).requires_grad_());  // without a gradient
  torch::optim::SGD sgd(params, 0.1);
  AskedStrategy strategy;
  strategy.connect(registry<Accelerator>().make("cpu"), registry<Precision>().make("32-true"),
                   {device}, default_checkpoint_io());
  std::vector<double> out = {strategy.gradient_norm(sgd).item<double>()};
  strategy.clip_gradients(sgd, run[1],
                          run[2] == "norm" ? ClipAlgorithm::kNorm : ClipAlgorithm::kValue);
  for (size_t i = 0; i + 1 < params.size(); ++i) {
    const auto grad = params[i].grad().cpu().to(at::kDouble);
    out.insert(out.end(), grad.data_ptr<double>(), grad.data_ptr<double>() + grad.numel());
  }
  return out;
}

const nlohmann::json& clippings() {
  static const auto runs = nlohmann::json::parse(R"([
    [["float32", "float32", "float32"], 0.7, "norm"],
    [["float32", "float32"], 1000, "norm"],
    [["float16", "float16"], 0.7, "norm"],
    [["bfloat16", "bfloat16"], 0.7, "norm"],
    [["float64", "float32", "bfloat16", "float32"], 0.7, "norm"],
    [["float32", "bfloat16", "float64"], 0.3, "value"]
  ])");
  return runs;
}

}  // namespace

TEST_CASE("gradients are clipped as torch clips them, bit for bit", "[strategy]") {
  torch::set_num_threads(1);
  const auto expected =
      nlohmann::json::parse(lightning::testing::run_python(kClippingScript, {clippings().dump()}));
  for (size_t i = 0; i < clippings().size(); ++i) {
    INFO(clippings()[i]);
    CHECK((clipped(clippings()[i], at::kCPU) == expected[i].get<std::vector<double>>()));
  }
}

TEST_CASE("without gradients there is nothing to clip, and the norm is 0", "[strategy]") {
  AskedStrategy strategy;
  strategy.connect(registry<Accelerator>().make("cpu"), registry<Precision>().make("32-true"),
                   {c10::Device(c10::kCPU)}, default_checkpoint_io());
  torch::optim::SGD sgd({torch::zeros(4).requires_grad_()}, 0.1);
  strategy.clip_gradients(sgd, 1, ClipAlgorithm::kNorm);
  CHECK(strategy.gradient_norm(sgd).item<double>() == 0);
}

TEST_CASE("gradients are clipped on a GPU as on the CPU", "[strategy][gpu]") {
  if (!torch::cuda::is_available()) {
    WARN("needs a GPU");
    return;
  }
  for (const auto& run : clippings()) {
    const auto here = clipped(run, at::kCPU), there = clipped(run, at::kCUDA);
    const bool rounds = run.dump().find("float16") != std::string::npos;
    for (size_t i = 0; i < here.size(); ++i) {
      INFO(run << " number " << i);
      CHECK(there[i] == Approx(here[i]).epsilon(rounds ? 1e-2 : 1e-6));
    }
  }
}
