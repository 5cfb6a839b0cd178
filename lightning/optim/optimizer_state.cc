#include "lightning/optim/optimizer_state.h"

#include <ATen/ops/scalar_tensor.h>
#include <c10/util/Exception.h>
#include <torch/optim/adagrad.h>
#include <torch/optim/adam.h>
#include <torch/optim/adamw.h>
#include <torch/optim/lbfgs.h>
#include <torch/optim/rmsprop.h>
#include <torch/optim/sgd.h>

#include <algorithm>
#include <deque>
#include <map>
#include <set>

#include "lightning/errors.h"
#include "lightning/log.h"
#include "lightning/optim/group_values.h"
#include "lightning/optim/step_count.h"

namespace lightning {
namespace {

using torch::optim::Optimizer;
using torch::optim::OptimizerOptions;
using torch::optim::OptimizerParamState;
using Betas = std::tuple<double, double>;

// ---- What is saved, once for writing and reading ------------------------------------------------
//
// `field(key, value)` writes the value or reads it. `option(key, python's value)` is an option that
// LibTorch lacks: written, and refused when it is read with another value. `speed(...)` is one that
// changes how Python computes but not what, so any value will do. `number(key, value, initial)` is
// a field whose default in Python is that int.

template <class Visitor>
void visit(torch::optim::SGDOptions& o, Visitor& v) {
  v.field("lr", o.lr());
  v.number("momentum", o.momentum(), 0);
  v.number("dampening", o.dampening(), 0);
  v.number("weight_decay", o.weight_decay(), 0);
  v.field("nesterov", o.nesterov());
  v.option("maximize", false);
  v.speed("foreach", {});
  v.speed("differentiable", false);
  v.speed("fused", {});
}
template <class Visitor>
void visit(torch::optim::SGDParamState& s, Visitor& v) {
  v.tensor("momentum_buffer", s.momentum_buffer());
}

template <class AnyAdamOptions, class Visitor>
void visit_adam(AnyAdamOptions& o, Visitor& v, bool decoupled) {
  v.field("lr", o.lr());
  v.field("betas", o.betas());
  v.field("eps", o.eps());
  if (decoupled) {
    v.field("weight_decay", o.weight_decay());
  } else {
    v.number("weight_decay", o.weight_decay(), 0);
  }
  v.field("amsgrad", o.amsgrad());
  v.option("maximize", false);
  v.speed("foreach", {});
  v.speed("capturable", false);
  v.speed("differentiable", false);
  v.speed("fused", {});
  v.option("decoupled_weight_decay", decoupled);
}
template <class AnyAdamState, class Visitor>
void visit_adam_state(AnyAdamState& s, Visitor& v) {
  v.step(s.step());
  v.tensor("exp_avg", s.exp_avg());
  v.tensor("exp_avg_sq", s.exp_avg_sq());
  v.optional_tensor("max_exp_avg_sq", s.max_exp_avg_sq());
}
template <class Visitor>
void visit(torch::optim::AdamOptions& o, Visitor& v) {
  visit_adam(o, v, false);
}
template <class Visitor>
void visit(torch::optim::AdamParamState& s, Visitor& v) {
  visit_adam_state(s, v);
}
template <class Visitor>
void visit(torch::optim::AdamWOptions& o, Visitor& v) {
  visit_adam(o, v, true);
}
template <class Visitor>
void visit(torch::optim::AdamWParamState& s, Visitor& v) {
  visit_adam_state(s, v);
}

template <class Visitor>
void visit(torch::optim::RMSpropOptions& o, Visitor& v) {
  v.field("lr", o.lr());
  v.number("momentum", o.momentum(), 0);
  v.field("alpha", o.alpha());
  v.field("eps", o.eps());
  v.field("centered", o.centered());
  v.number("weight_decay", o.weight_decay(), 0);
  v.speed("capturable", false);
  v.speed("foreach", {});
  v.option("maximize", false);
  v.speed("differentiable", false);
}
template <class Visitor>
void visit(torch::optim::RMSpropParamState& s, Visitor& v) {
  v.step(s.step());
  v.tensor("square_avg", s.square_avg());
  v.optional_tensor("momentum_buffer", s.momentum_buffer());
  v.optional_tensor("grad_avg", s.grad_avg());
}

template <class Visitor>
void visit(torch::optim::AdagradOptions& o, Visitor& v) {
  v.field("lr", o.lr());
  v.number("lr_decay", o.lr_decay(), 0);
  v.field("eps", o.eps());
  v.number("weight_decay", o.weight_decay(), 0);
  v.number("initial_accumulator_value", o.initial_accumulator_value(), 0);
  v.speed("foreach", {});
  v.option("maximize", false);
  v.speed("differentiable", false);
  v.speed("fused", {});
}
template <class Visitor>
void visit(torch::optim::AdagradParamState& s, Visitor& v) {
  v.step(s.step());
  v.tensor("sum", s.sum());
}

template <class Visitor>
void visit(torch::optim::LBFGSOptions& o, Visitor& v) {
  v.number("lr", o.lr(), 1);
  v.field("max_iter", o.max_iter());
  v.field("max_eval", o.max_eval());
  v.field("tolerance_grad", o.tolerance_grad());
  v.field("tolerance_change", o.tolerance_change());
  v.field("history_size", o.history_size());
  v.field("line_search_fn", o.line_search_fn());
}
template <class Visitor>
void visit(torch::optim::LBFGSParamState& s, Visitor& v) {
  v.field("func_evals", s.func_evals());
  v.field("n_iter", s.n_iter());
  if (!v.begins("d", s.d())) return;  // stopped before its first direction
  v.flat("al", s.al());
  v.flat("d", s.d());
  v.field("t", s.t());
  v.flat("old_dirs", s.old_dirs());
  v.flat("old_stps", s.old_stps());
  v.flat("ro", s.ro());
  v.scalar("H_diag", s.H_diag());
  v.flat("prev_flat_grad", s.prev_flat_grad());
  v.field("prev_loss", s.prev_loss());
}

// ---- Writing ------------------------------------------------------------------------------------

class Writer {
 public:
  template <class T>
  void field(const char* key, const T& value) {
    out_[key] = State(value);
  }
  template <class T>
  void field(const char* key, const std::optional<T>& value) {
    out_[key] = value ? State(*value) : State();
  }
  void field(const char* key, const Betas& value) {
    out_[key] = State::Tuple{{std::get<0>(value), std::get<1>(value)}};
  }
  void number(const char* key, double value, int64_t initial) {
    const auto whole = static_cast<double>(initial);
    out_[key] = value == whole ? State(initial) : State(value);
  }
  void option(const char* key, bool value) { out_[key] = value; }
  void speed(const char* key, State value) { out_[key] = std::move(value); }

