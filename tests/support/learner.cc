#include "tests/support/learner.h"

#include <set>

namespace lightning::testing {
namespace {

void flatten(const State& state, const std::string& path, Leaves& out) {
  if (state.is_dict()) {
    for (const auto& [key, value] : state.as_dict())
      flatten(value, path + "/" + to_string(key), out);
  } else if (state.is<State::List>() || state.is<State::Tuple>()) {
    size_t index = 0;
    for (const auto& value : state.as_list()) flatten(value, path + "/" + str(index++), out);
  } else if (state.is<TensorState>()) {
    const auto tensor = state.as_tensor().contiguous();
    out[path] = str(tensor.dtype().name(), tensor.sizes()) +
                std::string(static_cast<const char*>(tensor.data_ptr()), tensor.nbytes());
  } else {
    out[path] = state.repr();
  }
}

}  // namespace

Leaves leaves_of(const State& state) {
  Leaves leaves;
  flatten(state, "", leaves);
  return leaves;
}

std::string differences(const Leaves& a, const Leaves& b) {
  std::string found;
  std::set<std::string> keys;
  for (const auto& item : a) keys.insert(item.first);
  for (const auto& item : b) keys.insert(item.first);
  for (const auto& key : keys) {
    const auto one = a.find(key), other = b.find(key);
    if (one == a.end()) {
      found += "only resumed: " + key + "\n";
    } else if (other == b.end()) {
      found += "only at once: " + key + "\n";
    } else if (one->second != other->second) {
      const bool shown = one->second.size() < 60 && other->second.size() < 60;
      found += key + (shown ? ": " + one->second + " | " + other->second : std::string()) + "\n";
    }
  }
  return found;
}

at::Tensor noise(int64_t rows, uint64_t seed) {
  auto generator = at::make_generator<at::CPUGeneratorImpl>(seed);
  return at::randn({rows, 8}, generator);
}

Learner::Learner(bool by_hand) : by_hand(by_hand) {
  set_automatic_optimization(!by_hand);
  first = register_module("first", torch::nn::Linear(8, 16));
  norm = register_module("norm", torch::nn::BatchNorm1d(16));
  dropout = register_module("dropout", torch::nn::Dropout(0.4));
  last = register_module("last", torch::nn::Linear(16, 1));
  average = register_buffer("average", torch::zeros({1}));
  register_metric("whole", whole);
  register_metric("val_whole", val_whole);
  register_metric("all_along", all_along);
}

at::Tensor Learner::loss(const Batch& batch) {
  const auto& rows = batch.is_map() ? batch["rows"] : batch.tensor();
  auto hidden = dropout(torch::relu(norm(first(rows))));
  return (last(hidden) - rows.sum(1, true)).square().mean();
}

StepOutput Learner::training_step(const Batch& batch, int64_t batch_idx) {
  auto value = loss(batch);
  log("loss", value, LogOptions().on_step(true).on_epoch(true));
  log("drawn", at::rand({}), LogOptions().on_step(true));
  log("largest", value, LogOptions().on_step(false).on_epoch(true).reduce_fx("max"));
  mean(value.detach());
  log("mean", mean, LogOptions().on_step(true).on_epoch(true));
  log("mean_again", mean, LogOptions().on_step(false).on_epoch(true));
  whole.update(value.detach());
  all_along.update(value.detach());
  if (!by_hand) return value;
  auto all = optimizers();
  manual_backward(value / 2);
  // Windows of two batches, and of three.
  for (size_t i = 0; i < all.size(); ++i) {
    const auto window = static_cast<int64_t>(i) + 2;
    if (batch_idx % window != window - 1) continue;
    all[i]->step();
    all[i]->zero_grad();
  }
  return value;
}

void Learner::on_train_batch_end(const StepOutput& output, const Batch&, int64_t) {
  const at::NoGradGuard no_grad;
  average.mul_(0.9).add_(output.loss(), 0.1).add_(at::rand({1}), 0.01);
}

void Learner::on_train_epoch_start() {
  if (current_epoch() == 1) norm->eval();
}

StepOutput Learner::validation_step(const Batch& batch, int64_t) {
  const auto value = loss(batch);
  log("val_loss", value + at::rand({}) * 0.01);
  val_whole.update(value);
  return {};
}

void Learner::on_validation_epoch_end() { log("val_whole", val_whole); }

void Learner::on_validation_end() {
  if (!trainer().sanity_checking()) average.add_(at::rand({1}), 0.01);
}

void Learner::on_train_epoch_end() {
  log("at_end", at::rand({}));
  log("whole", whole);
  log("all_along", all_along.compute());
}

Optimizers Learner::configure_optimizers() {
  auto ends = std::vector<at::Tensor>{last->weight, last->bias};
  auto begin = std::vector<at::Tensor>{first->weight, first->bias, norm->weight, norm->bias};
  auto sgd = std::make_shared<torch::optim::SGD>(
      begin, torch::optim::SGDOptions(0.05).momentum(0.9).weight_decay(0.01));
  if (by_hand) {
    return Optimizers({sgd, std::make_shared<torch::optim::Adam>(ends, 0.01)});
  }
  begin.insert(begin.end(), ends.begin(), ends.end());
  auto adam = std::make_shared<torch::optim::AdamW>(begin, torch::optim::AdamWOptions(0.02));
  return Optimizers(
      {adam},
      {LRSchedulerConfig(std::make_shared<StepLR>(*adam, StepLROptions(1).gamma(0.7))),
       LRSchedulerConfig(std::make_shared<CosineAnnealingLR>(*adam, CosineAnnealingLROptions(9)))
           .set_interval("step"),
       LRSchedulerConfig(std::make_shared<ReduceLROnPlateau>(
                             *adam, ReduceLROnPlateauOptions().patience(0).factor(0.5)))
           .set_monitor("loss_epoch")});
}

}  // namespace lightning::testing
