#include "strategies/fsdp.h"

#include <ATen/core/grad_mode.h>
#include <torch/nn/module.h>
#include <torch/optim/optimizer.h>

#include <algorithm>
#include <chrono>
#include <optional>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>
#include <unordered_set>
#include <utility>

#include "lightning/checkpoint/async_io.h"
#include "lightning/checkpoint/checkpoint_file.h"
#include "lightning/checkpoint/checkpoint_search.h"
#include "lightning/distributed/side_channel.h"
#include "lightning/distributed/whereabouts.h"
#include "lightning/errors.h"
#include "lightning/log.h"
#include "lightning/param/activation_checkpoint.h"
#include "lightning/param/deferred_init.h"
#include "lightning/param/unit_plan.h"
#include "lightning/param/units.h"
#include "lightning/registry.h"
#include "strategies/parallel.h"
#include "strategies/shard_keeper.h"
#include "strategies/shard_state.h"
#include "strategies/sharded_checkpoint.h"

namespace lightning {
namespace {

class FSDPStrategy : public ParallelStrategy {
 public:
  // Errors: MisconfigurationError for a sharding strategy that is not known, a timeout that is no
  // time.
  explicit FSDPStrategy(const FSDPStrategyOptions& options)
      : ParallelStrategy(options.process_group_backend(), options.timeout(),
                         "FSDPStrategy.timeout"),
        options_(options) {
    check("sharding_strategy", options_.sharding_strategy(),
          {"FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD", "HYBRID_SHARD"});
    check("state_dict_type", options_.state_dict_type(), {"full", "sharded"});
    check("checkpoint_layout", options_.checkpoint_layout(), {"fsdp", "model_parallel"});
    if (is_hybrid() == options_.device_mesh().empty()) {
      throw MisconfigurationError(
          str("FSDPStrategy got sharding_strategy=\"", options_.sharding_strategy(), "\" ",
              is_hybrid() ? "without" : "and",
              " a device_mesh. A mesh says in how many groups of "
              "how many ranks HYBRID_SHARD keeps the model, as {2, 8}; the others take none."));
    }
    all().push_back(this);  // last: one that throws is none
  }

  // Errors: MisconfigurationError for a mesh that is not one of these processes.
  void connect_processes(std::shared_ptr<ClusterEnvironment> environment,
                         int64_t num_nodes) override {
    ParallelStrategy::connect_processes(std::move(environment), num_nodes);
    if (!is_hybrid()) return;
    const auto& mesh = options_.device_mesh();
    const bool fits =
        mesh.size() == 2 && mesh[0] > 0 && mesh[1] > 0 && mesh[0] * mesh[1] == world_size();
    if (fits) return;
    throw MisconfigurationError(str("FSDPStrategy got device_mesh=", c10::IntArrayRef(mesh),
                                    " with ", world_size(),
                                    " processes. Give two sizes whose product is their number: "
                                    "that of groups, and that of ranks in each."));
  }

  ~FSDPStrategy() override {
    forget_module();
    all().erase(std::find(all().begin(), all().end(), this));
  }

  // What is constructed in it has no memory until setup(); or it is whole, on the host.
  Scope module_init_context(std::optional<bool> empty_init) override {
    const bool is_empty = empty_init.value_or(true);
    auto modules = ParallelStrategy::module_init_context(is_empty);
    return is_empty ? modules : both(default_device_scope(at::kCPU), modules);
  }

  void setup(torch::nn::Module& module, const ConfigureOptimizers& configure_optimizers) override {
    if (saves_shards() && !can_look_into(checkpoint_io())) {
      throw MisconfigurationError(
          "The strategy fsdp got state_dict_type=\"sharded\" and a CheckpointIO plugin of another "
          "format, which saves what one process has. Leave the plugin out, give AsyncCheckpointIO, "
          "or state_dict_type=\"full\".");
    }
    if (!has(module)) shard(module);
    runs_ = true;
    for (const auto& shard : shards_->all()) shard->slice.mutable_grad() = at::Tensor();
    if (!configure_optimizers) return;
    for (auto* const optimizer : configure_optimizers()) give_slices(*optimizer, *shards_);
  }
  bool restore_checkpoint_after_setup() const override { return true; }
  bool supports_inference_mode() const override { return false; }

  // ---- The step ---------------------------------------------------------------------------------

  Scope step_scope() override {
    if (units_ == nullptr) return nullptr;
    const bool training = at::GradMode::is_enabled();
    shards_->follow_flags();
    auto use = units_->use(/*backward_follows=*/training);
    if (!training || checkpoints_ == nullptr) return use;
    return both(checkpoints_->use(), use);
  }

