// Each precision on the CPU against Python Lightning (parity.py, which does the same): dtypes, 50
// losses and weights; and the gradient scaler, alone and in a run, against torch.amp.GradScaler.
#include <torch/torch.h>

#include <catch2/catch.hpp>
#include <cmath>
#include <map>
#include <nlohmann/json.hpp>
#include <set>
#include <string>
#include <vector>

#include "lightning/data/data_loader.h"
#include "lightning/module.h"
#include "lightning/optim/optimizer_state.h"
#include "lightning/strategy.h"
#include "lightning/trainer.h"
#include "precision/grad_scaler.h"
#include "precision/mixed.h"
#include "tests/support/boring.h"
#include "tests/support/python.h"
#include "tests/support/temp_dir.h"

namespace lightning::testing {
namespace {

namespace nn = torch::nn;

const char* const kCases = R"({
  "precisions": [
    {"precision": "64-true", "optimizer": "sgd"},
    {"precision": "64-true", "optimizer": "adamw"},
    {"precision": "32-true", "optimizer": "sgd"},
    {"precision": "32-true", "optimizer": "adamw"},
    {"precision": "bf16-true", "optimizer": "sgd"},
    {"precision": "bf16-true", "optimizer": "adamw"},
    {"precision": "16-true", "optimizer": "sgd"},
    {"precision": "16-true", "optimizer": "adamw"},
    {"precision": "bf16-mixed", "optimizer": "sgd"},
    {"precision": "bf16-mixed", "optimizer": "adamw"},
    {"precision": "16-mixed", "optimizer": "adamw"}
  ],
  "scaled": [
    {"optimizer": "sgd", "infinite": [5, 9], "skipped": [11], "trainer": {}},
    {"optimizer": "adamw", "infinite": [0, 5, 6], "skipped": [2], "trainer": {}},
    {"optimizer": "sgd", "infinite": [5], "skipped": [7],
     "trainer": {"gradient_clip_val": 0.1}},
    {"optimizer": "sgd", "infinite": [5], "skipped": [],
     "trainer": {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}},
    {"optimizer": "sgd", "infinite": [4], "skipped": [9, 14],
     "trainer": {"accumulate_grad_batches": 2}},
    {"optimizer": "sgd", "infinite": [5], "skipped": [], "trainer": {}, "manual": true},
    {"optimizer": "adamw", "infinite": [5], "skipped": [], "trainer": {}, "manual": true}
  ],
  "scaler": [
    {"optimizer": "sgd", "factors": {"4": "inf", "9": "nan", "10": "inf"}},
    {"optimizer": "adamw", "factors": {"0": "inf", "7": "inf", "16": "nan"}}
  ]
})";

// The cases, and what Python made of them.
struct Reference {
  Json cases = Json::parse(kCases);
  Json results = Json::parse(
      run_python("import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0])",
                 {"tests/precision/parity.py", kCases}));
};

const Reference& reference() {
  static const Reference instance;
  return instance;
}

std::string name_of(at::ScalarType dtype) { return c10::getDtypeNames(dtype).first; }
std::string name_of(const at::Tensor& tensor) { return name_of(tensor.scalar_type()); }

Json names_of(const std::vector<at::Tensor>& tensors) {
  Json names = Json::array();
  for (const auto& tensor : tensors) names.push_back(name_of(tensor));
  return names;
}

at::Tensor wave(int64_t count, double phase) {
  return torch::sin(torch::arange(count, torch::kFloat) * 0.7 + phase);
}

void fill(nn::Module& module) {
  const at::NoGradGuard no_grad;
  int64_t i = 0;
  for (auto& parameter : module.parameters()) {
    parameter.copy_(wave(parameter.numel(), static_cast<double>(i++)).mul(0.3).view_as(parameter));
  }
}

DataLoader loader(int64_t count) {
  return DataLoader(FunctionDataset(count,
                                    [](int64_t i) {
                                      const auto x = wave(64, 0.1 * static_cast<double>(i));
                                      const auto y = (torch::arange(8) * 3 + i).remainder(4);
                                      return Batch::map({{"x", x.view({8, 8})}, {"y", y}});
                                    }),
                    DataLoaderOptions().batch_size(std::nullopt));
}

std::shared_ptr<torch::optim::Optimizer> make_optimizer(const std::string& name,
                                                        std::vector<at::Tensor> parameters) {
  if (name == "sgd") {
    return std::make_shared<torch::optim::SGD>(std::move(parameters),
                                               torch::optim::SGDOptions(0.05).momentum(0.9));
  }
  return std::make_shared<torch::optim::AdamW>(
      std::move(parameters), torch::optim::AdamWOptions(1e-2).eps(1e-4).weight_decay(0.1));
}