  // Python counts in a float32 tensor.
  void step(int64_t value) {
    out_["step"] = at::scalar_tensor(static_cast<double>(value), at::kFloat);
  }
  void tensor(const char* key, const at::Tensor& value) { optional_tensor(key, value); }
  void optional_tensor(const char* key, const at::Tensor& value) {
    if (value.defined()) out_[key] = value;
  }
  bool begins(const char*, const at::Tensor& value) { return value.defined(); }
  void scalar(const char* key, const at::Tensor& value) { out_[key] = value.reshape({}); }
  void flat(const char* key, const at::Tensor& value) { out_[key] = value; }
  void flat(const char* key, const std::deque<at::Tensor>& values) { list(key, values); }
  void flat(const char* key, const std::optional<std::vector<at::Tensor>>& values) {
    if (values) list(key, *values);
  }

  State take() { return std::move(out_); }

 private:
  template <class Tensors>
  void list(const char* key, const Tensors& values) {
    State::List items;
    for (const at::Tensor& value : values)
      items.push_back(value.defined() ? State(value) : State());
    out_[key] = std::move(items);
  }

  State out_ = State::dict();
};

// ---- Reading ------------------------------------------------------------------------------------

class Reader {
 public:
  // `where` names the entry in errors; `param` is the parameter whose state it is, if any.
  Reader(const State& in, std::string where, const char* optimizer, const at::Tensor* param)
      : in_(in), where_(std::move(where)), optimizer_(optimizer), param_(param) {}