  at::Tensor optimizer_step(const OptimizerStep& step) override {
    give_slices(step.optimizer, *shards_);  // a callback may have added parameters
    auto own = step;
    if (shards_->parts() > 1) own.sharers = this;
    own.after_closure = [&] {
      step.after_closure();
      shards_->wait_for_reads();
    };
    auto loss = ParallelStrategy::optimizer_step(own);
    units_->changed();
    return loss;
  }

  Scope no_backward_sync(torch::nn::Module&) override {
    if (shards_ == nullptr) return nullptr;
    const bool before = shards_->synchronizes();
    shards_->set_synchronizes(false);
    return scope_exit([this, before] { shards_->set_synchronizes(before); });
  }

  at::Tensor gradient_norm(torch::optim::Optimizer& optimizer) override {
    const auto own = ParallelStrategy::gradient_norm(optimizer);
    if (shards_ == nullptr || shards_->parts() == 1) return own;
    const at::NoGradGuard no_grad;
    const auto dtype = own.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
    return shards_->sum_over_sharers(own.to(dtype).square()).sqrt();
  }

  void on_step_end() override {
    if (units_ != nullptr) units_->release_all();  // a step without backward kept some
  }

  Scope whole(bool write) {
    const Scope call = in_call("whole_parameters");
    return units_ == nullptr ? nullptr : units_->whole(write);
  }

  // ---- Checkpoints ------------------------------------------------------------------------------

  State model_state(const torch::nn::Module& module) override {
    if (handed_over_) {
      throw CheckpointError(
          "The model of this Trainer was taken over by another Trainer of the strategy fsdp, which "
          "has its shards now. Save with that Trainer, or before it takes the model.");
    }
    if (shards_ == nullptr) return ParallelStrategy::model_state(module);
    check_all_there();
    return model_state_of(module, *shards_, kind(), is_global_zero());
  }
  void load_model_state(torch::nn::Module& module, const State& state, bool strict) override {
    if (shards_ == nullptr) return ParallelStrategy::load_model_state(module, state, strict);
    shards_->wait_for_reads();
    load_model_state_of(module, *shards_, state, strict);
    units_->changed();
  }
  State optimizer_state(torch::optim::Optimizer& optimizer,
                        const torch::nn::Module& module) override {
    if (shards_ == nullptr) return ParallelStrategy::optimizer_state(optimizer, module);
    check_all_there();
    return optimizer_state_of(optimizer, *shards_, kind(), is_global_zero());
  }
  void load_optimizer_state(torch::optim::Optimizer& optimizer, const torch::nn::Module& module,
                            const State& state) override {
    if (shards_ == nullptr) {
      return ParallelStrategy::load_optimizer_state(optimizer, module, state);
    }
    load_optimizer_state_of(optimizer, *shards_, state);
  }
  // Lightning's ModelParallelStrategy calls it as a single device does, its FSDPStrategy does not.
  std::string precision_key() const override {
    const auto key = ParallelStrategy::precision_key();
    const bool is_renamed = key == "MixedPrecision" && options_.checkpoint_layout() == "fsdp";
    return is_renamed ? kFSDPPrecisionKey : key;
  }

  void save_checkpoint(const State& checkpoint, const std::string& path) override {
    if (!saves_shards()) return ParallelStrategy::save_checkpoint(checkpoint, path);
    const auto plan = [&](State state) {
      const bool is_fsdp = options_.checkpoint_layout() == "fsdp";
      return plan_sharded_save(std::move(state), path, is_fsdp ? "model" : "state_dict", *this,
                               side_channel());
    };
    auto* const background = background_io();
    if (background == nullptr) return plan(checkpoint)();
    background->save_together(checkpoint, path, plan);
  }
  State load_checkpoint(const std::string& path) override {
    if (auto* const background = background_io()) background->wait();
    if (!can_look_into(checkpoint_io())) return ParallelStrategy::load_checkpoint(path);
    const auto format = detect_format(path);
    if (format == CheckpointFormat::kSharded) return load_sharded_checkpoint(path, shard_place());
    if (format == CheckpointFormat::kTorch) return load_file_in_shares(path, *this);
    return ParallelStrategy::load_checkpoint(path);
  }

  // The module stays in shards: a run that follows goes on with them.
  void teardown(torch::nn::Module*, const std::vector<torch::optim::Optimizer*>&) override {
    if (units_ != nullptr) units_->release_all();
    runs_ = false;
    ParallelStrategy::teardown(nullptr, {});
  }

 private:
  static void check(const char* option, const std::string& given,
                    const std::vector<std::string>& known) {
    if (std::find(known.begin(), known.end(), given) != known.end()) return;
    throw MisconfigurationError(str("FSDPStrategy got ", option, "=\"", given,
                                    "\", expected one of ", lightning::join(known), ".",
                                    did_you_mean(given, known)));
  }