Json weights_of(const nn::Module& module) {
  Json weights = Json::array();
  for (const auto& parameter : module.parameters()) {
    const auto all = parameter.detach().to(at::kDouble).flatten();
    for (int64_t i = 0; i < std::min<int64_t>(4, all.numel()); ++i) {
      weights.push_back(all[i].item<double>());
    }
  }
  return weights;
}

// The largest difference, relative to numbers above 1.
double distance(const Json& ours, const Json& theirs) {
  if (ours.size() != theirs.size()) return INFINITY;
  double worst = 0;
  for (size_t i = 0; i < ours.size(); ++i) {
    if (ours[i].is_string() || theirs[i].is_string()) {
      worst = std::max(worst, ours[i] == theirs[i] ? 0.0 : INFINITY);
    } else if (ours[i].is_array()) {
      worst = std::max(worst, distance(ours[i], theirs[i]));
    } else {
      const double a = ours[i], b = theirs[i];
      worst = std::max(worst, std::abs(a - b) / std::max(1.0, std::abs(b)));
    }
  }
  return worst;
}

// ---- Each precision -----------------------------------------------------------------------------

struct Probe : LightningModule {
  explicit Probe(std::string optimizer) : optimizer_name(std::move(optimizer)) {
    body = register_module(
        "body", nn::Sequential(nn::Linear(8, 32), nn::LayerNorm(nn::LayerNormOptions({32})),
                               nn::GELU(), nn::Linear(32, 32), nn::BatchNorm1d(32), nn::ReLU()));
    fill(*body);
  }
  void configure_model() override {
    head = register_module("head", nn::Linear(32, 4));
    seen["created"] = names_of({head->weight, torch::ones(1)});
    fill(*head);
  }
  at::Tensor step(const Batch& batch, const char* stage) {
    const auto output = head->forward(body->forward(batch["x"]));
    const auto loss = torch::nn::functional::cross_entropy(output, batch["y"]);
    seen[stage] = names_of({batch["x"], batch["y"], output, torch::ones(1), loss});
    return loss;
  }
  StepOutput training_step(const Batch& batch, int64_t) override {
    const auto loss = step(batch, "train");
    seen["losses"].push_back(loss.item<double>());
    return loss;
  }
  StepOutput validation_step(const Batch& batch, int64_t) override {
    step(batch, "validate");
    return skip;
  }
  void on_train_batch_end(const StepOutput&, const Batch&, int64_t) override {
    std::vector<at::Tensor> gradients;
    for (const auto& parameter : parameters()) gradients.push_back(parameter.grad());
    seen["parameters"] = names_of(parameters());
    seen["gradients"] = names_of(gradients);
    seen["buffers"] = names_of(buffers());
    std::set<std::string> state;
    const auto saved = optimizer_state_dict(optimizer().optimizer());
    for (const auto& of : saved.at("state").as_dict()) {
      for (const auto& [key, value] : of.second.as_dict()) {
        const auto name = std::get<std::string>(key);
        if (name != "step" && !value.is_none()) {
          state.insert(name + " " + name_of(value.as_tensor()));
        }
      }
    }
    seen["state"] = state;
    seen["weights"] = weights_of(*this);
  }
  Optimizers configure_optimizers() override {
    return make_optimizer(optimizer_name, parameters());
  }

  std::string optimizer_name;
  nn::Sequential body{nullptr};
  nn::Linear head{nullptr};
  Json seen;
};

TEST_CASE("each precision trains as the original does on the CPU, in its dtypes", "[precision]") {
  torch::set_num_threads(1);
  for (size_t i = 0; i < reference().cases["precisions"].size(); ++i) {
    const Json& run = reference().cases["precisions"][i];
    const Json& theirs = reference().results["precisions"][i];
    const std::string precision = run["precision"], optimizer = run["optimizer"];
    DYNAMIC_SECTION(precision << " with " << optimizer) {
      const TempDir dir;
      Trainer trainer(quiet(dir).max_epochs(1).num_sanity_val_steps(0).precision(precision));
      const auto module = std::make_shared<Probe>(optimizer);
      trainer.fit(module, loader(50), loader(1));

      const Json& ours = module->seen;
      CHECK(trainer.precision().name() == theirs["name"].get<std::string>());
      for (const char* what :
           {"created", "train", "validate", "parameters", "gradients", "buffers", "state"}) {
        INFO(what << ": " << ours[what] << " here, " << theirs[what] << " in Python");
        CHECK(ours[what] == theirs[what]);
      }
      INFO("losses " << ours["losses"] << " here, " << theirs["losses"] << " in Python");
      CHECK(distance(ours["losses"], theirs["losses"]) == 0);
      CHECK(distance(ours["weights"], theirs["weights"]) == 0);
    }
  }
}