  void field(const char* key, double& value) {
    if (const State* found = find(key)) value = found->as_double();
  }
  void field(const char* key, bool& value) {
    if (const State* found = find(key)) value = found->as_bool();
  }
  void field(const char* key, int64_t& value) {
    if (const State* found = find(key)) value = integer(*found);
  }
  void field(const char* key, std::optional<int64_t>& value) {
    const State* found = find(key);
    if (found == nullptr) return;
    value = found->is_none() ? std::nullopt : std::make_optional(integer(*found));
  }
  void field(const char* key, std::optional<std::string>& value) {
    const State* found = find(key);
    if (found == nullptr) return;
    value = found->is_none() ? std::nullopt : std::make_optional(found->as_string());
  }
  void field(const char* key, Betas& value) {
    const State* found = find(key);
    if (found == nullptr) return;
    const auto& pair = found->as_list();
    if (pair.size() != 2) refuse(str("has ", pair.size(), " values under \"", key, "\", not 2"));
    value = {pair[0].as_double(), pair[1].as_double()};
  }
  void number(const char* key, double& value, int64_t) { field(key, value); }
  void option(const char* key, bool value) {
    const State* found = find(key);
    if (found == nullptr || found->is_none() || found->as_bool() == value) return;
    refuse(str("has ", key, "=", value ? "False" : "True", ", which torch::optim::", optimizer_,
               " cannot do"));
  }
  void speed(const char* key, const State&) { find(key); }

  void step(int64_t& value) { value = integer(require("step")); }
  void tensor(const char* key, at::Tensor& value) { value = shaped(key, require(key)); }
  void optional_tensor(const char* key, at::Tensor& value) {
    const State* found = find(key);
    value = found == nullptr || found->is_none() ? at::Tensor() : shaped(key, *found);
  }
  bool begins(const char* key, const at::Tensor&) { return in_.contains(key); }
  void scalar(const char* key, at::Tensor& value) {  // Python begins with the number 1
    const State& found = require(key);
    value = found.is<TensorState>() ? like_param(found.as_tensor())
                                    : at::scalar_tensor(found.as_double(), param_->options());
  }
  void flat(const char* key, at::Tensor& value) { value = like_param(require(key).as_tensor()); }
  void flat(const char* key, std::deque<at::Tensor>& values) {
    values.clear();
    for (const State& item : require(key).as_list()) values.push_back(like_param(item.as_tensor()));
  }
  void flat(const char* key, std::optional<std::vector<at::Tensor>>& values) {
    values.reset();
    const State* found = find(key);
    if (found == nullptr || found->is_none()) return;
    values.emplace();
    for (const State& item : found->as_list()) {
      values->push_back(item.is_none() ? at::Tensor() : like_param(item.as_tensor()));
    }
  }

  const std::set<std::string>& known() const { return known_; }

 private:
  const State* find(const char* key) {
    known_.insert(key);
    return in_.find(key);
  }
  const State& require(const char* key) {
    const State* found = find(key);
    if (found == nullptr) refuse(str("has no \"", key, "\""));
    return *found;
  }
  static int64_t integer(const State& value) {
    return value.is<int64_t>() ? value.as_int() : static_cast<int64_t>(value.as_double());
  }
  at::Tensor shaped(const char* key, const State& value) {
    const at::Tensor& tensor = value.as_tensor();
    if (tensor.sizes() != param_->sizes()) {
      refuse(lightning::str("holds \"", key, "\" of shape ", tensor.sizes(),
                            " for a parameter of shape ", param_->sizes()));
    }
    return like_param(tensor);
  }
  // The policy of Python's Optimizer.load_state_dict. A copy, since steps work in place.
  at::Tensor like_param(const at::Tensor& tensor) const {
    const auto dtype = param_->is_floating_point() ? param_->scalar_type() : tensor.scalar_type();
    return tensor.to(param_->device(), dtype, /*non_blocking=*/false, /*copy=*/true);
  }
  [[noreturn]] void refuse(const std::string& what) const {
    throw CheckpointError(str("The optimizer state's ", where_, " ", what,
                              ". It is not of this model with torch::optim::", optimizer_,
                              ": build the model and the optimizer as they were when it was "
                              "saved."));
  }

