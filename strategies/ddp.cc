#include "strategies/ddp.h"

#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/engine.h>
#include <torch/csrc/distributed/c10d/debug.h>
#include <torch/nn/module.h>
#include <torch/nn/modules/embedding.h>
#include <torch/optim/optimizer.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <torch/csrc/distributed/c10d/logger.hpp>
#include <torch/csrc/distributed/c10d/reducer.hpp>
#include <unordered_set>
#include <utility>

#include "lightning/distributed/collective_wait.h"
#include "lightning/errors.h"
#include "lightning/registry.h"
#include "strategies/parallel.h"

namespace lightning {

namespace {

constexpr double kMiB = 1024.0 * 1024.0;

// Gradients in bfloat16, divided before they are summed so that no sum overflows.
class BF16Compression : public c10d::CppCommHookInterface<c10::intrusive_ptr<c10d::ProcessGroup>> {
 public:
  using CppCommHookInterface::CppCommHookInterface;

  c10::intrusive_ptr<c10::ivalue::Future> runHook(c10d::GradBucket& bucket) override {
    const auto buffer = bucket.getBufferRef();
    std::vector<at::Tensor> small{buffer.to(at::kBFloat16).div_(state_->getSize())};
    auto sum = state_->allreduce(small)->getFuture();
    return sum->then(
        [buffer](c10::ivalue::Future& done) {
          const auto value = done.value();
          buffer.copy_(value.isTensorList() ? value.toTensorVector()[0] : value.toTensor());
          return c10::IValue(buffer);
        },
        c10::TensorType::get());
  }
};

// Of each parameter, whether its gradient will be sparse: the layers that make such are embeddings.
std::vector<bool> with_sparse_gradients(const torch::nn::Module& module,
                                        const std::vector<at::Tensor>& parameters) {
  std::unordered_set<const void*> sparse;
  for (const auto& layer : module.modules(/*include_self=*/false)) {
    const auto* const one = layer->as<torch::nn::Embedding>();
    const auto* const bag = layer->as<torch::nn::EmbeddingBag>();
    if (one != nullptr && one->options.sparse()) sparse.insert(one->weight.unsafeGetTensorImpl());
    if (bag != nullptr && bag->options.sparse()) sparse.insert(bag->weight.unsafeGetTensorImpl());
  }
  std::vector<bool> flags;
  for (const auto& each : parameters) flags.push_back(sparse.count(each.unsafeGetTensorImpl()) > 0);
  return flags;
}

// The loss itself. When backward begins it asks for the reducer's call at backward's end, which a
// static graph needs in its first step.
struct ReduceAtEnd : torch::autograd::Function<ReduceAtEnd> {
  static at::Tensor forward(torch::autograd::AutogradContext* context, const at::Tensor& loss,
                            int64_t reducer) {
    context->saved_data["reducer"] = reducer;
    return loss.view_as(loss);
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 torch::autograd::variable_list gradients) {
    auto* reducer =
        reinterpret_cast<c10d::Reducer*>(context->saved_data["reducer"].toInt());  // NOLINT
    torch::autograd::Engine::get_default_engine().queue_callback(
        [reducer] { reducer->delay_all_reduce(); });
    return {gradients[0], at::Tensor()};
  }
};

class DDPStrategy : public ParallelStrategy {
 public:
  // Errors: MisconfigurationError for a hook that is not known, a bucket below 1 byte, a timeout
  // that is no time.
  explicit DDPStrategy(const DDPStrategyOptions& options)
      : ParallelStrategy(options.process_group_backend(), options.timeout(), "DDPStrategy.timeout"),
        options_(options) {
    const auto& hook = options_.ddp_comm_hook();
    if (!hook.empty() && hook != "fp16_compress" && hook != "bf16_compress") {
      throw MisconfigurationError(str("ddp_comm_hook got \"", hook,
                                      "\", expected \"fp16_compress\" or \"bf16_compress\".",
                                      did_you_mean(hook, {"fp16_compress", "bf16_compress"})));
    }
    if (!(options_.bucket_cap_mb() > 0)) {
      throw MisconfigurationError(
          str("bucket_cap_mb got ", options_.bucket_cap_mb(), ", expected a size above 0 in MiB."));
    }
  }

  void setup(torch::nn::Module& module, const ConfigureOptimizers& configure_optimizers) override {
    drop_reducer();
    ParallelStrategy::setup(module, nullptr);
    verify_same_module(module);
    broadcast_module(module);
    if (!configure_optimizers) return;
    if (world() == nullptr) {
      configure_optimizers();
      return;
    }
    module_ = &module;
    make_reducer();
    for (const auto* optimizer : configure_optimizers()) check_optimizer(*optimizer, module);
  }

  // The forward half of what torch's wrapper does around a training step.
  Scope step_scope() override {
    if (reducer_ == nullptr || !at::GradMode::is_enabled()) return nullptr;
    if (flags_changed()) make_reducer();
    if (synchronizes_) reducer_->prepare_for_forward();
    reducer_->rebuild_buckets();
    if (buffers_are_behind_ && !buffers_.empty()) {
      broadcast_tensors(buffers_);
    }
    buffers_are_behind_ = synchronizes_;
    return nullptr;
  }