  bool has(const torch::nn::Module& module) const {
    if (module_ != &module) return false;
    for (const auto& parameter : module.parameters()) {
      if (shards_->find(parameter) == nullptr) return false;
    }
    return true;
  }

  ShardPlace shard_place() const {
    if (options_.sharding_strategy() == "NO_SHARD") return {};
    const auto parts = is_hybrid() ? options_.device_mesh()[1] : world_size();
    return {global_rank() % parts, parts};
  }

  AsyncCheckpointIO* background_io() const {
    return dynamic_cast<AsyncCheckpointIO*>(&checkpoint_io());
  }

  SideChannel& side_channel() {
    if (!channel_ && world() != nullptr) channel_ = world()->side_channel("checkpoints");
    if (!channel_) channel_.emplace();
    return *channel_;
  }

  bool saves_shards() const { return options_.state_dict_type() == "sharded"; }
  StateKind kind() const { return saves_shards() ? StateKind::kSharded : StateKind::kFull; }

  void shard(torch::nn::Module& module) {
    forget_module();
    auto keeper = make_keeper();
    take_over(module, *keeper);
    convert(module);
    const auto plan = plan_units(module, options_.auto_wrap_policy());
    tell_of_policy(plan);
    verify_same_module(module);
    shards_ = keeper.get();
    materialize_shards(module);
    move_buffers(module);
    UnitsOptions when;
    when.release_after_forward = options_.sharding_strategy() != "SHARD_GRAD_OP";
    module_ = &module;
    units_ = std::make_unique<Units>(plan, std::move(keeper), when);
    const auto& recomputed = options_.activation_checkpointing_policy();
    if (!recomputed.empty()) {
      checkpoints_ = std::make_unique<ActivationCheckpoints>(module, recomputed);
    }
  }

  void tell_of_policy(const std::vector<UnitPlan>& plan) const {
    const auto& policy = options_.auto_wrap_policy();
    if (policy.empty()) return;
    std::vector<std::string> tied;
    for (const auto& unit : plan) {
      for (const auto& one : unit.parameters) {
        if (one.tied_to.empty()) continue;
        tied.push_back(str("\"", one.name, "\" (used in \"", one.tied_to, "\" too)"));
      }
    }
    if (!tied.empty()) {
      warn(str("auto_wrap_policy names ", join(policy),
               ", but tied weights belong to the unit around all modules that use them, and are "
               "gathered with it: ",
               join(tied),
               ". Leave such modules out of the policy, or name one around all of them."));
    } else if (plan.size() < 2) {
      warn(str("auto_wrap_policy names ", join(policy),
               ", modules without parameters of their own, so the whole model is gathered at once. "
               "Name the types of its blocks, or none for those that repeat."));
    }
  }

  std::unique_ptr<ShardKeeper> make_keeper() {
    ShardKeeperOptions options;
    options.device = root_device();
    options.on_host = options_.cpu_offload();
    if (precision().compute_dtype() != precision().parameter_dtype()) {
      options.compute_dtype = precision().compute_dtype();
    }
    make_groups(options);
    return std::make_unique<ShardKeeper>(std::move(options));
  }

  // Of a model that another Trainer has in shards, or has left so.
  // Errors: MisconfigurationError where that one's run has not ended.
  void take_over(const torch::nn::Module& module, ShardKeeper& keeper) {
    for (auto* const other : all()) {
      if (other == this || !other->holds_of(module)) continue;
      if (other->runs_) {
        throw MisconfigurationError(
            str("The model is ", other->shards_->placement(),
                " of another Trainer (strategy fsdp), whose run has not ended. Give a Trainer a "
                "model after the other's fit has returned, or a model of its own."));
      }
      other->hand_over(keeper);
    }
    for (const auto& parameter : module.parameters()) keeper.adopt(parameter);
  }

  bool holds_of(const torch::nn::Module& module) const {
    if (shards_ == nullptr) return false;
    const auto parameters = module.parameters();
    return std::any_of(parameters.begin(), parameters.end(), [&](const at::Tensor& parameter) {
      return shards_->find(parameter) != nullptr;
    });
  }

  void hand_over(ShardKeeper& to) {
    checkpoints_.reset();
    units_->release_all();
    shards_->wait_for_reads();
    shards_->hand_over(to);
    units_.reset();
    shards_ = nullptr;
    module_ = nullptr;
    handed_over_ = true;
  }

  // Errors: CheckpointError where other ranks have gone with their shards.
  void check_all_there() const {
    if (shards_->parts() == 1 || world() != nullptr) return;
    throw CheckpointError(
        str("The model is in ", shards_->parts(),
            " shards, and the ranks that hold the others have ended: it cannot be saved any more. "
            "Resume from the last checkpoint that was saved before."));
  }

