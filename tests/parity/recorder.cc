#include "tests/parity/recorder.h"

#include <torch/torch.h>

#include <cstdio>
#include <nlohmann/json.hpp>

#include "lightning/callback.h"
#include "lightning/data/data_loader.h"
#include "lightning/datamodule.h"
#include "lightning/logger.h"
#include "lightning/module.h"
#include "lightning/optim/schedulers.h"
#include "lightning/trainer.h"

namespace lightning::testing {
namespace {

constexpr int64_t kBatchSize = 2;

// Each row starts with the number of the batch it belongs to.
Batch row(int64_t first, int64_t i) {
  return at::tensor({static_cast<float>(first + i / kBatchSize), 0.5f, -0.25f, 1.0f});
}

class RowStream : public StreamDataset {
 public:
  RowStream(int64_t first, int64_t rows) : first_(first), rows_(rows) {}
  std::unique_ptr<Stream> open(const WorkerInfo&) override {
    return std::make_unique<Pass>(first_, rows_);
  }

 private:
  struct Pass : Stream {
    Pass(int64_t first, int64_t rows) : first(first), rows(rows) {}
    std::optional<Batch> next() override {
      if (at == rows) return std::nullopt;
      return row(first, at++);
    }
    int64_t first, rows, at = 0;
  };
  int64_t first_, rows_;
};

const char* name_of(RunningStage stage) {
  switch (stage) {
    case RunningStage::kTraining:
      return "train";
    case RunningStage::kSanityChecking:
      return "sanity_check";
    case RunningStage::kValidating:
      return "validate";
    case RunningStage::kTesting:
      return "test";
    case RunningStage::kPredicting:
      return "predict";
    default:
      return "none";
  }
}

std::string name_of(const Batch& batch) {
  return str("batch ", batch.tensor()[0][0].item<int64_t>());
}

std::string name_of(const StepOutput& output) { return output.skipped() ? "no output" : "output"; }

const char* mode_of(const torch::nn::Module& child) {
  return child.is_training() ? "child in train mode" : "child in eval mode";
}

// What the recorders of one configuration share.
class Recording {
 public:
  explicit Recording(const Json& configuration)
      : data(Json::parse(
            R"({"from": "datamodule", "sized": true, "shuffle": false, "train": 4, "val": [3],
                             "test": [2], "predict": [2], "transfer": false})")),
        options(Json::parse(R"({"validation_step": true, "mode_hooks": true, "manual": false,
                                "optimizers": 1, "optimizer": "sgd"})")) {
    if (configuration.contains("data")) data.update(configuration["data"]);
    if (configuration.contains("module")) options.update(configuration["module"]);
  }

  void write(const std::string& who, const char* hook, const std::vector<std::string>& args = {});

  // Stops or raises where the configuration says so.
  void act(const char* hook, std::optional<int64_t> batch_idx = std::nullopt) {
    if (due("stop_in", hook, batch_idx)) trainer->set_should_stop(true);
    if (due("raise_in", hook, batch_idx)) throw std::runtime_error("boom");
  }

  Loaders loaders(const char* stage) const;

  Json data, options;
  std::vector<std::string> lines;
  Trainer* trainer = nullptr;
  LightningModule* module = nullptr;
  std::vector<std::shared_ptr<torch::optim::Optimizer>> optimizers;
  std::vector<std::shared_ptr<LRScheduler>> schedulers;

  std::string name_of(const torch::optim::Optimizer& optimizer) const {
    for (size_t i = 0; i < optimizers.size(); ++i) {
      if (optimizers[i].get() == &optimizer) return str("optimizer ", i);
    }
    return "no optimizer";
  }

 private:
  bool due(const char* key, const char* hook, std::optional<int64_t> batch_idx) const {
    if (!options.contains(key)) return false;
    const Json& at = options[key];
    return at[0] == hook && at[1] == trainer->current_epoch() &&
           (at[2].is_null() || (batch_idx && at[2] == *batch_idx));
  }

