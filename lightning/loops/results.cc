#include "lightning/loops/results.h"

#include <ATen/Functions.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <cmath>
#include <utility>

#include "lightning/distributed/whereabouts.h"
#include "lightning/errors.h"
#include "lightning/log.h"

namespace lightning {
namespace {

// The value as a float32 holds it, unless it is kept in float64.
double rounded(double value, at::ScalarType dtype) {
  return dtype == at::kDouble ? value : static_cast<double>(static_cast<float>(value));
}

at::ScalarType default_dtype() {
  const auto dtype = c10::typeMetaToScalarType(at::get_default_dtype());
  return dtype == at::kDouble ? at::kDouble : at::kFloat;
}

// A value that a step logged, as it is kept: host scalars as numbers, device ones as tensors.
Scalar kept(const std::string& name, const LogValue& value, bool enable_graph) {
  if (const double* number = value.number()) {
    return Scalar(rounded(*number, default_dtype()), default_dtype());
  }
  at::Tensor tensor = *value.tensor();
  if (!tensor.defined() || tensor.numel() != 1) {
    throw MisconfigurationError(str(
        "log(\"", name, "\") got ",
        tensor.defined() ? str("a tensor of shape ", tensor.sizes())
                         : std::string("an undefined tensor"),
        ", expected a number or a tensor of one element. Reduce it first, for example .mean()."));
  }
  const auto dtype = tensor.scalar_type() == at::kDouble  ? at::kDouble
                     : tensor.scalar_type() == at::kFloat ? at::kFloat
                                                          : default_dtype();
  if (tensor.is_cpu() && !enable_graph) {
    const auto number = tensor.scalar_type() == at::kFloat ? *tensor.const_data_ptr<float>()
                                                           : tensor.item().toDouble();
    return Scalar(rounded(number, dtype), dtype);
  }
  if (!enable_graph) tensor = tensor.detach();
  // A copy: the step may go on to change the tensor in place.
  return Scalar(tensor.scalar_type() == dtype ? tensor.clone().reshape({})
                                              : tensor.to(dtype).reshape({}));
}

const std::string* reduction_name(const LogOptions& options) {
  return std::get_if<std::string>(&options.reduce_fx());
}

// What a function of the user's makes of values [n], those of all ranks where they are shared.
Scalar reduced(const std::string& name, const LogOptions& options, at::Tensor values,
               Collectives* collectives) {
  if (options.sync_dist() && collectives != nullptr && collectives->world_size() > 1) {
    values = collectives->all_gather_rows(values);
  }
  const auto value = std::get<1>(options.reduce_fx())(values);
  if (!value.defined() || value.numel() != 1) {
    throw MisconfigurationError(
        str("The function given as reduce_fx of log(\"", name, "\") made ",
            value.defined() ? str("a tensor of shape ", value.sizes()) : "an undefined tensor",
            " of ", values.numel(), " values, expected a tensor of one element."));
  }
  return Scalar(value.reshape({}));
}

bool same_options(const LogOptions& a, const LogOptions& b) {
  const auto* name_a = reduction_name(a);
  const auto* name_b = reduction_name(b);
  const bool same_reduction =
      (name_a == nullptr) == (name_b == nullptr) && (name_a == nullptr || *name_a == *name_b);
  return same_reduction && a.prog_bar() == b.prog_bar() && a.logger() == b.logger() &&
         a.on_step() == b.on_step() && a.on_epoch() == b.on_epoch() &&
         a.enable_graph() == b.enable_graph() && a.sync_dist() == b.sync_dist() &&
         a.add_dataloader_idx() == b.add_dataloader_idx() &&
         a.rank_zero_only() == b.rank_zero_only();
}

ReduceOp reduce_op(const std::string& name) {
  return name == "mean"  ? ReduceOp::kMean
         : name == "sum" ? ReduceOp::kSum
         : name == "min" ? ReduceOp::kMin
                         : ReduceOp::kMax;
}

}  // namespace

at::Tensor Scalar::tensor() const {
  return on_host_ ? at::scalar_tensor(number_, at::TensorOptions().dtype(dtype_)) : tensor_;
}

double Scalar::item() const { return on_host_ ? number_ : tensor_.item().toDouble(); }

void ResultCollection::start_batch(const Batch* batch, std::optional<int64_t> dataloader_idx) {
  batch_ = batch;
  batch_size_.reset();
  dataloader_idx_ = dataloader_idx;
  next_ = 0;
}

void ResultCollection::drop_batch() {
  batch_ = nullptr;
  batch_size_.reset();
}

ResultCollection::Entry& ResultCollection::entry_for(Hook hook, const std::string& name,
                                                     const LogValue& value,
                                                     const LogOptions& options) {
  // Without a loader's index in the name, all loaders share one entry.
  const auto index_of = [](const LogOptions& of, const std::optional<int64_t>& loader) {
    return of.add_dataloader_idx() ? loader.value_or(-1) : -1;
  };
  const int64_t index = index_of(options, dataloader_idx_);
  for (size_t i = 0; i < entries_.size(); ++i) {
    auto& entry = entries_[(next_ + i) % entries_.size()];
    const bool same_loader = index_of(entry.options, entry.dataloader_idx) == index;
    if (entry.hook != hook || !same_loader || entry.name != name) continue;
    if (entry.restored && !same_options(entry.options, options)) {
      warn(str("log(\"", name,
               "\") has other options than in the run that was saved: its value over "
               "the epoch begins anew."));
      entry.total = entry.computed = Scalar();
      entry.all.clear();
      entry.has_value = false;
      entry.metric_state = nullptr;
    } else if (!same_options(entry.options, options)) {
      throw MisconfigurationError(str("log(\"", name, "\") was called twice in ", to_string(hook),
                                      " with different options. Use the same options, or another "
                                      "name."));
    }
    next_ = (next_ + i + 1) % entries_.size();
    if (entry.restored) reconnect(entry, value, options);
    return entry;
  }
  const auto* reduction = reduction_name(options);
  if (reduction != nullptr && *reduction != "mean" && *reduction != "sum" && *reduction != "min" &&
      *reduction != "max") {
    throw MisconfigurationError(str("log(\"", name, "\") got reduce_fx \"", *reduction,
                                    "\", expected mean, sum, min, max or a function."));
  }
  Entry entry;
  entry.hook = hook;
  entry.name = name;
  entry.dataloader_idx = dataloader_idx_;
  entry.options = options;
  entry.metric = value.metric();
  entries_.push_back(std::move(entry));
  return entries_.back();
}

double ResultCollection::weight_of_batch(const Entry& entry) {
  if (entry.options.batch_size()) return static_cast<double>(*entry.options.batch_size());
  if (batch_size_) return *batch_size_;
  if (batch_ == nullptr) return 1;
  bool ambiguous = false;
  const auto size = batch_->batch_size(&ambiguous);
  if (!size) {
    throw MisconfigurationError(str("log(\"", entry.name,
                                    "\") takes a mean over the epoch, but the batch is ",
                                    batch_->describe(),
                                    " and holds no tensor to take the batch size from. Pass "
                                    "LogOptions().batch_size(n)."));
  }
  if (ambiguous) {
    warn_once(str("The batch ", batch_->describe(),
                  " holds tensors of different first dims; its "
                  "size is taken to be ",
                  *size,
                  ". Pass LogOptions().batch_size(n) if it is "
                  "not."),
              "ambiguous batch size");
  }
  batch_size_ = static_cast<double>(*size);
  return *batch_size_;
}

void ResultCollection::accumulate(Entry& entry, const Scalar& value, double weight) {
  const auto* reduction = reduction_name(entry.options);
  if (reduction == nullptr) {
    entry.all.push_back(value.tensor());
    return;
  }
  auto& total = entry.total;
  const bool first = !entry.has_value;
  if (*reduction == "mean") entry.weight = first ? weight : entry.weight + weight;
  if (value.on_host() && (first || total.on_host())) {
    const auto dtype = value.dtype();
    const auto add =
        *reduction == "mean" ? rounded(value.number() * weight, dtype) : value.number();
    double number = add;
    if (!first) {
      number = *reduction == "min"   ? std::fmin(total.number(), add)
               : *reduction == "max" ? std::fmax(total.number(), add)
                                     : rounded(total.number() + add, dtype);
      const bool nan = std::isnan(total.number()) || std::isnan(add);
      if (nan) number = NAN;  // as torch's minimum and maximum do
    }
    total = Scalar(number, dtype);
    return;
  }
  const at::NoGradGuard no_grad;
  auto add = value.tensor();
  if (*reduction == "mean") add = add * weight;
  if (first) {
    total = Scalar(*reduction == "mean" ? add : add.clone());
    return;
  }
  auto sum = total.tensor().to(add.device());
  total = Scalar(*reduction == "min"   ? at::minimum(sum, add)
                 : *reduction == "max" ? at::maximum(sum, add)
                                       : sum + add);
}

void ResultCollection::log(Hook hook, const std::string& name, const LogValue& value,
                           const LogOptions& options, Collectives& collectives) {
  collectives_ = &collectives;
  auto& entry = entry_for(hook, name, value, options);
  entry.computed = Scalar();
  if (value.metric() != nullptr) {
    entry.metric = value.metric();
    const auto& batch_value = entry.metric->batch_value();
    if (*options.on_step() && batch_value.defined()) entry.step_value = Scalar(batch_value);
    entry.has_value = true;
    return;
  }
  auto scalar = kept(name, value, options.enable_graph());
  if (*options.on_step()) {
    entry.step_value = scalar;
    if (options.sync_dist() && collectives.world_size() > 1 && reduction_name(options)) {
      const Scope call = in_call(str("log(\"", name, "\", sync_dist)"));
      entry.step_value =
          Scalar(collectives.reduce(scalar.tensor(), reduce_op(*reduction_name(options))));
    }
  }
  if (*options.on_epoch()) {
    const auto* reduction = reduction_name(options);
    entry.options.batch_size(options.batch_size());
    const double weight = reduction != nullptr && *reduction == "mean" ? weight_of_batch(entry) : 1;
    accumulate(entry, scalar, weight);
  }
  entry.has_value = true;
}

Scalar ResultCollection::computed(Entry& entry) {
  if (entry.computed.defined()) return entry.computed;
  // What needs its object has no value before that was logged again.
  const bool of_object = entry.of_metric || reduction_name(entry.options) == nullptr;
  if (entry.restored && of_object) return {};
  const bool together = collectives_ != nullptr && collectives_->world_size() > 1;
  const Scope call =
      together ? in_call(str("the value of log(\"", entry.name, "\") over all ranks")) : nullptr;
  if (entry.metric != nullptr) {
    entry.computed =
        Scalar(together ? entry.metric->compute_synced(*collectives_) : entry.metric->compute());
    return entry.computed;
  }
  const auto* reduction = reduction_name(entry.options);
  if (reduction == nullptr) {
    entry.computed = reduced(entry.name, entry.options, at::stack(entry.all), collectives_);
    return entry.computed;
  }
  auto total = entry.total;
  double weight = entry.weight;
  if (entry.options.sync_dist() && together) {
    // Sums of values and of weights over the ranks, in float64 for the weights: an integer mean of
    // batch sizes would be floored.
    const auto op = *reduction == "mean" ? ReduceOp::kSum : reduce_op(*reduction);
    total = Scalar(collectives_->reduce(total.tensor(), op));
    weight = collectives_->reduce(at::scalar_tensor(weight, at::kDouble), ReduceOp::kSum)
                 .item()
                 .toDouble();
  }
  if (*reduction == "mean") {
    total = total.on_host() ? Scalar(rounded(total.number() / weight, total.dtype()), total.dtype())
                            : Scalar(total.tensor() / weight);
  }
  entry.computed = total;
  return total;
}

ResultCollection::Metrics ResultCollection::metrics(bool on_step) {
  Metrics metrics;
  for (auto& entry : entries_) {
    if (!entry.has_value || entry.dataloader_idx != dataloader_idx_) continue;
    const bool step = *entry.options.on_step();
    const bool epoch = *entry.options.on_epoch();
    Scalar value;
    if (on_step && step) {
      value = entry.step_value;
    } else if (!on_step && epoch) {
      value = computed(entry);
    }
    if (!value.defined()) continue;
    std::string suffix;
    if (entry.options.add_dataloader_idx() && entry.dataloader_idx) {
      suffix = str("/dataloader_idx_", *entry.dataloader_idx);
    }
    const std::string fork = step && epoch ? (on_step ? "_step" : "_epoch") : "";
    const std::string forked = entry.name + fork + suffix;
    if (entry.options.logger()) metrics.log.emplace_back(forked, value);
    if (training_ || (epoch && !on_step)) {
      if (!fork.empty()) metrics.callback.emplace_back(entry.name + suffix, value);
      metrics.callback.emplace_back(forked, value);
    }
    if (entry.options.prog_bar()) metrics.progress_bar.emplace_back(forked, value);
  }
  return metrics;
}

// A resumed run logs this for the first time: from here on it has the objects that no file holds.
void ResultCollection::reconnect(Entry& entry, const LogValue& value, const LogOptions& options) {
  entry.restored = false;
  entry.options = options;
  entry.metric = value.metric();
  if (entry.metric != nullptr && entry.metric_state != nullptr && !entry.metric_state->is_none()) {
    entry.metric->join_state_dict(std::exchange(*entry.metric_state, State()));
  }
  entry.metric_state = nullptr;
}

namespace {

State save(const Scalar& scalar) {
  if (!scalar.defined()) return {};
  return State::dict({{"value", scalar.tensor()}, {"on_host", scalar.on_host()}});
}

Scalar load(const State& state) {
  if (state.is_none()) return {};
  const auto& tensor = state.at("value").as_tensor();
  if (!state.at("on_host").as_bool()) return Scalar(tensor.clone());
  return Scalar(tensor.item().toDouble(), tensor.scalar_type());
}

State save(const LogOptions& options) {
  const auto* reduction = reduction_name(options);
  return State::dict({{"prog_bar", options.prog_bar()},
                      {"logger", options.logger()},
                      {"on_step", *options.on_step()},
                      {"on_epoch", *options.on_epoch()},
                      {"reduce_fx", reduction == nullptr ? State() : State(*reduction)},
                      {"enable_graph", options.enable_graph()},
                      {"sync_dist", options.sync_dist()},
                      {"add_dataloader_idx", options.add_dataloader_idx()},
                      {"rank_zero_only", options.rank_zero_only()}});
}

LogOptions load_options(const State& state) {
  LogOptions options;
  options.prog_bar(state.at("prog_bar").as_bool())
      .logger(state.at("logger").as_bool())
      .on_step(state.at("on_step").as_bool())
      .on_epoch(state.at("on_epoch").as_bool())
      .enable_graph(state.at("enable_graph").as_bool())
      .sync_dist(state.at("sync_dist").as_bool())
      .add_dataloader_idx(state.at("add_dataloader_idx").as_bool())
      .rank_zero_only(state.at("rank_zero_only").as_bool());
  const auto& reduction = state.at("reduce_fx");
  if (!reduction.is_none()) return options.reduce_fx(reduction.as_string());
  return options.reduce_fx([](const at::Tensor& values) { return values; });
}

}  // namespace

State ResultCollection::state_dict(bool compute, const NamedMetrics& registered) {
  const auto name_of = [&](const Metric* metric) {
    const auto found = std::find_if(registered.begin(), registered.end(),
                                    [&](const auto& one) { return one.second == metric; });
    return found == registered.end() ? State() : State(found->first);
  };
  State::List all, metrics;
  std::vector<const void*> saved;  // the metrics, in the order of their states
  for (auto& entry : entries_) {
    const bool of_metric = entry.metric != nullptr || entry.of_metric;
    const bool of_object = of_metric || reduction_name(entry.options) == nullptr;
    Scalar value = entry.computed;
    if (compute && of_object && entry.has_value && *entry.options.on_epoch()) {
      value = computed(entry);
      // A metric may be updated once more before it is logged.
      if (entry.metric != nullptr) entry.computed = Scalar();
    }
    // The name it is registered by, or its place in `metrics`; several entries may be of one.
    State metric = entry.metric != nullptr ? name_of(entry.metric) : State();
    if (metric.is_none() && (entry.metric != nullptr || entry.metric_state != nullptr)) {
      const void* of = entry.metric != nullptr ? static_cast<const void*>(entry.metric)
                                               : entry.metric_state.get();
      const auto found = std::find(saved.begin(), saved.end(), of);
      metric = static_cast<int64_t>(found - saved.begin());
      if (found == saved.end()) {
        saved.push_back(of);
        metrics.push_back(entry.metric != nullptr ? entry.metric->state_dict()
                                                  : *entry.metric_state);
      }
    }
    State::List values;
    for (const auto& one : entry.all) values.emplace_back(one);
    all.push_back(State::dict(
        {{"hook", to_string(entry.hook)},
         {"name", entry.name},
         {"dataloader_idx", entry.dataloader_idx ? State(*entry.dataloader_idx) : State()},
         {"options", save(entry.options)},
         {"step_value", save(entry.step_value)},
         {"total", save(entry.total)},
         {"weight", entry.weight},
         {"all", std::move(values)},
         {"computed", of_object ? save(value) : State()},
         {"has_value", entry.has_value},
         {"of_metric", of_metric},
         {"metric", std::move(metric)}}));
  }
  return State::dict({{"dataloader_idx", dataloader_idx_ ? State(*dataloader_idx_) : State()},
                      {"entries", std::move(all)},
                      {"metrics", std::move(metrics)}});
}

void ResultCollection::load_state_dict(const State& state, const NamedMetrics& registered) {
  const auto index = [](const State& value) {
    return value.is_none() ? std::optional<int64_t>() : value.as_int();
  };
  std::vector<std::shared_ptr<State>> metrics;
  for (const auto& metric : state.at("metrics").as_list()) {
    metrics.push_back(std::make_shared<State>(metric));
  }
  std::vector<Entry> loaded;
  for (const auto& item : state.at("entries").as_list()) {
    Entry entry;
    entry.hook = hook_of(item.at("hook").as_string());
    entry.name = item.at("name").as_string();
    entry.dataloader_idx = index(item.at("dataloader_idx"));
    entry.options = load_options(item.at("options"));
    entry.step_value = load(item.at("step_value"));
    entry.total = load(item.at("total"));
    entry.weight = item.at("weight").as_double();
    for (const auto& value : item.at("all").as_list()) {
      entry.all.push_back(value.as_tensor().clone());
    }
    entry.computed = load(item.at("computed"));
    entry.has_value = item.at("has_value").as_bool();
    entry.restored = true;
    entry.of_metric = item.at("of_metric").as_bool();
    const auto& metric = item.at("metric");
    if (metric.is<std::string>()) {
      for (const auto& [name, one] : registered) {
        if (name == metric.as_string()) entry.metric = one;
      }
    } else if (!metric.is_none()) {
      entry.metric_state = metrics.at(static_cast<size_t>(metric.as_int()));
    }
    loaded.push_back(std::move(entry));
  }
  entries_ = std::move(loaded);
  dataloader_idx_ = index(state.at("dataloader_idx"));
  next_ = 0;
}

bool ResultCollection::resets(const Metric& metric) const {
  return std::any_of(entries_.begin(), entries_.end(), [&](const Entry& entry) {
    return entry.metric == &metric && entry.has_value;
  });
}

void ResultCollection::reset() {
  for (auto& entry : entries_) {
    if (entry.metric != nullptr && entry.has_value) entry.metric->reset();
    entry.step_value = entry.total = entry.computed = Scalar();
    entry.weight = 0;
    entry.all.clear();
    entry.has_value = false;
    if (entry.metric_state != nullptr) *entry.metric_state = State();
    entry.metric_state = nullptr;
  }
}

void ResultCollection::reset(Hook hook) {
  for (auto& entry : entries_) {
    const bool of_metric = entry.metric != nullptr || entry.of_metric;
    if (entry.hook != hook || of_metric) continue;
    entry.step_value = entry.total = entry.computed = Scalar();
    entry.weight = 0;
    entry.all.clear();
    entry.has_value = false;
  }
}

}  // namespace lightning
