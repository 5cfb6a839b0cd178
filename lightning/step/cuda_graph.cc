#include "lightning/step/cuda_graph.h"

#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/_foreach_copy.h>
#include <ATen/ops/empty_like.h>
#include <torch/nn/module.h>

#include <algorithm>
#include <utility>

#include "lightning/errors.h"
#include "lightning/log.h"
#include "lightning/recording.h"
#include "lightning/registry.h"

namespace lightning {

namespace {

bool same_shape(const at::Tensor& fixed, const at::Tensor& given) {
  if (!fixed.defined() || !given.defined()) return fixed.defined() == given.defined();
  if (fixed.scalar_type() != given.scalar_type() || fixed.device() != given.device() ||
      fixed.layout() != given.layout() || fixed.sizes() != given.sizes()) {
    return false;
  }
  // One with gaps is copied to one without.
  return given.layout() != at::kStrided || !given.is_non_overlapping_and_dense() ||
         fixed.strides() == given.strides();
}

// Whether a step on `given` is the step on `fixed` with other numbers in its tensors.
bool same_shape(const Batch& fixed, const Batch& given) {
  if (fixed.is_tensor()) {
    return given.is_tensor() && same_shape(fixed.tensor(), given.tensor());
  }
  if (fixed.is_list()) {
    if (!given.is_list() || given.size() != fixed.size()) return false;
    for (size_t i = 0; i < fixed.size(); ++i) {
      if (!same_shape(fixed.at(i), given.at(i))) return false;
    }
    return true;
  }
  if (fixed.is_map()) {
    if (!given.is_map() || given.size() != fixed.size()) return false;
    for (size_t i = 0; i < fixed.size(); ++i) {
      const auto& [key, item] = fixed.as_map()[i];
      const auto& [given_key, given_item] = given.as_map()[i];
      if (key != given_key || !same_shape(item, given_item)) return false;
    }
    return true;
  }
  if (fixed.is_bool()) return given.is_bool() && fixed.as_bool() == given.as_bool();
  if (fixed.is_int()) return given.is_int() && fixed.as_int() == given.as_int();
  if (fixed.is_double()) return given.is_double() && fixed.as_double() == given.as_double();
  if (fixed.is_string()) return given.is_string() && fixed.as_string() == given.as_string();
  return given.is_none();
}

// Into trees of the same shape.
void copy_tensors(const Batch& to, const Batch& from) {
  const at::NoGradGuard no_grad;
  if (to.is_tensor()) {
    if (to.tensor().defined()) to.tensor().copy_(from.tensor(), /*non_blocking=*/true);
  } else if (to.is_list()) {
    for (size_t i = 0; i < to.size(); ++i) copy_tensors(to.as_list()[i], from.as_list()[i]);
  } else if (to.is_map()) {
    for (size_t i = 0; i < to.size(); ++i) {
      copy_tensors(to.as_map()[i].second, from.as_map()[i].second);
    }
  }
}

// Why batches like this one cannot be read by a graph; empty where they can.
std::string unfit(const Batch& batch, c10::Device device) {
  std::string reason;
  batch.for_each_tensor([&](const at::Tensor& tensor) {
    if (!tensor.defined() || !reason.empty()) return;
    if (tensor.layout() != at::kStrided) reason = "the batch holds a tensor that is not dense";
    if (tensor.requires_grad()) reason = "the batch holds a tensor that requires a gradient";
    if (tensor.device() != device) {
      reason = str("the batch holds a tensor on ", tensor.device(), " while the model is on ",
                   device, ", so the step waits for the GPU or copies");
    }
  });
  return reason;
}

// Of an exception, without LibTorch's stack.
std::string first_line(const std::string& text) { return text.substr(0, text.find('\n')); }

}  // namespace

// ---- What is kept -------------------------------------------------------------------------------

// The model as it was when graphs were recorded. Asked at each step, so nothing is allocated.
struct CUDAGraphExecutor::Model {
  struct Tensor {
    at::Tensor tensor;
    const void* data;
    bool requires_grad;
  };