  std::shared_ptr<DataLoader> loader(int64_t first, int64_t batches, bool shuffle) const;
};

void Recording::write(const std::string& who, const char* hook,
                      const std::vector<std::string>& args) {
  const char* grad = c10::InferenceMode::is_enabled() ? "inference"
                     : at::GradMode::is_enabled()     ? "grad"
                                                      : "no_grad";
  lines.push_back(str(who, ".", hook, "(", join(args, ", "), ") | epoch ", trainer->current_epoch(),
                      " step ", trainer->global_step(), " ", testing::name_of(trainer->stage()),
                      " | ", module->is_training() ? "train " : "eval ", grad));
}

std::shared_ptr<DataLoader> Recording::loader(int64_t first, int64_t batches, bool shuffle) const {
  const int64_t rows = batches * kBatchSize;
  const auto batched = DataLoaderOptions(kBatchSize).shuffle(shuffle);
  if (!data["sized"]) {
    return std::make_shared<DataLoader>(std::make_shared<RowStream>(first, rows), batched);
  }
  return std::make_shared<DataLoader>(
      FunctionDataset(rows, [first](int64_t i) { return row(first, i); }), batched);
}

Loaders Recording::loaders(const char* stage) const {
  const Json& batches = data[stage];
  if (!batches.is_array()) return loader(0, batches, data["shuffle"]);
  const std::string name = stage;
  const int64_t first = name == "val" ? 100 : name == "test" ? 500 : 900;
  std::vector<Loaders> all;
  for (size_t i = 0; i < batches.size(); ++i) {
    all.emplace_back(loader(first + 100 * static_cast<int64_t>(i), batches[i], false));
  }
  if (all.size() == 1) return all[0];
  return all;
}

// ---- Data module --------------------------------------------------------------------------------

class Data : public LightningDataModule {
 public:
  explicit Data(Recording& recording) : recording_(recording) {}

  void prepare_data() override { write("prepare_data"); }
  void setup(Stage stage) override { write("setup", {to_string(stage)}); }
  void teardown(Stage stage) override { write("teardown", {to_string(stage)}); }
  Loaders train_dataloader() override {
    write("train_dataloader");
    return recording_.loaders("train");
  }
  Loaders test_dataloader() override {
    write("test_dataloader");
    return recording_.loaders("test");
  }
  Loaders predict_dataloader() override {
    write("predict_dataloader");
    return recording_.loaders("predict");
  }
  State state_dict() const override {
    write("state_dict");
    return State::dict({{std::string("kept"), 1}});
  }
  void load_state_dict(const State& state) override {
    write("load_state_dict", {str(state.at("kept").as_int())});
  }
  void on_exception(const std::exception& exception) override {
    write("on_exception", {exception.what()});
  }

 protected:
  void write(const char* hook, const std::vector<std::string>& args = {}) const {
    recording_.write("datamodule", hook, args);
  }

  Recording& recording_;
};

template <class Base>
class ValidationData : public Base {
 public:
  using Base::Base;

  Loaders val_dataloader() override {
    this->write("val_dataloader");
    return this->recording_.loaders("val");
  }
};

// The hooks that bring a batch to the device, for a module or a data module.
template <class Base>
class Transfer : public Base {
 public:
  using Base::Base;