  const State& in_;
  std::string where_;
  const char* optimizer_;
  const at::Tensor* param_;
  std::set<std::string> known_;
};

// ---- The kinds of optimizers --------------------------------------------------------------------

struct Kind {
  const char* name;
  bool (*is)(const Optimizer&);
  State (*write_options)(const OptimizerOptions&);
  State (*write_state)(const OptimizerParamState&);
  void (*read_options)(OptimizerOptions&, Reader&);
  void (*assign_options)(OptimizerOptions& to, const OptimizerOptions& from);
  std::unique_ptr<OptimizerParamState> (*read_state)(Reader&);
};

template <class O, class OptionsType, class ParamState>
Kind kind(const char* name) {
  return {name,
          [](const Optimizer& o) { return dynamic_cast<const O*>(&o) != nullptr; },
          [](const OptimizerOptions& options) {
            Writer writer;
            OptionsType copy = static_cast<const OptionsType&>(options);
            visit(copy, writer);
            return writer.take();
          },
          [](const OptimizerParamState& state) {
            Writer writer;
            ParamState copy = static_cast<const ParamState&>(state);  // of handles
            visit(copy, writer);
            return writer.take();
          },
          [](OptimizerOptions& options, Reader& reader) {
            visit(static_cast<OptionsType&>(options), reader);
          },
          [](OptimizerOptions& to, const OptimizerOptions& from) {
            static_cast<OptionsType&>(to) = static_cast<const OptionsType&>(from);
          },
          [](Reader& reader) -> std::unique_ptr<OptimizerParamState> {
            auto state = std::make_unique<ParamState>();
            visit(*state, reader);
            return state;
          }};
}

const Kind& kind_of(const Optimizer& optimizer) {
  using namespace torch::optim;
  static const Kind kinds[] = {kind<SGD, SGDOptions, SGDParamState>("SGD"),
                               kind<Adam, AdamOptions, AdamParamState>("Adam"),
                               kind<AdamW, AdamWOptions, AdamWParamState>("AdamW"),
                               kind<RMSprop, RMSpropOptions, RMSpropParamState>("RMSprop"),
                               kind<Adagrad, AdagradOptions, AdagradParamState>("Adagrad"),
                               kind<LBFGS, LBFGSOptions, LBFGSParamState>("LBFGS")};
  std::vector<std::string> names;
  for (const Kind& known : kinds) {
    if (known.is(optimizer)) return known;
    names.push_back(known.name);
  }
  throw MisconfigurationError(
      str("An optimizer of type ", c10::demangle(typeid(optimizer).name()),
          " cannot be saved or loaded. Supported are torch::optim's ", join(names),
          " and classes derived from them: derive from the one that keeps its state alike."));
}

const OptimizerParamState* find_state(const Optimizer& optimizer, const at::Tensor& param) {
  const auto entry = optimizer.state().find(param.unsafeGetTensorImpl());
  return entry == optimizer.state().end() ? nullptr : entry->second.get();
}

// One that has no buffer yet is, to Python, a parameter without state.
bool holds_nothing(const State& state) {
  const auto& dict = state.as_dict();
  return std::all_of(dict.begin(), dict.end(),
                     [](const auto& item) { return item.second.is_none(); });
}

// ---- A state, read and checked, before the optimizer sees any of it -----------------------------

struct Loaded {
  std::vector<std::unique_ptr<OptimizerOptions>> options;
  std::vector<NamedValues> values;  // of the schedules, for each group
  std::vector<std::pair<void*, std::unique_ptr<OptimizerParamState>>> states;
};

void warn_of_unknown(const State& group, const Reader& reader, size_t index, const char* name) {
  for (const auto& [key, value] : group.as_dict()) {
    const auto* text = std::get_if<std::string>(&key);
    if (text == nullptr || *text == "params" || *text == "param_names" ||
        GroupValues::is_name(*text) || reader.known().count(*text) > 0) {
      continue;
    }
    warn(str("The optimizer state's group ", index, " has \"", *text,
             "\", for which torch::optim::", name, " has no place; it is left out."));
  }
}

void read_group(const Kind& kind, const Optimizer& optimizer, const State& group, size_t index,
                Loaded& loaded) {
  const auto& current = optimizer.param_groups()[index];
  const size_t params = group.at("params").as_list().size();
  if (params != current.params().size()) {
    throw CheckpointError(str("The optimizer state's group ", index, " has ", params,
                              " parameters, the optimizer's has ", current.params().size(),
                              ". Build the model and the optimizer as they were when it was "
                              "saved."));
  }
  loaded.options.push_back(current.options().clone());
  Reader reader(group, str("group ", index), kind.name, nullptr);
  kind.read_options(*loaded.options.back(), reader);
  warn_of_unknown(group, reader, index, kind.name);
  auto& values = loaded.values.emplace_back();
  for (const auto& [key, value] : group.as_dict()) {
    const auto* text = std::get_if<std::string>(&key);
    if (text != nullptr && GroupValues::is_name(*text)) values[*text] = value.as_double();
  }
}

Loaded read(const Kind& kind, const Optimizer& optimizer, const State& state) {
  Loaded loaded;
  const auto& groups = state.at("param_groups").as_list();
  if (groups.size() != optimizer.param_groups().size()) {
    throw CheckpointError(
        str("The optimizer state has ", groups.size(), " parameter groups, the optimizer has ",
            optimizer.param_groups().size(), ". Build the optimizer as it was when it was saved."));
  }
  std::map<State::Key, const at::Tensor*> params;  // by the number they have in the file
  for (size_t i = 0; i < groups.size(); ++i) {
    read_group(kind, optimizer, groups[i], i, loaded);
    const auto& numbers = groups[i].at("params").as_list();
    for (size_t p = 0; p < numbers.size(); ++p) {
      params[numbers[p].as_int()] = &optimizer.param_groups()[i].params()[p];
    }
  }
  for (const auto& [key, value] : state.at("state").as_dict()) {
    const auto param = params.find(key);
    if (param == params.end()) {
      throw CheckpointError(str("The optimizer state holds a parameter that is in none of its ",
                                groups.size(), " groups. The file is damaged."));
    }
    if (holds_nothing(value)) continue;
    Reader reader(value, "parameter " + to_string(key), kind.name, param->second);
    loaded.states.emplace_back(param->second->unsafeGetTensorImpl(), kind.read_state(reader));
  }
  // Adagrad makes its sums when it is built and steps none without.
  for (const auto& [number, param] : params) {
    const bool has = state.at("state").contains(number);
    if (!has && dynamic_cast<const torch::optim::Adagrad*>(&optimizer) != nullptr) {
      throw CheckpointError(str("The optimizer state has nothing for parameter ", to_string(number),
                                ", but Adagrad has a sum for each."));
    }
  }
  return loaded;
}

}  // namespace

State optimizer_state_dict(const Optimizer& optimizer) {
  const Kind& kind = kind_of(optimizer);
  settle_steps(optimizer);
  const auto values = GroupValues::find(optimizer);
  State states = State::dict();
  State::List groups;
  int64_t number = 0;
  for (const auto& group : optimizer.param_groups()) {
    State out = kind.write_options(group.options());
    if (values != nullptr && groups.size() < values->groups.size()) {
      for (const auto& [name, value] : values->groups[groups.size()]) out[name] = value;
    }
    State::List numbers;
    for (const at::Tensor& param : group.params()) {
      if (const auto* state = find_state(optimizer, param)) {
        State written = kind.write_state(*state);
        if (!holds_nothing(written)) states[number] = std::move(written);
      }
      numbers.emplace_back(number++);
    }
    out["params"] = std::move(numbers);
    groups.push_back(std::move(out));
  }
  return State::dict({{"state", std::move(states)}, {"param_groups", std::move(groups)}});
}

void load_optimizer_state_dict(Optimizer& optimizer, const State& state) {
  const Kind& kind = kind_of(optimizer);
  Loaded loaded = read(kind, optimizer, state);

  const auto values = GroupValues::find(optimizer);
  for (size_t i = 0; i < loaded.options.size(); ++i) {
    // In place, for whoever keeps a reference to them.
    kind.assign_options(optimizer.param_groups()[i].options(), *loaded.options[i]);
    if (values == nullptr || i >= values->groups.size()) continue;
    for (const auto& [name, value] : loaded.values[i]) values->groups[i][name] = value;
  }
  optimizer.state().clear();
  for (auto& [param, param_state] : loaded.states) {
    optimizer.state()[param] = std::move(param_state);
  }
}

}  // namespace lightning