  Model(torch::nn::Module& module, int64_t in_epoch) : epoch(in_epoch) {
    for (const auto& one : module.modules(/*include_self=*/true)) {
      modules.emplace_back(one, one->is_training());
    }
    for (const auto& parameter : module.parameters()) {
      tensors.push_back({parameter, data_of(parameter), parameter.requires_grad()});
    }
    parameters = tensors.size();
    for (const auto& buffer : module.buffers()) {
      tensors.push_back({buffer, data_of(buffer), buffer.requires_grad()});
    }
  }

  static const void* data_of(const at::Tensor& tensor) {
    return tensor.defined() && tensor.has_storage() ? tensor.const_data_ptr() : nullptr;
  }

  bool is_same() const {
    for (const auto& [module, training] : modules) {
      if (module->is_training() != training) return false;
    }
    for (const auto& one : tensors) {
      if (data_of(one.tensor) != one.data || one.tensor.requires_grad() != one.requires_grad) {
        return false;
      }
    }
    return true;
  }
  // Whether it holds the same modules and tensors; asked once an epoch.
  bool is_same(const Model& other) const {
    return modules == other.modules &&
           std::equal(tensors.begin(), tensors.end(), other.tensors.begin(), other.tensors.end(),
                      [](const Tensor& a, const Tensor& b) { return a.tensor.is_same(b.tensor); });
  }
  // Grows whenever somebody writes a parameter; replays do not count.
  uint64_t versions() const {
    uint64_t sum = 0;
    for (size_t i = 0; i < parameters; ++i) {
      if (!tensors[i].tensor.is_inference()) sum += tensors[i].tensor._version();
    }
    return sum;
  }

  int64_t epoch;
  std::vector<std::pair<std::shared_ptr<torch::nn::Module>, bool>> modules;
  std::vector<Tensor> tensors;  // parameters, then buffers
  size_t parameters = 0;
  uint64_t versions_after_step = 0;
};

struct CUDAGraphExecutor::Graph {
  // The gradient of a parameter: where the graph finds it, which it does when it adds to it, and
  // where it leaves it.
  struct Gradient {
    at::Tensor parameter, before, after;
    bool was_there = false;  // before
    bool adds() const { return before.defined() && before.is_same(after); }
  };

  StepKind kind;
  Batch inputs;  // a tree of the shape; what the graph reads, once it is recorded
  bool refused = false;
  int64_t steps = 0;  // ordinary ones so far
  std::unique_ptr<RecordedWork> work;
  std::unique_ptr<StepRecord> record;
  std::vector<Gradient> gradients;

  void note_gradients_before(const Model& model) {
    gradients.clear();
    for (size_t i = 0; i < model.parameters; ++i) {
      const auto& parameter = model.tensors[i].tensor;
      if (!parameter.requires_grad()) continue;
      gradients.push_back({parameter, parameter.grad(), {}, parameter.grad().defined()});
    }
  }
  void note_gradients_after() {
    for (auto& one : gradients) one.after = one.parameter.grad();
  }
  // What is read no more need not be held.
  void keep_gradients() {
    for (auto& one : gradients) {
      if (!one.adds()) one.before.reset();
    }
  }
  void put_back_gradients() {
    for (auto& one : gradients) one.parameter.mutable_grad() = one.before;
  }

