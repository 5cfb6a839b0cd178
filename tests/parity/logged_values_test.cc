// What `log` leaves behind: runs of logged_values.py under Python Lightning and here write the same
// table and hyper-parameters, keep the same metrics and return the same results.
#include <torch/torch.h>

#include <catch2/catch.hpp>
#include <fstream>
#include <nlohmann/json.hpp>
#include <sstream>
#include <string>
#include <vector>

#include "callbacks/learning_rate_monitor.h"
#include "lightning/callback.h"
#include "lightning/data/data_loader.h"
#include "lightning/metrics/mean.h"
#include "lightning/module.h"
#include "lightning/optim/schedulers.h"
#include "lightning/trainer.h"
#include "loggers/csv_logger.h"
#include "tests/support/python.h"
#include "tests/support/temp_dir.h"

namespace lightning::testing {
namespace {

struct FromCallback : Callback {
  void on_train_batch_end(Trainer&, LightningModule& module, const StepOutput&, const Batch&,
                          int64_t batch_idx) override {
    module.log("callback/batch", batch_idx, LogOptions().on_epoch(true));
  }
  void on_validation_epoch_end(Trainer&, LightningModule& module) override {
    module.log("callback/validated", 7.0);
  }
};

struct LinearOptions : Options<LinearOptions> {
  OPTION(int64_t, width, 4, "Numbers in a row.");
  OPTION(double, lr, 0.1, "Learning rate.");
};

struct Module : LightningModule {
  explicit Module(const Json& settings) : LightningModule(LinearOptions()), settings(settings) {
    set_automatic_optimization(!settings["manual"]);
    layer = register_module("layer", torch::nn::Linear(4, 1));
    torch::nn::init::constant_(layer->weight, 0.01);
    torch::nn::init::constant_(layer->bias, 0.0);
  }

  StepOutput training_step(const Batch& batch, int64_t batch_idx) override {
    const at::Tensor& x = batch[0];
    const at::Tensor value = x.mean();
    const LogOptions epoch = LogOptions().on_step(false).on_epoch(true);
    const LogOptions both = LogOptions().on_step(true).on_epoch(true);
    log("a", value);
    log("b", 2 * value, LogOptions(both).prog_bar(true));
    log("plain_epoch", value, epoch);
    for (const char* reduce : {"sum", "min", "max", "mean"}) {
      log(str("by_", reduce), value, LogOptions(epoch).reduce_fx(std::string(reduce)));
    }
    log_dict({{"dict/one", value}, {"dict/count", batch_idx}}, LogOptions().on_epoch(true));
    log("weighted", value, LogOptions(epoch).batch_size(batch_idx + 1));
    log("not_in_the_logger", value, LogOptions().logger(false));
    updated->update(x);
    log("updated", updated, both);
    forwarded->forward(x);
    log("forwarded", forwarded, both);
    const at::Tensor loss = layer->forward(x).square().mean();
    log("loss", loss);
    if (automatic_optimization()) return loss;
    optimizer().zero_grad();
    manual_backward(loss);
    optimizer().step();
    return skip;
  }
  void on_train_epoch_start() override { log("at_epoch_start", current_epoch()); }
  void on_train_epoch_end() override { log("at_epoch_end", 10.0 * current_epoch()); }
  void on_before_optimizer_step(torch::optim::Optimizer&) override {
    log("before_step", global_step());
  }