  void backward(const at::Tensor& loss,
                const std::function<void(const at::Tensor&)>& run_backward) override {
    if (reducer_ == nullptr) return run_backward(loss);
    // The first backward of a static graph reduces, even where gradients accumulate: what is added
    // to the mean later is averaged with it, which gives the same.
    const bool first_of_static = options_.static_graph() && !static_graph_begun_;
    static_graph_begun_ = true;
    const bool look = options_.find_unused_parameters() && !options_.static_graph();
    if (synchronizes_ || first_of_static) {
      reducer_->prepare_for_backward(look ? std::vector<at::Tensor>{loss}
                                          : std::vector<at::Tensor>{});
    }
    const auto start = first_of_static
                           ? ReduceAtEnd::apply(loss, reinterpret_cast<int64_t>(reducer_.get()))
                           : loss;
    if (synchronizes_ || first_of_static) {
      const Scope call = in_call("backward");
      wait_together("gradients", [&] { run_backward(start); });
    } else {
      run_backward(start);
    }
    if (synchronizes_) check_all_used();
  }

  Scope no_backward_sync(torch::nn::Module&) override {
    const bool before = std::exchange(synchronizes_, false);
    return scope_exit([this, before] { synchronizes_ = before; });
  }

  void teardown(torch::nn::Module* module,
                const std::vector<torch::optim::Optimizer*>& optimizers) override {
    drop_reducer();
    all_parameters_.clear();
    buffers_.clear();
    ParallelStrategy::teardown(module, optimizers);
  }

 private:
  // Whether parameters were frozen or unfrozen since the reducer was made, which knows only those
  // that were trained then.
  bool flags_changed() const {
    return std::any_of(all_parameters_.begin(), all_parameters_.end(),
                       [](const auto& one) { return one.first.requires_grad() != one.second; });
  }

  void make_reducer() {
    drop_reducer();
    const auto& module = *module_;
    all_parameters_.clear();
    parameters_.clear();
    names_.clear();
    std::unordered_set<const void*> seen;  // a parameter of two modules is there twice
    for (const auto& item : module.named_parameters()) {
      const auto& parameter = item.value();
      if (!seen.insert(parameter.unsafeGetTensorImpl()).second) continue;
      all_parameters_.emplace_back(parameter, parameter.requires_grad());
      if (!parameter.requires_grad()) continue;
      names_[parameters_.size()] = item.key();
      parameters_.push_back(parameter);
    }
    if (parameters_.empty()) {
      throw MisconfigurationError(
          "The strategy ddp got a model without a parameter that is trained. Give "
          "strategy=\"single_device\", or set requires_grad.");
    }
    buffers_.clear();
    if (options_.broadcast_buffers()) {
      for (const auto& buffer : module.buffers()) {
        if (buffer.defined()) buffers_.push_back(buffer.detach());
      }
    }
    buffers_are_behind_ = true;
    static_graph_begun_ = false;

    const auto cap = static_cast<int64_t>(options_.bucket_cap_mb() * kMiB);
    const bool one_at_first = options_.static_graph() || !options_.find_unused_parameters();
    const std::vector<size_t> limits =
        one_at_first ? std::vector<size_t>{std::numeric_limits<int>::max()}
                     : std::vector<size_t>{static_cast<size_t>(c10d::kDefaultFirstBucketBytes),
                                           static_cast<size_t>(cap)};
    const auto sparse = with_sparse_gradients(module, parameters_);
    for (size_t i = 0; i < sparse.size(); ++i) {
      if (sparse[i]) own_gradient(parameters_[i]);
    }
    auto buckets =
        std::get<0>(c10d::compute_bucket_assignment_by_size(parameters_, limits, sparse));
    std::reverse(buckets.begin(), buckets.end());  // gradients come from the end
    // Under this level the reducer's errors name parameters; it is read when one is made.
    const auto level = c10d::debug_level();
    if (level == c10d::DebugLevel::Off) c10d::setDebugLevel(c10d::DebugLevel::Info);
    reducer_ = std::make_shared<c10d::Reducer>(
        parameters_, std::move(buckets), world()->group(), sparse, cap,
        options_.find_unused_parameters(), options_.gradient_as_bucket_view(), names_,
        std::min<int64_t>(c10d::kDefaultFirstBucketBytes, cap),
        /*skip_all_reduce_unused_params=*/false, /*use_python_reducer=*/false,
        std::vector<int64_t>{});
    c10d::setDebugLevel(level);
    // It counts on one where the unused parameters are others than in the step before.
    logger_ = std::make_shared<c10d::Logger>(reducer_);
    reducer_->set_logger(logger_);
    if (options_.static_graph()) reducer_->set_static_graph();
    if (options_.ddp_comm_hook() == "fp16_compress") {
      reducer_->register_builtin_comm_hook(c10d::BuiltinCommHookType::FP16_COMPRESS);
    } else if (options_.ddp_comm_hook() == "bf16_compress") {
      reducer_->register_comm_hook(std::make_unique<BF16Compression>(world()->group()));
    }
  }