// ---- 16-mixed with a scaler, on the CPU ---------------------------------------------------------

std::string python_repr(double value) {
  return std::isnan(value) ? "nan" : std::isinf(value) ? "inf" : str(value);
}

struct Scaled : LightningModule {
  explicit Scaled(const Json& run) : run(run) {
    net = register_module("net", nn::Sequential(nn::Linear(8, 16), nn::ReLU(), nn::Linear(16, 1)));
    fill(*net);
    set_automatic_optimization(!run.value("manual", false));
  }
  bool is_in(const char* list, int64_t batch_idx) const {
    for (const auto& item : run[list]) {
      if (item == batch_idx) return true;
    }
    return false;
  }
  StepOutput training_step(const Batch& batch, int64_t batch_idx) override {
    auto loss = net->forward(batch["x"]).square().mean();
    if (is_in("infinite", batch_idx)) loss = loss * INFINITY;
    const auto value = loss.item<double>();
    seen["losses"].push_back(std::isfinite(value) ? Json(value) : Json(python_repr(value)));
    if (is_in("skipped", batch_idx)) return skip;
    if (!automatic_optimization()) {
      for (const auto& one : optimizers()) one->zero_grad();
      manual_backward(loss);
      for (const auto& one : optimizers()) one->step();
    }
    return loss;
  }
  void on_before_optimizer_step(torch::optim::Optimizer& optimizer) override {
    at::Tensor sum;
    for (const auto& group : optimizer.param_groups()) {
      for (const auto& parameter : group.params()) {
        if (!parameter.grad().defined()) continue;
        const auto square = parameter.grad().to(at::kDouble).square().sum();
        sum = sum.defined() ? sum + square : square;
      }
    }
    const double value = sum.defined() ? sum.item<double>() : 0;
    const bool text = !sum.defined() || !std::isfinite(value);
    seen["norms"].push_back(!text ? Json(value)
                                  : Json(sum.defined() ? python_repr(value) : std::string("none")));
  }
  void on_train_batch_end(const StepOutput&, const Batch&, int64_t) override {
    const auto state = trainer().precision().state_dict();
    seen["scales"].push_back(state.at("scale").as_double());
    seen["trackers"].push_back(state.at("_growth_tracker").as_int());
  }
  Optimizers configure_optimizers() override {
    if (automatic_optimization()) return make_optimizer(run["optimizer"], parameters());
    return {
        OptimizerConfig(make_optimizer(run["optimizer"], net->at<nn::LinearImpl>(0).parameters())),
        OptimizerConfig(make_optimizer(run["optimizer"], net->at<nn::LinearImpl>(2).parameters()))};
  }

  Json run, seen;
  nn::Sequential net{nullptr};
};

std::shared_ptr<MixedPrecision> scaled_precision() {
  const auto options = GradScalerOptions().init_scale(4096).growth_interval(4);
  return std::make_shared<MixedPrecision>("16-mixed", std::make_shared<GradScaler>(options));
}

Json to_json(const State& state) {
  Json json;
  for (const auto& [key, value] : state.as_dict()) {
    auto& place = json[std::get<std::string>(key)];
    if (value.is<int64_t>()) {
      place = value.as_int();
    } else {
      place = value.as_double();
    }
  }
  return json;
}

TEST_CASE("16-mixed scales, skips, clips and counts as the original does", "[precision]") {
  torch::set_num_threads(1);
  for (size_t i = 0; i < reference().cases["scaled"].size(); ++i) {
    const Json& run = reference().cases["scaled"][i];
    const Json& theirs = reference().results["scaled"][i];
    DYNAMIC_SECTION(run.dump()) {
      const TempDir dir;
      auto options = quiet(dir).max_epochs(1).plugins({scaled_precision()});
      options.read(run["trainer"], "trainer");
      Trainer trainer(options);
      const auto module = std::make_shared<Scaled>(run);
      trainer.fit(module, loader(24));

      const Json& ours = module->seen;
      for (const char* exact : {"scales", "trackers"}) {
        INFO(exact << ": " << ours[exact] << " here, " << theirs[exact] << " in Python");
        CHECK(ours[exact] == theirs[exact]);
      }
      CHECK(trainer.global_step() == theirs["global_step"]);
      INFO("losses " << ours["losses"] << " here, " << theirs["losses"] << " in Python");
      CHECK(distance(ours["losses"], theirs["losses"]) == 0);
      INFO("norms " << ours["norms"] << " here, " << theirs["norms"] << " in Python");
      CHECK(distance(ours["norms"], theirs["norms"]) <= 1e-15);  // str() has 17 digits
      CHECK(distance(weights_of(*module), theirs["weights"]) == 0);

      trainer.save_checkpoint(dir.path("last.ckpt"));
      const auto saved = trainer.strategy().load_checkpoint(dir.path("last.ckpt"));
      CHECK(to_json(saved.at("MixedPrecision")) == theirs["state"]);
    }
  }
}