  void evaluate(const std::string& prefix, const Batch& batch, int64_t dataloader_idx) {
    const at::Tensor value = batch[0].mean();
    log(prefix + "/v", value);
    log(prefix + "/w", value, LogOptions().on_step(true).on_epoch(true).prog_bar(true));
    log(prefix + "/max", value, LogOptions().reduce_fx(std::string("max")));
    log(str(prefix, "/named_", dataloader_idx), value, LogOptions().add_dataloader_idx(false));
  }
  StepOutput validation_step(const Batch& batch, int64_t, int64_t dataloader_idx) override {
    evaluate("val", batch, dataloader_idx);
    return skip;
  }
  void on_validation_epoch_end() override {
    log("val/at_end", 1.5);
    if (settings["log_step"]) log("step", 100.0 * (current_epoch() + 1));
  }
  StepOutput test_step(const Batch& batch, int64_t) override {
    evaluate("test", batch, 0);
    return skip;
  }
  Optimizers configure_optimizers() override {
    const auto sgd = std::make_shared<torch::optim::SGD>(
        parameters(),
        torch::optim::SGDOptions(hparams()["lr"].get<double>()).momentum(0.5).weight_decay(0.01));
    const auto schedule = std::make_shared<StepLR>(sgd, StepLROptions().step_size(2).gamma(0.5));
    return {sgd, LRSchedulerConfig(schedule).set_interval("step")};
  }

  Json settings;
  torch::nn::Linear layer{nullptr};
  std::shared_ptr<Mean> updated = std::make_shared<Mean>();
  std::shared_ptr<Mean> forwarded = std::make_shared<Mean>();
};

DataLoader loader(int64_t first, int64_t rows) {
  const auto x =
      (at::arange(rows * 4, at::kFloat).view({rows, 4}) + static_cast<double>(first)) / 7;
  return DataLoader(TensorDataset({x}), DataLoaderOptions(2));
}

Json numbers(const MetricMap& metrics) {
  Json all = Json::object();
  for (const auto& [name, value] : metrics) all[name] = value.item<double>();
  return all;
}

Json metrics_of(const Trainer& trainer, const std::vector<EvaluationResult>& results) {
  Json all = Json::object();
  all["callback_metrics"] = numbers(trainer.callback_metrics());
  all["logged_metrics"] = numbers(trainer.logged_metrics());
  all["progress_bar_metrics"] = numbers(trainer.progress_bar_metrics());
  all["results"] = results;
  return all;
}

// The run of `run` in logged_values.py; what is left after each entry point.
Json run(const std::string& name, const Json& settings, const std::string& folder) {
  Json flags = Json::parse(R"({"accelerator": "cpu", "max_epochs": 2, "log_every_n_steps": 2,
                               "enable_progress_bar": false, "enable_model_summary": false,
                               "enable_checkpointing": false})");
  flags["default_root_dir"] = folder;
  flags.update(settings["trainer"]);
  TrainerOptions options;
  options.read(flags, "trainer");
  std::vector<Part<Callback>> callbacks = {std::make_shared<FromCallback>()};
  if (!settings["trainer"].contains("fast_dev_run")) {
    LearningRateMonitorOptions monitor;
    monitor.log_momentum(true).log_weight_decay(true);
    if (!settings["monitor"].is_null()) monitor.logging_interval(std::string(settings["monitor"]));
    callbacks.emplace_back(std::make_shared<LearningRateMonitor>(monitor));
  }
  options.callbacks(callbacks).logger(
      std::make_shared<CSVLogger>(CSVLoggerOptions(folder).name("").version(name)));
  Trainer trainer(options);