  // The values of a sparse gradient may be the gradient of another part of the graph, which the
  // reducer would divide with them.
  void own_gradient(const at::Tensor& parameter) {
    const auto hook = parameter.register_hook([](const at::Tensor& gradient) {
      return gradient.is_sparse() ? gradient.clone() : gradient;
    });
    hooks_.emplace_back(parameter, hook);
  }

  void drop_reducer() {
    for (const auto& [parameter, hook] : hooks_) parameter.remove_hook(hook);
    hooks_.clear();
    logger_.reset();
    reducer_.reset();
  }

  static void check_optimizer(const torch::optim::Optimizer& optimizer,
                              const torch::nn::Module& module) {
    std::unordered_set<const void*> own;
    for (const auto& parameter : module.parameters()) own.insert(parameter.unsafeGetTensorImpl());
    int64_t number = 0;
    for (const auto& group : optimizer.param_groups()) {
      for (const auto& parameter : group.params()) {
        if (own.count(parameter.unsafeGetTensorImpl()) == 0) {
          refuse_foreign_parameter(number, parameter,
                                   "the strategy ddp does not average its gradient");
        }
        ++number;
      }
    }
  }

  // The reducer finds out in the next step only; in the last one never.
  void check_all_used() {
    try {
      reducer_->check_finalized();
    } catch (const c10::Error& error) {
      const std::string text = error.what_without_backtrace();
      static const std::string sign = "did not receive grad for rank ";
      const auto found = text.find(sign);
      if (found == std::string::npos) throw;
      const auto begin = text.find(':', found) + 2;
      const auto told = ", " + text.substr(begin, text.find('\n', begin) - begin) + ",";
      std::vector<std::string> names;  // in the model's order
      for (size_t i = 0; i < parameters_.size(); ++i) {
        if (told.find(", " + names_[i] + ",") != std::string::npos) names.push_back(names_[i]);
      }
      throw MisconfigurationError(
          str("On rank ", global_rank(),
              " the loss does not depend on these trained parameters: ", lightning::join(names),
              ". The other ranks wait for their gradients. Use them in every "
              "training_step, freeze them with requires_grad_(false), or give "
              "strategy=\"ddp_find_unused_parameters_true\"."));
    }
  }

  DDPStrategyOptions options_;
  torch::nn::Module* module_ = nullptr;
  // Each with its requires_grad when the reducer was made.
  std::vector<std::pair<at::Tensor, bool>> all_parameters_;
  std::vector<at::Tensor> parameters_;  // those that are trained
  std::unordered_map<size_t, std::string> names_;
  std::vector<at::Tensor> buffers_;
  std::vector<std::pair<at::Tensor, unsigned>> hooks_;
  std::shared_ptr<c10d::Reducer> reducer_;
  std::shared_ptr<c10d::Logger> logger_;
  bool synchronizes_ = true;
  bool buffers_are_behind_ = true;
  bool static_graph_begun_ = false;
};

std::unique_ptr<Strategy> make(const DDPStrategyOptions& options) {
  return std::make_unique<DDPStrategy>(options);
}
std::unique_ptr<Strategy> make_finding_unused(DDPStrategyOptions options) {
  return make(options.find_unused_parameters(true));
}
std::unique_ptr<Strategy> make_not_finding_unused(DDPStrategyOptions options) {
  return make(options.find_unused_parameters(false));
}

constexpr const char* kHelp =
    "A replica of the model on each device; gradients are averaged while backward runs.";
constexpr const char* kUnusedHelp = "ddp, for steps that leave trained parameters out.";
constexpr const char* kNoUnusedHelp = "ddp, for steps that use all trained parameters.";
constexpr const char* kSpawnHelp = "ddp: a program has one way to start processes.";

const Registration<Strategy> kDDP{"ddp", kHelp,
                                  [](const DDPStrategyOptions& o) { return make(o); }};
const Registration<Strategy> kUnused{
    "ddp_find_unused_parameters_true", kUnusedHelp,
    [](const DDPStrategyOptions& o) { return make_finding_unused(o); }};
const Registration<Strategy> kNoUnused{
    "ddp_find_unused_parameters_false", kNoUnusedHelp,
    [](const DDPStrategyOptions& o) { return make_not_finding_unused(o); }};
const Registration<Strategy> kSpawn{"ddp_spawn", kSpawnHelp,
                                    [](const DDPStrategyOptions& o) { return make(o); }};
const Registration<Strategy> kSpawnUnused{
    "ddp_spawn_find_unused_parameters_true", kUnusedHelp,
    [](const DDPStrategyOptions& o) { return make_finding_unused(o); }};
const Registration<Strategy> kSpawnNoUnused{
    "ddp_spawn_find_unused_parameters_false", kNoUnusedHelp,
    [](const DDPStrategyOptions& o) { return make_not_finding_unused(o); }};

}  // namespace
}  // namespace lightning