  Batch on_before_batch_transfer(Batch batch, int64_t dataloader_idx) override {
    this->write("on_before_batch_transfer", {name_of(batch), str(dataloader_idx)});
    return Base::on_before_batch_transfer(std::move(batch), dataloader_idx);
  }
  Batch transfer_batch_to_device(Batch batch, at::Device device, int64_t dataloader_idx) override {
    this->write("transfer_batch_to_device", {name_of(batch), device.str(), str(dataloader_idx)});
    return Base::transfer_batch_to_device(std::move(batch), device, dataloader_idx);
  }
  Batch on_after_batch_transfer(Batch batch, int64_t dataloader_idx) override {
    this->write("on_after_batch_transfer", {name_of(batch), str(dataloader_idx)});
    return Base::on_after_batch_transfer(std::move(batch), dataloader_idx);
  }
};

template <class Module>
std::shared_ptr<Data> with_data_transfer(Recording& recording) {
  if (!recording.data["transfer"]) return std::make_shared<Module>(recording);
  return std::make_shared<Transfer<Module>>(recording);
}
std::shared_ptr<Data> make_data(Recording& recording) {
  if (recording.data["val"].is_null()) return with_data_transfer<Data>(recording);
  return with_data_transfer<ValidationData<Data>>(recording);
}

// ---- Callback -----------------------------------------------------------------------------------

// Hooks without arguments of interest, and hooks of a batch with its data loader's index.
#define RECORD_CALLBACK(hook) \
  void hook(Trainer&, LightningModule&) override { write(#hook); }
#define RECORD_CALLBACK_STAGE(stage)        \
  RECORD_CALLBACK(on_##stage##_start)       \
  RECORD_CALLBACK(on_##stage##_end)         \
  RECORD_CALLBACK(on_##stage##_epoch_start) \
  RECORD_CALLBACK(on_##stage##_epoch_end)
#define RECORD_CALLBACK_BATCHES(stage, Output)                                                     \
  void on_##stage##_batch_start(Trainer&, LightningModule&, const Batch& batch, int64_t batch_idx, \
                                int64_t dataloader_idx) override {                                 \
    write("on_" #stage "_batch_start", {name_of(batch), str(batch_idx), str(dataloader_idx)});     \
  }                                                                                                \
  void on_##stage##_batch_end(Trainer&, LightningModule&, const Output& output,                    \
                              const Batch& batch, int64_t batch_idx, int64_t dataloader_idx)       \
      override {                                                                                   \
    write("on_" #stage "_batch_end",                                                               \
          {output_name(output), name_of(batch), str(batch_idx), str(dataloader_idx)});             \
  }

std::string output_name(const StepOutput& output) { return name_of(output); }
std::string output_name(const Batch& prediction) {
  return prediction.is_none() ? "no output" : "output";
}

class RecorderCallback : public Callback {
 public:
  RecorderCallback(Recording& recording, std::string name, bool checkpoint = false)
      : recording_(recording), name_(std::move(name)), checkpoint_(checkpoint) {}

  CallbackRole role() const override {
    return checkpoint_ ? CallbackRole::kCheckpoint : CallbackRole::kOther;
  }
  std::string state_key() const override { return name_; }

  RECORD_CALLBACK(on_fit_start)
  RECORD_CALLBACK(on_fit_end)
  RECORD_CALLBACK(on_sanity_check_start)
  RECORD_CALLBACK(on_sanity_check_end)
  RECORD_CALLBACK_STAGE(train)
  RECORD_CALLBACK_STAGE(validation)
  RECORD_CALLBACK_STAGE(test)
  RECORD_CALLBACK_STAGE(predict)
  RECORD_CALLBACK_BATCHES(validation, StepOutput)
  RECORD_CALLBACK_BATCHES(test, StepOutput)
  RECORD_CALLBACK_BATCHES(predict, Batch)
  RECORD_CALLBACK(on_after_backward)

  void setup(Trainer&, LightningModule&, Stage stage) override {
    write("setup", {to_string(stage)});
  }
  void teardown(Trainer&, LightningModule&, Stage stage) override {
    write("teardown", {to_string(stage)});
  }
  void on_exception(Trainer&, LightningModule&, const std::exception& exception) override {
    write("on_exception", {exception.what()});
  }
  State state_dict() const override {
    write("state_dict");
    return State::dict({{std::string("kept"), 2}});
  }
  void load_state_dict(const State& state) override {
    write("load_state_dict", {str(state.at("kept").as_int())});
  }
  void on_save_checkpoint(Trainer&, LightningModule&, State&) override {
    write("on_save_checkpoint");
  }
  void on_load_checkpoint(Trainer&, LightningModule&, const State&) override {
    write("on_load_checkpoint");
  }
  void on_before_zero_grad(Trainer&, LightningModule&,
                           torch::optim::Optimizer& optimizer) override {
    write("on_before_zero_grad", {recording_.name_of(optimizer)});
  }
  void on_before_backward(Trainer&, LightningModule&, const at::Tensor&) override {
    write("on_before_backward");
  }
  void on_before_optimizer_step(Trainer&, LightningModule&,
                                torch::optim::Optimizer& optimizer) override {
    write("on_before_optimizer_step", {recording_.name_of(optimizer)});
  }
  void on_train_batch_start(Trainer&, LightningModule&, const Batch& batch,
                            int64_t batch_idx) override {
    write("on_train_batch_start", {name_of(batch), str(batch_idx)});
  }
  void on_train_batch_end(Trainer&, LightningModule&, const StepOutput& output, const Batch& batch,
                          int64_t batch_idx) override {
    write("on_train_batch_end", {name_of(output), name_of(batch), str(batch_idx)});
  }

 private:
  void write(const char* hook, const std::vector<std::string>& args = {}) const {
    recording_.write(name_, hook, args);
  }

  Recording& recording_;
  std::string name_;
  bool checkpoint_;
};

// ---- Module -------------------------------------------------------------------------------------

#define RECORD_MODULE(hook) \
  void hook() override {    \
    write(#hook);           \
    recording_.act(#hook);  \
  }
#define RECORD_MODULE_STAGE(stage)        \
  RECORD_MODULE(on_##stage##_start)       \
  RECORD_MODULE(on_##stage##_end)         \
  RECORD_MODULE(on_##stage##_epoch_start) \
  RECORD_MODULE(on_##stage##_epoch_end)
#define RECORD_MODULE_BATCHES(stage, Output)                                                   \
  void on_##stage##_batch_start(const Batch& batch, int64_t batch_idx, int64_t dataloader_idx) \
      override {                                                                               \
    write("on_" #stage "_batch_start", {name_of(batch), str(batch_idx), str(dataloader_idx)}); \
    recording_.act("on_" #stage "_batch_start", batch_idx);                                    \
  }                                                                                            \
  void on_##stage##_batch_end(const Output& output, const Batch& batch, int64_t batch_idx,     \
                              int64_t dataloader_idx) override {                               \
    write("on_" #stage "_batch_end",                                                           \
          {output_name(output), name_of(batch), str(batch_idx), str(dataloader_idx)});         \
  }

class Recorder : public LightningModule {
 public:
  explicit Recorder(Recording& recording) : recording_(recording) {
    set_automatic_optimization(!recording.options["manual"]);
    layer = register_module("layer", torch::nn::Linear(4, 1));
    other = register_module("other", torch::nn::Linear(4, 1));
    if (recording.options.value("frozen_child", false)) other->eval();
  }

  RECORD_MODULE(on_fit_start)
  RECORD_MODULE(on_fit_end)
  RECORD_MODULE_STAGE(train)
  RECORD_MODULE_STAGE(validation)
  RECORD_MODULE_STAGE(test)
  RECORD_MODULE_STAGE(predict)
  RECORD_MODULE_BATCHES(validation, StepOutput)
  RECORD_MODULE_BATCHES(test, StepOutput)
  RECORD_MODULE_BATCHES(predict, Batch)
  RECORD_MODULE(configure_model)
  RECORD_MODULE(prepare_data)
  RECORD_MODULE(on_after_backward)

  std::vector<std::shared_ptr<Callback>> configure_callbacks() override {
    write("configure_callbacks");
    if (!recording_.options.value("configure_callbacks", false)) return {};
    return {std::make_shared<RecorderCallback>(recording_, "module_callback")};
  }
  void setup(Stage stage) override {
    write("setup", {to_string(stage)});
    recording_.act("setup");
  }
  void teardown(Stage stage) override { write("teardown", {to_string(stage)}); }
  Loaders train_dataloader() override {
    write("train_dataloader");
    return recording_.loaders("train");
  }
  Loaders val_dataloader() override {
    write("val_dataloader");
    return recording_.loaders("val");
  }
  Loaders test_dataloader() override {
    write("test_dataloader");
    return recording_.loaders("test");
  }
  Loaders predict_dataloader() override {
    write("predict_dataloader");
    return recording_.loaders("predict");
  }
  Optimizers configure_optimizers() override;

  int64_t on_train_batch_start(const Batch& batch, int64_t batch_idx) override {
    write("on_train_batch_start", {name_of(batch), str(batch_idx)});
    const Json& options = recording_.options;
    const bool end = options.contains("end_epoch_at") &&
                     options["end_epoch_at"] == Json::array({current_epoch(), batch_idx});
    return end ? -1 : 0;
  }
  StepOutput training_step(const Batch& batch, int64_t batch_idx) override;
  void on_train_batch_end(const StepOutput& output, const Batch& batch,
                          int64_t batch_idx) override {
    write("on_train_batch_end", {name_of(output), name_of(batch), str(batch_idx)});
    recording_.act("on_train_batch_end", batch_idx);
  }
  StepOutput test_step(const Batch& batch, int64_t batch_idx) override {
    return test_step(batch, batch_idx, 0);
  }
  StepOutput test_step(const Batch& batch, int64_t batch_idx, int64_t dataloader_idx) override {
    write("test_step", {name_of(batch), str(batch_idx), str(dataloader_idx)});
    recording_.act("test_step", batch_idx);
    const at::Tensor loss = loss_of(batch);
    log("test_loss", loss, LogOptions().on_step(true).on_epoch(true));
    return loss;
  }
  Batch predict_step(const Batch& batch, int64_t batch_idx) override {
    return predict_step(batch, batch_idx, 0);
  }
  Batch predict_step(const Batch& batch, int64_t batch_idx, int64_t dataloader_idx) override {
    write("predict_step", {name_of(batch), str(batch_idx), str(dataloader_idx)});
    recording_.act("predict_step", batch_idx);
    return layer->forward(batch.tensor());
  }

  void on_before_zero_grad(torch::optim::Optimizer& optimizer) override {
    write("on_before_zero_grad", {recording_.name_of(optimizer)});
  }
  void optimizer_zero_grad(int64_t epoch, int64_t batch_idx,
                           torch::optim::Optimizer& optimizer) override {
    write("optimizer_zero_grad", {str(epoch), str(batch_idx), recording_.name_of(optimizer)});
    LightningModule::optimizer_zero_grad(epoch, batch_idx, optimizer);
  }
  void on_before_backward(const at::Tensor&) override { write("on_before_backward"); }
  void backward(const at::Tensor& loss) override {
    write("backward");
    LightningModule::backward(loss);
  }
  void on_before_optimizer_step(torch::optim::Optimizer& optimizer) override {
    write("on_before_optimizer_step", {recording_.name_of(optimizer)});
  }
  void configure_gradient_clipping(torch::optim::Optimizer& optimizer,
                                   std::optional<double> gradient_clip_val,
                                   const std::optional<std::string>& algorithm) override {
    write("configure_gradient_clipping",
          {recording_.name_of(optimizer), gradient_clip_val ? str(*gradient_clip_val) : "none",
           algorithm.value_or("none")});
    LightningModule::configure_gradient_clipping(optimizer, gradient_clip_val, algorithm);
  }
  void optimizer_step(int64_t epoch, int64_t batch_idx, LightningOptimizer& optimizer,
                      const LightningOptimizer::Closure& closure) override {
    write("optimizer_step",
          {str(epoch), str(batch_idx), recording_.name_of(optimizer.optimizer())});
    LightningModule::optimizer_step(epoch, batch_idx, optimizer, closure);
  }
  void lr_scheduler_step(LRScheduler& scheduler, std::optional<double> metric) override {
    size_t i = 0;
    while (recording_.schedulers.at(i).get() != &scheduler) ++i;
    write("lr_scheduler_step", {str("scheduler ", i), metric ? "metric" : "no metric"});
    LightningModule::lr_scheduler_step(scheduler, metric);
  }
  void on_validation_model_zero_grad() override {
    write("on_validation_model_zero_grad");
    LightningModule::on_validation_model_zero_grad();
  }
  void on_save_checkpoint(State&) override { write("on_save_checkpoint"); }
  void on_load_checkpoint(State&) override { write("on_load_checkpoint"); }

  torch::nn::Linear layer{nullptr}, other{nullptr};

 protected:
  void write(const char* hook, const std::vector<std::string>& args = {}) const {
    recording_.write("module", hook, args);
  }
  at::Tensor loss_of(const Batch& batch) {
    return (layer->forward(batch.tensor()) + other->forward(batch.tensor())).square().mean();
  }

  Recording& recording_;
};

Optimizers Recorder::configure_optimizers() {
  write("configure_optimizers");
  const Json& options = recording_.options;
  const auto make = [&](std::vector<at::Tensor> parameters) {
    std::shared_ptr<torch::optim::Optimizer> made;
    if (options["optimizer"] == "lbfgs") {
      return std::shared_ptr<torch::optim::Optimizer>(std::make_shared<torch::optim::LBFGS>(
          std::move(parameters), torch::optim::LBFGSOptions(1e-6).max_iter(2)));
    }
    return std::shared_ptr<torch::optim::Optimizer>(
        std::make_shared<torch::optim::SGD>(std::move(parameters), 1e-6));
  };
  auto& optimizers = recording_.optimizers;
  auto& schedulers = recording_.schedulers;
  optimizers.clear();
  schedulers.clear();
  if (options["optimizers"] == 0) return {};
  if (options["optimizers"] == 1) {
    optimizers = {make(parameters())};
  } else {
    optimizers = {make(layer->parameters()), make(other->parameters())};
  }
  std::vector<LRSchedulerConfig> configs;
  for (const Json& one : options.value("schedulers", Json::array())) {
    if (one.value("plateau", false)) {
      schedulers.push_back(std::make_shared<ReduceLROnPlateau>(optimizers[0]));
    } else {
      schedulers.push_back(std::make_shared<StepLR>(optimizers[0], StepLROptions().step_size(2)));
    }
    LRSchedulerConfig config(schedulers.back());
    config.set_interval(one["interval"]).set_frequency(one.value("frequency", 1));
    if (one.value("plateau", false)) config.set_monitor(one.value("monitor", "val_loss"));
    configs.push_back(config);
  }
  return {std::vector<OptimizerConfig>(optimizers.begin(), optimizers.end()), configs};
}

StepOutput Recorder::training_step(const Batch& batch, int64_t batch_idx) {
  write("training_step", {name_of(batch), str(batch_idx)});
  recording_.act("training_step", batch_idx);
  for (const Json& skipped : recording_.options.value("skip_batches", Json::array())) {
    if (skipped == batch_idx) return skip;
  }
  const at::Tensor loss = loss_of(batch);
  log("train_loss", loss.detach(), LogOptions().on_step(true).on_epoch(true));
  if (automatic_optimization()) return loss;
  for (const auto& optimizer : LightningModule::optimizers()) {
    toggle_optimizer(*optimizer);
    optimizer->zero_grad();
    manual_backward(loss_of(batch));
    optimizer->step();
    untoggle_optimizer(*optimizer);
  }
  return skip;
}

template <class Base>
class ValidationStep : public Base {
 public:
  using Base::Base;

  StepOutput validation_step(const Batch& batch, int64_t batch_idx) override {
    return validation_step(batch, batch_idx, 0);
  }
  StepOutput validation_step(const Batch& batch, int64_t batch_idx,
                             int64_t dataloader_idx) override {
    this->write("validation_step",
                {name_of(batch), str(batch_idx), str(dataloader_idx), mode_of(*this->other)});
    this->recording_.act("validation_step", batch_idx);
    at::Tensor loss = this->loss_of(batch);
    const Json losses = this->recording_.options.value("val_losses", Json::array());
    if (!losses.empty()) {
      const size_t epoch = static_cast<size_t>(this->current_epoch());
      loss = at::tensor(losses[std::min(epoch, losses.size() - 1)].template get<float>());
    }
    this->log("val_loss", loss, LogOptions().on_step(true).on_epoch(true));
    return loss;
  }
};

template <class Base>
class ModeHooks : public Base {
 public:
  using Base::Base;

  void on_validation_model_eval() override {
    this->write("on_validation_model_eval");
    this->eval();
  }
  void on_validation_model_train() override {
    this->write("on_validation_model_train");
    this->train();
  }
  void on_test_model_eval() override {
    this->write("on_test_model_eval");
    this->eval();
  }
  void on_test_model_train() override {
    this->write("on_test_model_train");
    this->train();
  }
  void on_predict_model_eval() override {
    this->write("on_predict_model_eval");
    this->eval();
  }
};

template <class Module>
std::shared_ptr<Recorder> with_transfer(Recording& recording) {
  // The data module's transfer hooks are recorded where it has them.
  if (recording.data["transfer"]) return std::make_shared<Module>(recording);
  return std::make_shared<Transfer<Module>>(recording);
}
template <class Module>
std::shared_ptr<Recorder> with_modes(Recording& recording) {
  if (!recording.options["mode_hooks"]) return with_transfer<Module>(recording);
  return with_transfer<ModeHooks<Module>>(recording);
}
std::shared_ptr<Recorder> make_module(Recording& recording) {
  if (!recording.options["validation_step"]) return with_modes<Recorder>(recording);
  return with_modes<ValidationStep<Recorder>>(recording);
}

// ---- Logger -------------------------------------------------------------------------------------

class RecorderLogger : public Logger {
 public:
  RecorderLogger(Recording& recording, std::string folder)
      : recording_(recording), folder_(std::move(folder)) {}

  std::string name() const override { return "recorded"; }
  std::string version() const override { return "0"; }
  std::string save_dir() const override { return folder_; }
  void log_metrics(const MetricRow& metrics, int64_t step) override {
    std::vector<std::string> args;
    for (const auto& [name, value] : metrics) args.push_back(name);
    std::sort(args.begin(), args.end());
    args.push_back(str("step ", step));
    recording_.write("logger", "log_metrics", args);
  }
  void log_hyperparams(const Json&) override { recording_.write("logger", "log_hyperparams"); }
  void save() override { recording_.write("logger", "save"); }
  void finalize(const std::string& status) override {
    recording_.write("logger", "finalize", {status});
  }
  void after_save_checkpoint(Callback&) override {
    recording_.write("logger", "after_save_checkpoint");
  }

 private:
  Recording& recording_;
  std::string folder_;
};

// ---- A configuration ----------------------------------------------------------------------------

// What runs: the flags, and the parts made for one Trainer.
class Configuration {
 public:
  Configuration(const Json& configuration, std::string folder)
      : configuration_(configuration), folder_(std::move(folder)), recording_(configuration) {
    flags_ = Json::parse(R"({"accelerator": "cpu", "logger": false, "enable_progress_bar": false,
                             "enable_model_summary": false, "enable_checkpointing": false,
                             "max_epochs": 2})");
    flags_["default_root_dir"] = folder_;
    make(configuration_.value("trainer", Json::object()));
  }

  std::vector<std::string> run() {
    torch::manual_seed(0);  // the order of a shuffled loader
    for (Json entry : configuration_.value("runs", Json::array({"fit"}))) {
      if (entry.is_string()) entry = Json{{"entry", entry}};
      if (entry.contains("trainer")) make(entry["trainer"]);
      run_one(entry);
    }
    return recording_.lines;
  }

 private:
  void make(const Json& overrides);
  void run_one(const Json& entry);
  std::vector<std::string> call(const std::string& name, const RunArguments& arguments);
  std::vector<Part<Callback>> callbacks();

  Json configuration_;
  std::string folder_;
  Recording recording_;
  Json flags_;
  std::shared_ptr<Recorder> module_;
  std::shared_ptr<Data> data_;
  std::unique_ptr<Trainer> trainer_;
};

std::vector<Part<Callback>> Configuration::callbacks() {
  std::vector<Part<Callback>> made;
  int recorders = 0;
  for (const Json& spec : configuration_.value("callbacks", Json::array({"recorder"}))) {
    if (spec == "recorder") {
      const std::string name = recorders == 0 ? "callback" : str("callback", recorders);
      made.emplace_back(std::make_shared<RecorderCallback>(recording_, name));
      ++recorders;
    } else if (spec == "recorder_checkpoint") {
      made.emplace_back(std::make_shared<RecorderCallback>(recording_, "checkpoint", true));
    } else {
      made.emplace_back(spec.begin().key(), spec.begin().value());
    }
  }
  return made;
}

void Configuration::make(const Json& overrides) {
  flags_.update(overrides);
  TrainerOptions options;
  options.read(flags_, "trainer");
  options.callbacks(callbacks());
  if (configuration_.value("logger", false)) {
    options.logger(std::make_shared<RecorderLogger>(recording_, folder_));
  }
  module_ = make_module(recording_);
  data_ = make_data(recording_);
  trainer_ = std::make_unique<Trainer>(options);
  recording_.trainer = trainer_.get();
  recording_.module = module_.get();
}

void Configuration::run_one(const Json& entry) {
  const std::string name = entry["entry"];
  std::vector<std::string> result;
  try {
    result = call(name, RunArguments().ckpt_path(entry.value("ckpt_path", "")));
  } catch (const std::exception& error) {  // what a hook raised
    recording_.write("run", name.c_str(), {str("raised ", error.what())});
    return;
  }
  std::vector<std::string> args;
  if (!result.empty()) args.push_back(join(result, " and "));
  args.push_back(mode_of(*module_->other));
  recording_.write("run", name.c_str(), args);
}

// The shape of the result, for each data loader.
std::vector<std::string> Configuration::call(const std::string& name,
                                             const RunArguments& arguments) {
  const std::string from = recording_.data["from"];
  Loaders train, val;
  std::shared_ptr<LightningDataModule> data;
  if (from == "datamodule") {
    data = data_;
  } else if (from == "arguments") {
    train = recording_.loaders("train");
    val = recording_.loaders("val");
  }
  std::vector<std::string> shapes;
  if (name == "fit") {
    data ? trainer_->fit(module_, data, arguments) : trainer_->fit(module_, train, val, arguments);
  } else if (name == "predict") {
    for (const auto& loader : trainer_->predict(module_, data, arguments)) {
      shapes.push_back(str(loader.size(), " batches"));
    }
  } else {
    const auto results = name == "test" ? trainer_->test(module_, data, arguments)
                                        : trainer_->validate(module_, data, arguments);
    for (const auto& loader : results) {
      std::vector<std::string> names;
      for (const auto& [metric, value] : loader) names.push_back(metric);
      shapes.push_back(join(names, " "));
    }
  }
  return shapes;
}

void fill(Json& node, const std::string& folder) {
  if (node.is_string()) {
    std::string text = node;
    const size_t at = text.find("$DIR");
    if (at != std::string::npos) node = text.replace(at, 4, folder);
  } else if (node.is_structured()) {
    for (auto& child : node) fill(child, folder);
  }
}

}  // namespace

std::vector<std::string> record_hooks(const Json& configuration, const std::string& folder) {
  Json filled = configuration;
  fill(filled, folder);
  return Configuration(filled, folder).run();
}

}  // namespace lightning::testing
