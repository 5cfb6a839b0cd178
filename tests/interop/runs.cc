#include "tests/interop/runs.h"

#include <torch/torch.h>

#include <filesystem>
#include <stdexcept>

#include "callbacks/early_stopping.h"
#include "callbacks/model_checkpoint.h"
#include "lightning/data/data_loader.h"
#include "lightning/optim/factories.h"
#include "lightning/optim/schedulers.h"
#include "lightning/trainer.h"

namespace lightning::testing {
namespace {

constexpr int64_t kEpochs = 3;

// Fixed numbers from -0.5 to 0.5, the same wherever they are computed.
at::Tensor numbers(int64_t count, int64_t factor, int64_t modulus) {
  const at::Tensor whole = torch::arange(count, at::kLong) * factor % modulus;
  return whole.to(at::kFloat) / modulus - 0.5;
}

Loaders rows(int64_t first, int64_t count, int64_t batch_size) {
  const at::Tensor x = numbers(1000, 37, 101).slice(0, first * 4, (first + count) * 4);
  const at::Tensor x_NF = x.reshape({count, 4});
  const at::Tensor y_N = torch::arange(first, first + count, at::kLong) * 5 % 3;
  return DataLoader(FunctionDataset(count,
                                    [x_NF, y_N](int64_t i) {
                                      return Batch::list({Batch(x_NF[i]), Batch(y_N[i])});
                                    }),
                    DataLoaderOptions(batch_size));
}

std::vector<std::vector<at::Tensor>> split(torch::nn::Sequential& net, size_t parts) {
  if (parts == 1) return {net->parameters()};
  std::vector<std::vector<at::Tensor>> all(2);
  for (size_t i = 0; i < net->size(); ++i) {
    for (const at::Tensor& p : net->ptr(i)->parameters()) all[i == 0 ? 0 : 1].push_back(p);
  }
  return all;
}

}  // namespace

Net::Net(const NetOptions& options, const Json& run) : run_(run) {
  using namespace torch::nn;
  if (run.value("hparams", true)) save_hyperparameters(options);
  net =
      register_module("net", Sequential(Linear(4, options.hidden()), BatchNorm1d(options.hidden()),
                                        Tanh(), Linear(options.hidden(), 3)));
  const at::NoGradGuard no_grad;
  int64_t i = 0;
  for (at::Tensor& p : net->parameters()) {
    p.copy_(numbers(p.numel(), 31 + 2 * i, 97).reshape(p.sizes()));
    ++i;
  }
  set_automatic_optimization(!run.value("manual", false));
}

at::Tensor Net::loss(const Batch& batch) {
  return at::cross_entropy_loss(net->forward(batch[0]), batch[1]);
}

StepOutput Net::training_step(const Batch& batch, int64_t) {
  const at::Tensor loss = this->loss(batch);
  if (!automatic_optimization()) {
    for (const auto& optimizer : optimizers()) optimizer->zero_grad();
    manual_backward(loss);
    for (const auto& optimizer : optimizers()) optimizer->step();
  }
  return loss;
}

StepOutput Net::validation_step(const Batch& batch, int64_t) {
  log("val_loss", loss(batch));
  return {};
}

void Net::on_train_epoch_end() {
  if (automatic_optimization()) return;
  for (const auto& schedule : lr_schedulers()) schedule->step();
}

Optimizers Net::configure_optimizers() {
  std::vector<OptimizerConfig> optimizers;
  const Json& wanted = run_["optimizers"];
  const auto parts = split(net, wanted.size());
  for (size_t i = 0; i < wanted.size(); ++i) {
    const auto factory = registry<OptimizerFactory>().make(wanted[i][0], wanted[i][1]);
    optimizers.emplace_back(factory->make(parts[i]));
  }
  std::vector<LRSchedulerConfig> schedules;
  for (const Json& one : run_.value("schedulers", Json::array())) {
    Json options = one["options"];
    if (one.contains("monitor")) options["monitor"] = one["monitor"];
    const auto factory = registry<LRSchedulerFactory>().make(one["name"], options);
    LRSchedulerConfig config(factory->make(optimizers[one.value("of", 0)].optimizer));
    config.set_interval(one.value("interval", "epoch"));
    if (one.contains("monitor")) config.set_monitor(one["monitor"]);
    schedules.push_back(config);
  }
  return {optimizers, schedules};
}

void Net::on_save_checkpoint(State& checkpoint) {
  checkpoint["of the module"] =
      State::dict({{"note", "Grüße"}, {"pair", State::Tuple{{1, 2.5}}}, {"big", int64_t{1} << 40}});
}

void Net::on_load_checkpoint(State& checkpoint) {
  if (const State* found = checkpoint.find("of the module")) seen = *found;
}

Loaders Data::train_dataloader() { return rows(0, 24, options_.batch_size()); }
Loaders Data::val_dataloader() { return rows(24, 8, options_.batch_size()); }

State Data::state_dict() const {
  return State::dict(
      {{"token", "seven"},
       {"position", State::dict({{"shard", 3}, {"offsets", State::List{1, 2, 3}}})}});
}

Fitted fit(const Json& run, const std::string& folder, const std::string& ckpt_path) {
  Json flags = Json::parse(R"({"accelerator": "cpu", "logger": false, "num_sanity_val_steps": 0,
                               "enable_progress_bar": false, "enable_model_summary": false})");
  flags["max_epochs"] = kEpochs;
  flags["default_root_dir"] = folder;
  flags.update(run.value("trainer", Json::object()));
  TrainerOptions options;
  options.read(flags, "trainer");
  std::vector<Part<Callback>> callbacks;
  if (run.value("early_stopping", true)) {
    callbacks.push_back(EarlyStoppingOptions("val_loss").patience(10));
  }
  callbacks.push_back(ModelCheckpointOptions()
                          .dirpath(folder)
                          .monitor("val_loss")
                          .save_top_k(-1)
                          .save_weights_only(run.value("weights_only", false)));
  Trainer trainer(options.callbacks(callbacks));

  Fitted fitted{std::make_shared<Net>(NetOptions(), run), nullptr};
  RunArguments arguments;
  arguments.ckpt_path(ckpt_path);
  if (run.value("datamodule", true)) {
    fitted.data = std::make_shared<Data>(DataOptions());
    trainer.fit(fitted.module, fitted.data, arguments);
  } else {
    trainer.fit(fitted.module, rows(0, 24, 4), rows(24, 8, 4), arguments);
  }
  return fitted;
}

std::string saved(const std::string& folder, int64_t epoch) {
  const std::string begin = "epoch=" + std::to_string(epoch) + "-step=";
  for (const auto& entry : std::filesystem::directory_iterator(folder)) {
    if (entry.path().filename().string().rfind(begin, 0) == 0) return entry.path().string();
  }
  throw std::runtime_error("no " + begin + "*.ckpt in " + folder);
}

}  // namespace lightning::testing
