#include "strategies/shard_keeper.h"

#include <ATen/Functions.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/variable.h>

#include <algorithm>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>

#include "lightning/distributed/collective_wait.h"
#include "lightning/errors.h"
#include "lightning/param/left_behind.h"

namespace lightning {
namespace {

using Group = c10::intrusive_ptr<c10d::ProcessGroup>;

// The elements as they lie in memory, which is dense; complex ones as pairs, since Gloo knows no
// others.
at::Tensor flat(const at::Tensor& tensor) {
  const auto memory = tensor.is_complex() ? at::view_as_real(tensor) : tensor;
  return memory.as_strided({memory.numel()}, {1}, memory.storage_offset());
}

at::TensorOptions pinned(at::ScalarType dtype) {
  return at::TensorOptions().dtype(dtype).device(at::kCPU).pinned_memory(true);
}

// As the memory is, with other rows; pinned on the host of a GPU where that is asked for.
at::Tensor empty_rows(const at::Tensor& memory, int64_t rows, at::ScalarType dtype,
                      bool on_host = false) {
  const auto options = on_host && !memory.is_cpu() ? pinned(dtype) : memory.options().dtype(dtype);
  if (memory.dim() == 0) return at::empty({rows}, options);
  auto sizes = memory.sizes().vec();
  sizes[0] = rows;
  return at::empty_strided(sizes, memory.strides(), options);
}

bool lies_alike(const at::Tensor& a, const at::Tensor& b) {
  return a.sizes() == b.sizes() && a.strides() == b.strides();
}

// A coalesced collective takes tensors of one dtype.
using Tensors = std::vector<at::Tensor>;

std::vector<std::pair<Tensors, Tensors>> by_dtype(const Tensors& outputs, const Tensors& inputs) {
  std::vector<std::pair<Tensors, Tensors>> groups;
  for (size_t i = 0; i < inputs.size(); ++i) {
    if (inputs[i].numel() == 0) continue;
    auto group = std::find_if(groups.begin(), groups.end(), [&](const auto& one) {
      return one.second[0].scalar_type() == inputs[i].scalar_type();
    });
    if (group == groups.end()) group = groups.emplace(groups.end());
    group->first.push_back(outputs[i]);
    group->second.push_back(inputs[i]);
  }
  return groups;
}

void add_gradient(Shard& shard, const at::Tensor& mean) {
  auto& gradient = shard.slice.mutable_grad();
  if (gradient.defined()) {
    gradient.add_(mean);
  } else {
    gradient = mean;
  }
}

void wait_for(const std::vector<c10::intrusive_ptr<c10d::Work>>& works, const char* what) {
  if (works.empty()) return;
  wait_together(what, [&] {
    for (const auto& work : works) work->wait();
  });
}

// set_data() takes no data of another kind of device.
void move_to_meta(const at::Tensor& parameter, at::ScalarType dtype) {
  const auto empty =
      at::empty(parameter.sizes(), at::TensorOptions().dtype(dtype).device(at::kMeta));
  parameter.unsafeGetTensorImpl()->shallow_copy_from(empty.getIntrusivePtr());
  torch::autograd::impl::set_grad_accumulator(parameter, {});
}

// What replaces the memory has none of its own.
void end_on_meta(BackedParameter& backed, at::ScalarType dtype) {
  const auto parameter = backed.parameter();
  const auto options = at::TensorOptions().dtype(dtype).device(backed.memory().device());
  backed.restore(at::scalar_tensor(0, options).expand(parameter.sizes()));
  move_to_meta(parameter, dtype);
}

// With a parameter, for a keeper that adopts it. Does not keep the group alive, which belongs to
// the world.
struct LeftShard : LeftBehind {
  LeftShard(Shard its_shard, const Group& its_sharers)
      : shard(std::move(its_shard)), sharers(its_sharers) {}
  Shard shard;  // whose parameter has no backing any more
  c10::weak_intrusive_ptr<c10d::ProcessGroup> sharers;
};

// See ShardKeeper::collect.
//   like   the parameter or its memory, for its strides and device
at::Tensor collect_rows(const Shard& shard, const at::Tensor& like, const at::Tensor& rows,
                        const Group& sharers) {
  if (sharers == nullptr) return rows.detach();
  const int64_t parts = sharers->getSize();
  auto own = empty_rows(like, shard.rows_each, rows.scalar_type());
  own.narrow(0, 0, shard.rows).copy_(rows);
  if (shard.rows < shard.rows_each) own.narrow(0, shard.rows, shard.rows_each - shard.rows).zero_();
  std::vector<at::Tensor> input{flat(own)};
  std::vector<std::vector<at::Tensor>> outputs;
  at::Tensor all;
  if (sharers->getRank() == 0) {
    all = empty_rows(like, shard.rows_each * parts, rows.scalar_type());
    outputs.emplace_back();
    for (int64_t part = 0; part < parts; ++part) {
      outputs[0].push_back(flat(all).narrow(0, part * input[0].numel(), input[0].numel()));
    }
  }
  if (input[0].numel() > 0) {
    wait_together("gathering of a tensor", [&] { sharers->gather(outputs, input)->wait(); });
  }
  if (!all.defined()) return {};
  const auto count = shard.sizes.empty() ? 1 : shard.sizes[0];
  return all.narrow(0, 0, count)
      .to(at::kCPU, rows.scalar_type(), false, /*copy=*/true)
      .view(shard.sizes);
}

[[noreturn]] void refuse_sparse(const BackedParameter& parameter) {
  throw MisconfigurationError(
      str("Parameter \"", parameter.name(),
          "\" got a sparse gradient, which the strategy fsdp cannot reduce. Give the embedding "
          "sparse(false), or take strategy=\"ddp\"."));
}

bool is_nccl(const Group& group, const at::Device& device) {
  return device.is_cuda() && group->getBackendName() == "nccl";
}

}  // namespace

RowsOfPart rows_of_part(int64_t rows, int64_t part, int64_t parts) {
  const auto each = (rows + parts - 1) / parts;
  const auto first = std::min(part * each, rows);
  return {each, first, std::min(each, rows - first)};
}

at::Tensor Shard::rows_of(const at::Tensor& whole) const {
  return (whole.dim() == 0 ? whole.view({1}) : whole).narrow(0, first_row, rows);
}

ShardKeeper::ShardKeeper(ShardKeeperOptions options) : options_(std::move(options)) {
  if (options_.on_host && !options_.device.is_cpu()) {
    from_host_ = std::make_unique<SideStream>(options_.device);
    to_host_ = std::make_unique<SideStream>(options_.device);
  }
  if (options_.sharers == nullptr) return;
  parts_ = options_.sharers->getSize();
  part_ = options_.sharers->getRank();
}

ShardKeeper::~ShardKeeper() = default;

Shard* ShardKeeper::find(const at::Tensor& parameter) {
  const auto found = by_tensor_.find(parameter.unsafeGetTensorImpl());
  return found == by_tensor_.end() ? nullptr : found->second;
}

Shard& ShardKeeper::shard_of(const BackedParameter& parameter) {
  return *find(parameter.parameter());
}

bool ShardKeeper::is_in_place(const Shard& shard) const {
  const auto& memory = shard.parameter->memory();
  return parts_ == 1 && shard.padded.scalar_type() == memory.scalar_type() &&
         shard.padded.device() == memory.device();
}

std::string ShardKeeper::placement() const {
  if (parts_ > 1) return str("in ", parts_, " shards");
  return from_host_ == nullptr ? "kept by the strategy fsdp" : "kept on the host";
}

// ---- Set-up -------------------------------------------------------------------------------------

BackedOptions ShardKeeper::look(const std::string& name, const at::Tensor& parameter) {
  given_[name] = parameter.detach();
  BackedOptions look;
  look.device = options_.device;
  if (parameter.dim() >= 2 && parameter.is_floating_point()) look.dtype = options_.compute_dtype;
  if (parameter.dim() > 0)
    look.padded_rows = rows_of_part(parameter.size(0), part_, parts_).each * parts_;
  return look;
}

void ShardKeeper::take(Unit& unit) {
  const at::NoGradGuard no_grad;
  for (const auto& parameter : unit.parameters()) {
    make(*parameter, given_.at(parameter->name()));
    given_.erase(parameter->name());
  }
}

Shard ShardKeeper::part_of(const at::Tensor& whole) const {
  Shard shard;
  shard.sizes = whole.sizes().vec();
  const auto rows = rows_of_part(whole.dim() == 0 ? 1 : whole.size(0), part_, parts_);
  shard.rows_each = rows.each;
  shard.first_row = rows.first;
  shard.rows = rows.count;
  return shard;
}

at::Tensor ShardKeeper::own_rows(const Shard& shard, const at::Tensor& values) const {
  auto all = values.to(options_.device).contiguous();
  if (options_.everyone != nullptr && all.numel() > 0) {
    std::vector<at::Tensor> one{flat(all)};
    wait_together("a parameter's values", [&] { options_.everyone->broadcast(one)->wait(); });
  }
  return shard.rows_of(all);
}

void ShardKeeper::born(const at::Tensor& parameter, const at::Tensor& values) {
  const at::NoGradGuard no_grad;
  auto rows = own_rows(part_of(values), values);
  if (from_host_ != nullptr) {
    rows = rows.to(at::kCPU);
  } else if (parts_ > 1) {
    rows = rows.clone();
  }
  born_[parameter.unsafeGetTensorImpl()] = rows;
}

bool ShardKeeper::is_born(const at::Tensor& parameter) const {
  return born_.count(parameter.unsafeGetTensorImpl()) > 0;
}

// One after another: no rank has more than one whole, beside its shards of the others.
void ShardKeeper::hand_over(ShardKeeper& to) {
  const at::NoGradGuard no_grad;
  by_tensor_.clear();
  for (auto& shard : shards_) {
    auto& backed = *shard->parameter;
    to.collect_born(backed.parameter(), *shard, options_.sharers);
    end_on_meta(backed, shard->slice.scalar_type());
    shard.reset();
  }
  shards_.clear();
}

void ShardKeeper::collect_born(const at::Tensor& parameter, const Shard& shard,
                               const Group& sharers) {
  const auto rows = shard.slice.detach();
  auto values = collect_rows(shard, parameter, rows, sharers);
  if (!values.defined()) values = at::empty(shard.sizes, rows.options().device(at::kCPU));
  born(parameter, values.view(shard.sizes));
}

void ShardKeeper::leave(const Shard& shard) const {
  Shard left = shard;
  left.parameter = nullptr;
  left.slice = shard.slice.detach();
  left.padded = left.sum = at::Tensor();
  leave_behind(shard.parameter->parameter(),
               std::make_shared<LeftShard>(std::move(left), options_.sharers));
}

void ShardKeeper::adopt(const at::Tensor& parameter) {
  const auto left = std::dynamic_pointer_cast<LeftShard>(left_behind(parameter));
  if (left == nullptr) return;
  const at::NoGradGuard no_grad;
  const auto sharers = left->sharers.lock();
  if (sharers == nullptr) {
    throw MisconfigurationError(
        "The model is in shards, and the ranks that hold the others have ended: it cannot be used "
        "any more. Load its checkpoint into a new module.");
  }
  collect_born(parameter, left->shard, sharers);
  move_to_meta(parameter, left->shard.slice.scalar_type());
}

void ShardKeeper::make(BackedParameter& parameter, const at::Tensor& values) {
  const auto& memory = parameter.memory();
  auto shard = std::make_unique<Shard>(part_of(values));
  shard->parameter = &parameter;
  const bool in_place =
      parts_ == 1 && values.scalar_type() == memory.scalar_type() && from_host_ == nullptr;
  if (in_place && values.is_meta()) parameter.allocate();
  shard->padded =
      in_place ? memory.detach()
               : empty_rows(memory, shard->rows_each, values.scalar_type(), options_.on_host);
  if (parts_ == 1 && memory.dim() == 0) shard->padded = shard->padded.view(at::IntArrayRef());
  if (shard->rows < shard->rows_each) shard->padded.zero_();
  shard->slice = shard->padded.detach();
  if (shard->slice.dim() > 0) shard->slice = shard->slice.narrow(0, 0, shard->rows);
  const auto* const impl = parameter.parameter().unsafeGetTensorImpl();
  shard->slice.copy_(
      (values.is_meta() ? born_.at(impl) : own_rows(*shard, values)).view(shard->slice.sizes()));
  born_.erase(impl);
  shard->is_trained = parameter.parameter().requires_grad();
  shard->slice.set_requires_grad(shard->is_trained);
  by_tensor_[impl] = shard.get();
  by_tensor_[shard->slice.unsafeGetTensorImpl()] = shard.get();
  shards_.push_back(std::move(shard));
}

// What was not written is left as it is: it may have lost digits on its way to the module.
void ShardKeeper::write_back(Unit& unit) {
  const at::NoGradGuard no_grad;
  for (const auto& parameter : unit.parameters()) {
    auto& shard = shard_of(*parameter);
    if (is_in_place(shard)) continue;
    const auto& memory = parameter->memory();
    const auto written =
        memory.dim() == 0 && shard.slice.dim() == 0 ? memory : shard.rows_of(memory);
    auto slice = shard.slice.detach();
    const auto values = slice.to(written.device());
    const auto before = values.to(written.scalar_type());
    slice.copy_(at::where(written == before, values, written.to(values.scalar_type())));
  }
}

void ShardKeeper::restore() {
  for (const auto& shard : shards_) {
    if (parts_ > 1) {
      leave(*shard);
      continue;
    }
    const auto values = shard->slice.detach().to(
        shard->slice.options().device(options_.device).pinned_memory(false),
        /*non_blocking=*/false, /*copy=*/true);
    shard->parameter->restore(values.view(shard->sizes));
  }
}

// ---- Whole --------------------------------------------------------------------------------------

// The rows of this rank on the device, as they are gathered.
at::Tensor ShardKeeper::fetch(const Shard& shard) const {
  const auto rows = flat(shard.padded).to(options_.device, /*non_blocking=*/true);
  const auto dtype = c10::toRealValueType(shard.parameter->memory().scalar_type());
  return parts_ == 1 ? rows : rows.to(dtype);
}

void ShardKeeper::gather(Unit& unit) {
  const at::NoGradGuard no_grad;
  std::vector<Shard*> shards;
  for (const auto& parameter : unit.parameters()) {
    auto& shard = shard_of(*parameter);
    if (is_in_place(shard)) continue;
    parameter->allocate();
    if (parameter->memory().numel() > 0) shards.push_back(&shard);
  }
  Gathering gathering;
  std::vector<at::Tensor> outputs;
  for (const auto* const shard : shards) {
    const auto& memory = shard->parameter->memory();
    if (parts_ == 1 || memory.dim() > 0) {
      outputs.push_back(flat(memory));
    } else {
      const auto all = at::empty({parts_}, memory.options());
      outputs.push_back(flat(all));
      gathering.copies.emplace_back(memory, all[0]);
    }
  }
  // Who used the memory before must be through with it.
  std::optional<c10::Event> allocated;
  if (from_host_ != nullptr) allocated = from_host_->mark_current();
  const Scope beside = from_host_ == nullptr ? nullptr : from_host_->use();
  for (const auto* const shard : shards) gathering.inputs.push_back(fetch(*shard));
  if (allocated) from_host_->wait_for(*allocated);
  if (parts_ == 1) {
    for (size_t i = 0; i < outputs.size(); ++i) outputs[i].copy_(gathering.inputs[i]);
  } else {
    for (auto& [to, from] : by_dtype(outputs, gathering.inputs)) {
      gathering.works.push_back(options_.sharers->allgather_into_tensor_coalesced(to, from));
    }
  }
  if (from_host_ != nullptr) gathering.fetched = from_host_->mark();
  gatherings_[unit.index()] = std::move(gathering);
}

void ShardKeeper::wait(Unit& unit) {
  const auto found = gatherings_.find(unit.index());
  if (found == gatherings_.end()) return;
  const at::NoGradGuard no_grad;
  const auto& gathering = found->second;
  wait_for(gathering.works, "gathering of parameters");
  if (gathering.fetched) {
    from_host_->current_waits_for(*gathering.fetched);
    const Scope beside = from_host_->use();  // whose memory the inputs are
    wait_for(gathering.works, "gathering of parameters");
  }
  for (const auto& [to, from] : gathering.copies) to.copy_(from);
  gatherings_.erase(found);
}

void ShardKeeper::wait_for_reads() const {
  if (from_host_ != nullptr) from_host_->mark().synchronize();
}

void ShardKeeper::release(Unit& unit) {
  for (const auto& parameter : unit.parameters()) {
    if (!is_in_place(shard_of(*parameter))) parameter->release();
  }
}

// ---- Gradients ----------------------------------------------------------------------------------

void ShardKeeper::follow_flags() {
  for (const auto& shard : shards_) {
    const bool is_trained = shard->parameter->parameter().requires_grad();
    if (is_trained == shard->is_trained) continue;
    shard->is_trained = is_trained;
    shard->slice.set_requires_grad(is_trained);
  }
}

void ShardKeeper::reduce(Unit&, const std::vector<BackedParameter*>& arrived) {
  const at::NoGradGuard no_grad;
  std::vector<std::pair<Shard*, at::Tensor>> gradients;
  for (auto* const parameter : arrived) {
    auto& shard = shard_of(*parameter);
    auto gradient = parameter->take_gradient().resolve_conj();
    const bool is_shared = parts_ > 1 || options_.replicas != nullptr;
    if (is_shared && gradient.is_sparse()) refuse_sparse(*parameter);
    if (shard.is_trained && !shard.slice.requires_grad()) continue;
    if (shard.sum.defined()) {
      gradient = shard.sum.add_(gradient);
    } else if (!synchronizes_) {
      gradient = gradient.to(shard.padded.scalar_type());
    }
    shard.sum = synchronizes_ ? at::Tensor() : gradient;
    if (synchronizes_) gradients.emplace_back(&shard, gradient);
  }
  if (!gradients.empty()) start_reduction(gradients);
}

// What the last backward of a window did not use was summed in those before it.
void ShardKeeper::backward_end() {
  const at::NoGradGuard no_grad;
  if (!synchronizes_) return;
  std::vector<std::pair<Shard*, at::Tensor>> left;
  for (const auto& shard : shards_) {
    if (!shard->sum.defined()) continue;
    left.emplace_back(shard.get(), std::exchange(shard->sum, at::Tensor()));
  }
  if (!left.empty()) start_reduction(left);
  finish_reduction();
  land();
}

// All ranks' rows one after the other, as they lie in the gathered parameter.
at::Tensor ShardKeeper::reduce_input(const Shard& shard, const at::Tensor& gradient) const {
  const auto& memory = shard.parameter->memory();
  if (parts_ == 1) return gradient.contiguous();
  if (memory.dim() > 0 && lies_alike(gradient, memory)) return flat(gradient);
  auto input = empty_rows(memory, shard.rows_each * parts_, gradient.scalar_type());
  const auto rows = gradient.dim() == 0 ? 1 : gradient.size(0);
  input.narrow(0, 0, rows).copy_(gradient);
  input.narrow(0, rows, input.size(0) - rows).zero_();
  return flat(input);
}

void ShardKeeper::start_reduction(const std::vector<std::pair<Shard*, at::Tensor>>& gradients) {
  finish_reduction();
  for (const auto& [shard, gradient] : gradients) {
    reduction_.shards.push_back(shard);
    reduction_.inputs.push_back(reduce_input(*shard, gradient));
    if (parts_ > 1) {
      reduction_.outputs.push_back(
          empty_rows(shard->parameter->memory(), shard->rows_each, gradient.scalar_type()));
    } else {
      reduction_.outputs.push_back(reduction_.inputs.back());
    }
  }
  start_collectives();
  if (to_host_ != nullptr) reduction_.launched = to_host_->mark_current();
}

void ShardKeeper::start_collectives() {
  Tensors outputs;
  for (const auto& output : reduction_.outputs) outputs.push_back(flat(output));
  if (parts_ > 1) {
    c10d::ReduceScatterOptions options;
    options.reduceOp =
        is_nccl(options_.sharers, options_.device) ? c10d::ReduceOp::AVG : c10d::ReduceOp::SUM;
    for (auto& [to, from] : by_dtype(outputs, reduction_.inputs)) {
      reduction_.works.push_back(
          options_.sharers->reduce_scatter_tensor_coalesced(to, from, options));
    }
  }
  if (options_.replicas == nullptr) return;
  wait_for(reduction_.works, "reduction of gradients");
  reduction_.works.clear();
  c10d::AllreduceCoalescedOptions options;
  options.reduceOp =
      is_nccl(options_.replicas, options_.device) ? c10d::ReduceOp::AVG : c10d::ReduceOp::SUM;
  for (auto& [tensors, same] : by_dtype(outputs, outputs)) {
    reduction_.works.push_back(options_.replicas->allreduce_coalesced(tensors, options));
  }
}

at::Tensor ShardKeeper::mean_of(const Reduction& reduction, size_t index) const {
  int64_t ranks = 1;  // over which backends have summed
  for (const auto& group : {options_.sharers, options_.replicas}) {
    if (group != nullptr && !is_nccl(group, options_.device)) ranks *= group->getSize();
  }
  const auto& slice = reduction.shards[index]->slice;
  auto mean = reduction.outputs[index];
  if (ranks > 1) mean.div_(ranks);
  if (slice.dim() > 0) mean = mean.narrow(0, 0, slice.size(0));
  return mean.to(slice.scalar_type());
}

void ShardKeeper::finish_reduction() {
  auto done = std::exchange(reduction_, Reduction());
  if (to_host_ != nullptr) return bring(std::move(done));
  wait_for(done.works, "reduction of gradients");
  for (size_t i = 0; i < done.shards.size(); ++i) add_gradient(*done.shards[i], mean_of(done, i));
}

void ShardKeeper::bring(Reduction reduction) {
  land();
  if (reduction.shards.empty()) return;
  const Scope beside = to_host_->use();
  to_host_->wait_for(*reduction.launched);
  wait_for(reduction.works, "reduction of gradients");
  for (size_t i = 0; i < reduction.shards.size(); ++i) {
    landing_.means.push_back(mean_of(reduction, i));
    const auto& mean = landing_.means.back();
    auto gradient = at::empty_strided(mean.sizes(), mean.strides(), pinned(mean.scalar_type()));
    gradient.copy_(mean, /*non_blocking=*/true);
    landing_.gradients.emplace_back(reduction.shards[i], gradient);
  }
  landing_.reduction = std::move(reduction);
  landing_.landed = to_host_->mark();
}

void ShardKeeper::land() {
  const auto there = std::exchange(landing_, Landing());
  if (there.landed) there.landed->synchronize();
  for (const auto& [shard, gradient] : there.gradients) add_gradient(*shard, gradient);
}

// ---- For the strategy ---------------------------------------------------------------------------

bool ShardKeeper::writes() const {
  return options_.replicas == nullptr || options_.replicas->getRank() == 0;
}

at::Tensor ShardKeeper::sum_over_sharers(const at::Tensor& value) const {
  if (parts_ == 1) return value;
  std::vector<at::Tensor> one{
      value.to(options_.device, value.scalar_type(), /*non_blocking=*/false, /*copy=*/true)};
  wait_together("a sum over shards", [&] { options_.sharers->allreduce(one)->wait(); });
  return one[0].to(value.device());
}

at::Tensor ShardKeeper::collect(const Shard& shard, const at::Tensor& rows) const {
  const at::NoGradGuard no_grad;
  return collect_rows(shard, shard.parameter->memory(), rows, options_.sharers);
}

}  // namespace lightning