  // Brings gradients that another step left elsewhere to where the graph adds to them. False where
  // there are none, and where there is one that the graph does not know of and would drop.
  bool fetch_gradients() {
    std::vector<at::Tensor> to, from;
    for (const auto& one : gradients) {
      const auto& now = one.parameter.grad();
      if (!kind.clears && !one.was_there && now.defined()) return false;
      if (!one.adds()) continue;
      if (!now.defined()) return false;
      if (now.is_same(one.before)) continue;
      to.push_back(one.before);
      from.push_back(now);
    }
    const at::NoGradGuard no_grad;
    if (!to.empty()) at::_foreach_copy_(to, from);
    return true;
  }
  void leave_gradients() {
    for (auto& one : gradients) {
      if (!one.parameter.grad().is_same(one.after)) one.parameter.mutable_grad() = one.after;
    }
  }
};

// ---- The executor -------------------------------------------------------------------------------

CUDAGraphExecutor::CUDAGraphExecutor(const CUDAGraphOptions& options,
                                     GraphDeviceFactory make_device)
    : options_(options), make_device_(std::move(make_device)) {
  const auto check = [](const char* name, int64_t value) {
    if (value >= 1) return;
    throw MisconfigurationError(
        str("compile \"cuda_graph\" got ", name, "=", value, ", expected at least 1."));
  };
  check("warmup_steps", options.warmup_steps());
  check("max_graphs", options.max_graphs());
}

CUDAGraphExecutor::~CUDAGraphExecutor() = default;

void CUDAGraphExecutor::start(c10::Device device) {
  recorded_ = replayed_ = replayed_before_change_ = times_changed_ = 0;
  if (make_device_ == nullptr) {
    throw MisconfigurationError(
        "compile=\"cuda_graph\" needs a LibTorch with CUDA, and this program was built with one "
        "without. Build with a CUDA build of torch, or use compile=\"eager\".");
  }
  device_ = make_device_(device);
  if (device_ == nullptr) {
    throw MisconfigurationError(str("compile=\"cuda_graph\" got the device ", device,
                                    ", expected a GPU. Use accelerator=\"cuda\", or "
                                    "compile=\"eager\"."));
  }
}

void CUDAGraphExecutor::reset() {
  drop_graphs();
  device_.reset();
  asked_ = aside_ = said_too_many_ = false;
  said_.clear();
}

void CUDAGraphExecutor::drop_graphs() {
  graphs_.clear();
  model_.reset();
}

void CUDAGraphExecutor::say_once(const std::string& line) {
  if (said_.insert(line).second) warn("compile=\"cuda_graph\": " + line);
}

void CUDAGraphExecutor::stand_aside(const std::string& reason) {
  if (aside_) return;
  aside_ = true;
  say_once("steps run without a graph, because " + reason + ".");
}

StepOutput CUDAGraphExecutor::run(TrainingStep& step, const Batch& batch) {
  if (device_ == nullptr) start(step.device());
  if (!asked_) {
    asked_ = true;
    const auto reason = step.obstacle();
    if (!reason.empty()) stand_aside(reason);
  }
  if (aside_) return step.run(batch);
  step_ = &step;
  auto output = run_if_recordable(step, batch);
  if (model_ != nullptr) model_->versions_after_step = model_->versions();
  return output;
}

StepOutput CUDAGraphExecutor::run_if_recordable(TrainingStep& step, const Batch& batch) {
  const auto make_model = [&] { return std::make_unique<Model>(step.module(), step.epoch()); };
  if (model_ != nullptr) {
    bool same = model_->is_same();
    if (same && model_->epoch != step.epoch()) {
      same = model_->is_same(*make_model());
      model_->epoch = step.epoch();
    }
    if (!same) {
      drop_graphs();
      if (changes_too_often()) {
        stand_aside("the model's modes or parameters change again and again");
        return step.run(batch);
      }
    }
  }
  if (model_ == nullptr) {
    model_ = make_model();
    model_->versions_after_step = model_->versions();
  }

  auto* graph = find(step.kind(), batch);
  if (graph == nullptr || graph->refused) return step.run(batch);
  if (graph->steps < options_.warmup_steps()) {
    ++graph->steps;
    return warm_up(step, batch);
  }
  // 16-bit copies of parameters that somebody else wrote are made in an ordinary step.
  if (model_->versions() != model_->versions_after_step) {
    say_once(
        "somebody beside the optimizer writes the parameters; such steps run without a graph.");
    return warm_up(step, batch);
  }
  if (!step.prepare() && forget_recordings() && changes_too_often()) {
    stand_aside("the optimizer's options change again and again");
    return step.run(batch);
  }
  if (graph->work == nullptr && !record(*graph, batch)) return step.run(batch);
  return replay(*graph, step, batch);
}

// Whether recordings do not live long enough to be worth it.
bool CUDAGraphExecutor::changes_too_often() {
  constexpr int64_t kWorthIt = 20;  // replays
  if (replayed_ - replayed_before_change_ >= kWorthIt) times_changed_ = 0;
  replayed_before_change_ = replayed_;
  return ++times_changed_ > options_.max_graphs();
}

// What is known of shapes stays. True where there was a recording.
bool CUDAGraphExecutor::forget_recordings() {
  bool any = false;
  for (const auto& graph : graphs_) {
    any = any || graph->work != nullptr;
    graph->work.reset();
    graph->record.reset();
    graph->gradients.clear();
  }
  return any;
}

StepOutput CUDAGraphExecutor::warm_up(TrainingStep& step, const Batch& batch) {
  StepOutput output;
  device_->warm_up([&] { output = step.run(batch); });
  return output;
}

// The graph for a batch, one to be recorded if there is none; null where there are too many.
CUDAGraphExecutor::Graph* CUDAGraphExecutor::find(const StepKind& kind, const Batch& batch) {
  for (const auto& graph : graphs_) {
    if (graph->kind == kind && same_shape(graph->inputs, batch)) return graph.get();
  }
  if (static_cast<int64_t>(graphs_.size()) >= options_.max_graphs()) {
    if (std::exchange(said_too_many_, true)) return nullptr;
    say_once(str("batches are of more than max_graphs=", options_.max_graphs(),
                 " shapes (counted for each place in an accumulation window). Others, as ",
                 batch.describe(),
                 ", run without a graph. Give batches of equal shape, or a larger max_graphs."));
    return nullptr;
  }
  graphs_.push_back(std::make_unique<Graph>());
  auto* graph = graphs_.back().get();
  graph->kind = kind;
  const auto reason = unfit(batch, step_->device());
  if (!reason.empty()) {
    graph->inputs = batch.detach();
    graph->refused = true;
    say_once("steps run without a graph, because " + reason + ".");
    return graph;
  }
  const at::NoGradGuard no_grad;
  graph->inputs = batch.apply(
      [](const at::Tensor& tensor) { return tensor.defined() ? at::empty_like(tensor) : tensor; });
  return graph;
}

bool CUDAGraphExecutor::record(Graph& graph, const Batch& batch) {
  copy_tensors(graph.inputs, batch);
  graph.note_gradients_before(*model_);
  std::string reason;
  try {
    // May be called again, by a device that has no recordings of its own: a test's.
    graph.work = device_->record([this, &graph] {
      graph.record = step_->record(graph.inputs);
      graph.note_gradients_after();
    });
    ++recorded_;
    graph.put_back_gradients();  // nothing has run yet
    graph.keep_gradients();
    model_->versions_after_step = model_->versions();
    return true;
  } catch (const CannotRecord& error) {
    reason = error.what();
  } catch (const std::exception& error) {
    reason = str("recording it failed: ", first_line(error.what()),
                 " A step that waits for the GPU (item(), a copy to the host, nonzero()) cannot be "
                 "recorded");
  }
  graph.put_back_gradients();
  // What the attempt left half done may be what other graphs read.
  forget_recordings();
  graph.refused = true;
  say_once("steps run without a graph, because " + reason + ".");
  return false;
}

StepOutput CUDAGraphExecutor::replay(Graph& graph, TrainingStep& step, const Batch& batch) {
  if (!graph.fetch_gradients()) return warm_up(step, batch);
  copy_tensors(graph.inputs, batch);
  graph.work->launch();
  graph.leave_gradients();
  ++replayed_;
  return step.finish(*graph.record);
}

namespace {

const Registration<StepExecutor> kCUDAGraph{
    "cuda_graph", "Records steps as CUDA graphs and replays them: fast where a model is small.",
    [](const CUDAGraphOptions& options) { return std::make_unique<CUDAGraphExecutor>(options); }};

}  // namespace
}  // namespace lightning