TEST_CASE("a run resumes with its scale, under today's key and that of old files", "[precision]") {
  const TempDir dir;
  const Json run = reference().cases["scaled"][0];
  const auto path = dir.path("last.ckpt");
  {
    Trainer trainer(quiet(dir).max_epochs(1).plugins({scaled_precision()}));
    trainer.fit(std::make_shared<Scaled>(run), loader(10));
    trainer.save_checkpoint(path);
  }
  for (const bool old : {false, true}) {
    INFO(old);
    const auto precision = scaled_precision();
    Trainer trainer(quiet(dir).max_epochs(2).plugins({precision}));
    if (old) {
      auto saved = trainer.strategy().load_checkpoint(path);
      const State scaler = saved.at("MixedPrecision");
      saved["native_amp_scaling_state"] = scaler;
      saved.as_dict().erase("MixedPrecision");
      trainer.strategy().save_checkpoint(saved, dir.path("old.ckpt"));
    }
    const auto module = std::make_shared<Scaled>(run);
    trainer.fit(module, loader(10), {},
                RunArguments().ckpt_path(old ? dir.path("old.ckpt") : path));
    // 2048 and 0 after the first epoch, in which batches 5 and 9 were infinite.
    CHECK(module->seen["scales"][0] == 2048);
    CHECK(module->seen["trackers"][0] == 1);
  }
}

// ---- The scaler alone ---------------------------------------------------------------------------

TEST_CASE("the gradient scaler equals torch.amp.GradScaler step for step", "[precision]") {
  torch::set_num_threads(1);
  for (size_t k = 0; k < reference().cases["scaler"].size(); ++k) {
    const Json& run = reference().cases["scaler"][k];
    const Json& theirs = reference().results["scaler"][k];
    const std::string optimizer_name = run["optimizer"];
    DYNAMIC_SECTION(optimizer_name) {
      const std::vector<at::Tensor> parameters{wave(7, 0).requires_grad_(),
                                               wave(5, 1).requires_grad_()};
      const auto optimizer = make_optimizer(optimizer_name, parameters);
      auto scaler = std::make_unique<GradScaler>(GradScalerOptions()
                                                     .init_scale(1024)
                                                     .growth_factor(3)
                                                     .backoff_factor(0.25)
                                                     .growth_interval(3));
      Json seen;
      for (int i = 0; i < 20; ++i) {
        optimizer->zero_grad();
        at::Tensor loss;
        for (const auto& parameter : parameters) {
          const auto one = (parameter * wave(parameter.numel(), i)).square().sum();
          loss = loss.defined() ? loss + one : one;
        }
        const auto factor = run["factors"].value(std::to_string(i), std::string("1"));
        if (factor != "1") loss = loss * std::stod(factor);
        scaler->scale(loss).backward();
        if (i % 2 == 1) scaler->unscale_(*optimizer);
        scaler->step(*optimizer);
        scaler->update();
        const auto state = scaler->state_dict();
        seen["scales"].push_back(state.at("scale").as_double());
        seen["trackers"].push_back(state.at("_growth_tracker").as_int());
        Json weights = Json::array();
        for (const auto& parameter : parameters) {
          for (int64_t j = 0; j < parameter.numel(); ++j) {
            weights.push_back(parameter[j].item<double>());
          }
        }
        seen["weights"].push_back(weights);
        if (i == 10) {
          scaler = std::make_unique<GradScaler>();
          scaler->load_state_dict(state);
        }
      }
      CHECK(seen["scales"] == theirs["scales"]);
      CHECK(seen["trackers"] == theirs["trackers"]);
      CHECK(distance(seen["weights"], theirs["weights"]) == 0);
      CHECK(to_json(scaler->state_dict()) == theirs["state"]);
    }
  }
}

}  // namespace
}  // namespace lightning::testing