  bool is_hybrid() const { return options_.sharding_strategy() == "HYBRID_SHARD"; }

  void make_groups(ShardKeeperOptions& options) {
    if (world() == nullptr) return;
    options.everyone = world()->group();
    if (!is_hybrid()) {
      const bool shares = options_.sharding_strategy() != "NO_SHARD";
      (shares ? options.sharers : options.replicas) = options.everyone;
      return;
    }
    const auto groups = options_.device_mesh()[0], size = options_.device_mesh()[1];
    const auto own = global_rank() / size, place = global_rank() % size;
    std::vector<int> sharers, replicas;
    for (int64_t i = 0; i < size; ++i) sharers.push_back(static_cast<int>(own * size + i));
    for (int64_t i = 0; i < groups; ++i) replicas.push_back(static_cast<int>(i * size + place));
    if (size > 1) options.sharers = world()->subgroup(sharers);
    if (groups > 1) options.replicas = world()->subgroup(replicas);
  }

  void convert(torch::nn::Module& module) {
    const Scope record = deferred_init() == nullptr ? nullptr : record_construction();
    precision().convert_module(module);
  }

  // Of a model that was born empty: parameter after parameter, of which this rank keeps its rows.
  void materialize_shards(torch::nn::Module& module) {
    std::unordered_set<const void*> buffers;
    std::vector<at::Tensor> tensors;
    const auto add = [&](const std::string& name, const at::Tensor& tensor) {
      if (!tensor.defined() || !tensor.is_meta() || shards_->is_born(tensor)) return false;
      if (deferred_init() == nullptr || !deferred_init()->is_deferred(tensor)) {
        throw MisconfigurationError(
            str("\"", name,
                "\" is on the meta device, where it has no values. Construct the model on the CPU, "
                "or in configure_model, which makes no memory until it is in shards."));
      }
      tensors.push_back(tensor);
      return true;
    };
    for (const auto& item : module.named_parameters()) add(item.key(), item.value());
    for (const auto& item : module.named_buffers()) {
      if (add(item.key(), item.value())) buffers.insert(item.value().unsafeGetTensorImpl());
    }
    if (tensors.empty()) return;
    deferred_init()->materialize(tensors, [&](const at::Tensor& tensor, const at::Tensor& values) {
      if (buffers.count(tensor.unsafeGetTensorImpl()) == 0) return shards_->born(tensor, values);
      tensor.unsafeGetTensorImpl()->shallow_copy_from(values.getIntrusivePtr());
    });
    end_construction();
  }

  void move_buffers(torch::nn::Module& module) {
    const at::NoGradGuard no_grad;
    std::vector<at::Tensor> buffers;
    for (auto& buffer : module.buffers()) {
      if (!buffer.defined()) continue;
      if (buffer.device() != root_device()) buffer.set_data(buffer.to(root_device()));
      buffers.push_back(buffer.detach());
    }
    broadcast_tensors(buffers);
  }

  void forget_module() {
    checkpoints_.reset();
    if (shards_ != nullptr) shards_->restore();
    units_.reset();
    shards_ = nullptr;
    module_ = nullptr;
    handed_over_ = false;
  }

  // Of this process.
  static std::vector<FSDPStrategy*>& all() {
    static auto* const strategies = new std::vector<FSDPStrategy*>;
    return *strategies;
  }

  FSDPStrategyOptions options_;
  bool runs_ = false;                          // from setup() to teardown()
  bool handed_over_ = false;                   // to another Trainer's strategy
  const torch::nn::Module* module_ = nullptr;  // whose parameters are in units_
  std::unique_ptr<Units> units_;
  ShardKeeper* shards_ = nullptr;  // units_' keeper
  std::unique_ptr<ActivationCheckpoints> checkpoints_;
  std::optional<SideChannel> channel_;  // of saves
};

std::unique_ptr<Strategy> make(const FSDPStrategyOptions& options) {
  return std::make_unique<FSDPStrategy>(options);
}
std::unique_ptr<Strategy> make_offloading(FSDPStrategyOptions options) {
  return make(options.cpu_offload(true));
}

const Registration<Strategy> kFSDP{
    "fsdp", "The model in shards; parameters are gathered while they are used.",
    [](const FSDPStrategyOptions& options) { return make(options); }};
const Registration<Strategy> kOffload{
    "fsdp_cpu_offload", "fsdp, with the shards and the optimizer in host memory.",
    [](const FSDPStrategyOptions& options) { return make_offloading(options); }};

}  // namespace

Scope whole_parameters(Strategy& strategy, bool write) {
  auto* const fsdp = dynamic_cast<FSDPStrategy*>(&strategy);
  return fsdp == nullptr ? nullptr : fsdp->whole(write);
}

}  // namespace lightning