  const auto module = std::make_shared<Module>(settings);
  std::vector<Loaders> val;
  for (int64_t i = 0; i < settings["val_loaders"]; ++i) val.emplace_back(loader(100 * i, 3 + i));
  Json after = Json::object();
  trainer.fit(module, loader(0, 9), val);
  after["fit"] = metrics_of(trainer, {});
  const auto quiet = RunArguments().verbose(false);
  const auto validated = trainer.validate(module, val, quiet);
  after["validate"] = metrics_of(trainer, validated);
  const auto tested = trainer.test(module, loader(50, 5), quiet);
  after["test"] = metrics_of(trainer, tested);
  return after;
}

// ---- Comparing ----------------------------------------------------------------------------------

std::string read(const std::string& path) {
  std::ifstream in(path);
  if (!in) return "no file\n";
  return {std::istreambuf_iterator<char>(in), {}};
}

bool close(double a, double b) { return a == b || std::abs(a - b) <= 1e-6 * std::abs(b); }

std::vector<std::string> split(const std::string& text, char at) {
  std::vector<std::string> parts;
  std::istringstream in(text);
  for (std::string part; std::getline(in, part, at);) parts.push_back(part);
  return parts;
}

// Equal text, or numbers within 1e-6.
bool equal_cells(const std::string& a, const std::string& b) {
  if (a == b) return true;
  if (a.empty() || b.empty()) return false;
  char *end_a = nullptr, *end_b = nullptr;
  const double x = std::strtod(a.c_str(), &end_a), y = std::strtod(b.c_str(), &end_b);
  return *end_a == 0 && *end_b == 0 && close(x, y);
}

// Row for row and cell for cell. The first difference, or "".
std::string table_difference(const std::string& python, const std::string& ours) {
  const auto rows = split(python, '\n'), our_rows = split(ours, '\n');
  if (rows.empty()) return "Python wrote no rows";
  const auto names = split(rows[0], ',');
  for (size_t i = 0; i < std::max(rows.size(), our_rows.size()); ++i) {
    if (i >= rows.size()) return str("more rows than Python's ", rows.size(), ": ", our_rows[i]);
    if (i >= our_rows.size()) return str("row ", i, " is missing: ", rows[i]);
    const auto cells = split(rows[i] + ",", ','), our_cells = split(our_rows[i] + ",", ',');
    bool same = cells.size() == our_cells.size();
    for (size_t j = 0; same && j < cells.size(); ++j) same = equal_cells(cells[j], our_cells[j]);
    if (!same) return str("row ", i, "\npython ", rows[i], "\nc++    ", our_rows[i], "\n", rows[0]);
  }
  return "";
}

// The first place where two trees of metrics differ, or "".
std::string tree_difference(const std::string& where, const Json& python, const Json& ours) {
  if (python.is_number() && ours.is_number()) {
    return close(ours, python) ? "" : str(where, ": ", python.dump(), " in Python, ", ours.dump());
  }
  if (python.is_array() && ours.is_array() && python.size() == ours.size()) {
    for (size_t i = 0; i < python.size(); ++i) {
      const auto found = tree_difference(str(where, "[", i, "]"), python[i], ours[i]);
      if (!found.empty()) return found;
    }
    return "";
  }
  if (!python.is_object() || !ours.is_object()) return str(where, ": ", python.dump(), ours.dump());
  for (const auto& item : ours.items()) {
    if (!python.contains(item.key())) return str(where, " has no \"", item.key(), "\" in Python");
  }
  for (const auto& item : python.items()) {
    const std::string path = where + "/" + item.key();
    if (!ours.contains(item.key())) return path + " is missing";
    const auto found = tree_difference(path, item.value(), ours[item.key()]);
    if (!found.empty()) return found;
  }
  return "";
}

struct Reference {
  Reference() {
    run_python(
        "import runpy, sys; sys.argv = sys.argv[1:]; "
        "runpy.run_path(sys.argv[0], run_name='__main__')",
        {"tests/parity/logged_values.py", dir.path()});
    index = Json::parse(read(dir.path("index.json")));
  }
  TempDir dir;
  Json index;
};

TEST_CASE("metrics.csv, hparams.yaml, metrics and results equal Python Lightning's", "[parity]") {
  static const Reference reference;
  for (const auto& item : reference.index.items()) {
    const std::string name = item.key();
    DYNAMIC_SECTION(name) {
      TempDir dir;
      const Json after = run(name, item.value()["options"], dir.path());

      const std::string table = table_difference(read(reference.dir.path(name + "/metrics.csv")),
                                                 read(dir.path(name + "/metrics.csv")));
      INFO(name << ": " << table);
      CHECK(table.empty());
      CHECK(read(dir.path(name + "/hparams.yaml")) ==
            read(reference.dir.path(name + "/hparams.yaml")));
      const std::string metrics = tree_difference("after", item.value()["after"], after);
      INFO(metrics);
      CHECK(metrics.empty());
    }
  }
}

}  // namespace
}  // namespace lightning::testing
