// The same runs under Python Lightning 2.6.6 and here must leave the same files and end in the same
// state of ModelCheckpoint and EarlyStopping. The runs are in parity.json.
#include <torch/optim/sgd.h>

#include <catch2/catch.hpp>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <sstream>

#include "callbacks/early_stopping.h"
#include "callbacks/model_checkpoint.h"
#include "lightning/files.h"
#include "lightning/log.h"
#include "lightning/python_text.h"
#include "lightning/trainer.h"
#include "tests/support/boring.h"
#include "tests/support/python.h"
#include "tests/support/temp_dir.h"

using namespace lightning;
using namespace lightning::testing;
namespace fs = std::filesystem;

namespace {

struct Module : LightningModule {
  torch::nn::Linear layer = register_module("layer", torch::nn::Linear(32, 2));
  int64_t fail_at_step = -1;
  int64_t validations = 0;
  std::vector<double> values;

  StepOutput training_step(const Batch& batch, int64_t) override {
    if (global_step() == fail_at_step) throw std::runtime_error("asked to fail");
    log("step_number", static_cast<double>(global_step()));
    const auto value = loss(batch);
    if (!automatic_optimization()) {
      optimizer().zero_grad();
      manual_backward(value);
      optimizer().step();
    }
    return value;
  }
  StepOutput validation_step(const Batch& batch, int64_t) override { return loss(batch); }
  Optimizers configure_optimizers() override { return torch::optim::SGD(parameters(), 0.1); }
  at::Tensor loss(const Batch& batch) {
    const auto output = layer(batch.tensor());
    return at::mse_loss(output, at::ones_like(output));
  }
  void on_validation_epoch_end() override {
    if (values.empty() || trainer().sanity_checking()) return;
    const auto index = std::min(validations, static_cast<int64_t>(values.size()) - 1);
    log("val_loss", values[static_cast<size_t>(index)]);
    log("val/acc", 0.1 * static_cast<double>(index));
    ++validations;
  }
};

double number(const Json& value) {
  return value.is_string() ? std::stod(value.get<std::string>()) : value.get<double>();
}

Json shown(const std::optional<double>& value) {
  return value ? Json(python_repr(*value)) : Json();
}

Json listing(const fs::path& folder) {
  std::vector<std::string> lines;
  const std::function<void(const fs::path&)> walk = [&](const fs::path& at) {
    for (const auto& entry : fs::directory_iterator(at)) {
      const auto name = entry.path().lexically_relative(folder).string();
      if (entry.is_symlink()) {
        lines.push_back(name + " -> " + fs::read_symlink(entry.path()).string());
      } else if (entry.is_directory()) {
        walk(entry.path());
      } else {
        lines.push_back(name);
      }
    }
  };
  if (fs::exists(folder)) walk(folder);
  std::sort(lines.begin(), lines.end());
  return lines;
}

void describe(const ModelCheckpoint& callback, const fs::path& folder, Json& out) {
  const auto relative = [&](const std::string& path) {
    return path.empty() ? "" : fs::path(path).lexically_relative(folder).string();
  };
  out["files"] = listing(folder);
  out["best_model_path"] = relative(callback.best_model_path());
  out["best_model_score"] = shown(callback.best_model_score());
  out["current_score"] = shown(callback.current_score());
  out["best_k_models"] = Json::array();
  for (const auto& [path, score] : callback.best_k_models()) {
    out["best_k_models"].push_back({relative(path), shown(score)});
  }
  out["kth_best_model_path"] = relative(callback.kth_best_model_path());
  out["kth_value"] = shown(callback.kth_value());
  out["last_model_path"] = relative(callback.last_model_path());
}

void describe(const EarlyStopping& callback, Json& out) {
  out["wait_count"] = callback.wait_count();
  out["stopped_epoch"] = callback.stopped_epoch();
  out["best_score"] = shown(callback.best_score());
  out["reason"] = static_cast<int>(callback.stopping_reason());
  out["message"] = callback.stopping_reason_message();
}

Json run(const Json& configuration, const std::string& folder) {
  Json options = configuration["options"];
  const bool saves = configuration["callback"] == "ModelCheckpoint";
  if (saves) {
    options["dirpath"] = folder;
    options["wait_for_validation"] = false;  // our addition
  }
  const auto callback =
      registry<Callback>().make(configuration["callback"].get<std::string>(), options);

  TrainerOptions trainer_options;
  trainer_options.read(configuration["trainer"], "trainer");
  Trainer trainer(trainer_options.accelerator("cpu")
                      .logger(false)
                      .callbacks({callback})
                      .enable_progress_bar(false)
                      .enable_model_summary(false)
                      .enable_checkpointing(saves)
                      .default_root_dir(folder));
  auto module = std::make_shared<Module>();
  module->set_automatic_optimization(!configuration.value("manual", false));
  module->fail_at_step = configuration.value("fail_at_step", -1);
  for (const auto& value : configuration.value("val_losses", Json::array())) {
    module->values.push_back(number(value));
  }
  Json out = {{"name", configuration["name"]}, {"error", false}};
  try {
    trainer.fit(module, random_loader(8),
                configuration.value("validates", true) ? random_loader(4) : Loaders());
  } catch (const std::exception& error) {
    UNSCOPED_INFO(error.what());
    out["error"] = true;
  }
  out["state_key"] = callback->state_key();
  out["epoch"] = trainer.current_epoch();
  out["step"] = trainer.global_step();
  if (const auto* checkpoint = dynamic_cast<ModelCheckpoint*>(callback.get())) {
    describe(*checkpoint, folder, out);
  } else {
    describe(dynamic_cast<EarlyStopping&>(*callback), out);
  }
  return out;
}

}  // namespace

TEST_CASE("ModelCheckpoint and EarlyStopping do as the original does, run for run", "[callbacks]") {
  const TempDir dir;
  const std::string configurations = "tests/callbacks/parity.json";
  set_log_sink([](const std::string&) {});
  std::istringstream python(
      run_python(read_file("tests/callbacks/parity.py"), {configurations, dir.path("python")}));
  int64_t index = 0;
  for (const auto& configuration : Json::parse(read_file(configurations))) {
    std::string line;
    REQUIRE(std::getline(python, line));
    const Json theirs = Json::parse(line);
    const auto ours =
        run(configuration, fs::weakly_canonical(dir.path()).string() + "/" + std::to_string(index));
    ++index;
    CAPTURE(configuration["name"].get<std::string>());
    CHECK(ours.dump(1) == theirs.dump(1));
  }
  set_log_sink(nullptr);
}
