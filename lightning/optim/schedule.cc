#include "lightning/optim/schedule.h"

#include <torch/optim/optimizer.h>

#include "lightning/errors.h"

namespace lightning {

torch::optim::Optimizer& OptimizerRef::operator*() const {
  if (optimizer_ == nullptr) {
    throw MisconfigurationError(
        "A learning-rate schedule got an optimizer that is null. Make the optimizer first.");
  }
  return *optimizer_;
}

// ---- StateFields --------------------------------------------------------------------------------

const State* StateFields::in(const char* key) const {
  return in_ == nullptr ? nullptr : in_->find(key);
}

void StateFields::constant(const char* key, State value) {
  if (out_ != nullptr) (*out_)[key] = std::move(value);
}

void StateFields::operator()(const char* key, bool& value) {
  constant(key, value);
  if (const State* found = in(key)) value = found->as_bool();
}

// Python's counts may be floats.
void StateFields::operator()(const char* key, int64_t& value) {
  constant(key, value);
  if (const State* found = in(key)) {
    value = found->is<int64_t>() ? found->as_int() : static_cast<int64_t>(found->as_double());
  }
}

void StateFields::operator()(const char* key, double& value) {
  constant(key, value);
  if (const State* found = in(key)) value = found->as_double();
}

void StateFields::operator()(const char* key, std::string& value) {
  constant(key, value);
  if (const State* found = in(key)) value = found->as_string();
}

void StateFields::operator()(const char* key, std::vector<int64_t>& values) {
  constant(key, State::List(values.begin(), values.end()));
  if (const State* found = in(key)) {
    values.clear();
    for (const State& item : found->as_list()) values.push_back(item.as_int());
  }
}

void StateFields::operator()(const char* key, std::vector<double>& values) {
  constant(key, State::List(values.begin(), values.end()));
  if (const State* found = in(key)) {
    values.clear();
    for (const State& item : found->as_list()) values.push_back(item.as_double());
  }
}

// ---- Schedule -----------------------------------------------------------------------------------

Schedule::Schedule(OptimizerRef optimizer, int64_t last_epoch)
    : optimizer_(std::move(optimizer)),
      values_(GroupValues::of(*optimizer_)),
      last_epoch_(last_epoch) {
  const auto lrs = current_lrs();
  for (size_t i = 0; i < lrs.size(); ++i) {
    if (last_epoch_ != -1 && !values_->groups[i].contains("initial_lr")) {
      throw MisconfigurationError(
          str("A learning-rate schedule got last_epoch ", last_epoch_, ", but group ", i,
              " of its optimizer has no initial_lr from an earlier schedule. Leave last_epoch out "
              "and call load_state_dict() to resume."));
    }
    NamedValues& values = values_->groups[i];
    if (!values.contains("initial_lr")) values["initial_lr"] = lrs[i];
    base_lrs_.push_back(values.at("initial_lr"));
  }
  last_lr_ = lrs;
}

void Schedule::initial_step() {
  step_count_ = 0;
  is_initial_ = true;
  step();
  is_initial_ = false;
}

void Schedule::undo() { --last_epoch_; }

void Schedule::step() {
  ++step_count_;
  update_lr();
}

void Schedule::update_lr(std::optional<int64_t> epoch) {
  last_epoch_ = epoch ? *epoch : last_epoch_ + 1;
  set_lrs(epoch ? closed_form_lr() : get_lr());
}

std::vector<double> Schedule::current_lrs() const {
  std::vector<double> lrs;
  for (const auto& group : (*optimizer_).param_groups()) lrs.push_back(group.options().get_lr());
  return lrs;
}

void Schedule::set_lrs(const std::vector<double>& lrs) {
  auto& groups = (*optimizer_).param_groups();
  if (groups.size() != lrs.size()) {
    throw MisconfigurationError(str("A learning-rate schedule made for ", lrs.size(),
                                    " parameter groups finds ", groups.size(),
                                    ". Add all groups before the schedule is made."));
  }
  for (size_t i = 0; i < lrs.size(); ++i) groups[i].options().set_lr(lrs[i]);
  last_lr_ = lrs;
}

std::vector<double> Schedule::scaled(const std::vector<double>& lrs, double factor) const {
  std::vector<double> result;
  for (const double lr : lrs) result.push_back(lr * factor);
  return result;
}

void Schedule::fields(StateFields& fields) {
  fields("base_lrs", base_lrs_);
  epoch_field(fields);
  fields("_step_count", step_count_);
  fields.constant("_is_initial", false);
  fields.constant("_get_lr_called_within_step", false);
  last_lr_field(fields);
}

State Schedule::state_dict() const {
  State state = State::dict();
  StateFields writer(state);
  const_cast<Schedule*>(this)->fields(writer);  // which only reads them
  return state;
}

void Schedule::load_state_dict(const State& state) {
  const State before = state_dict();
  const size_t groups = (*optimizer_).param_groups().size();
  try {
    StateFields reader(state);
    fields(reader);
    if (base_lrs_.size() != groups || last_lr_.size() != groups) {
      throw CheckpointError(str("The state of a learning-rate schedule is for ", base_lrs_.size(),
                                " parameter groups, the optimizer has ", groups,
                                ". Build the optimizer as it was when it was saved."));
    }
  } catch (...) {
    StateFields restore(before);
    fields(restore);
    throw;
  }
}

// ---- Options ------------------------------------------------------------------------------------

std::vector<double> one_per_group(const char* schedule, const char* option,
                                  const std::vector<double>& values,
                                  const torch::optim::Optimizer& optimizer) {
  const size_t groups = optimizer.param_groups().size();
  if (values.size() == groups) return values;
  if (values.size() == 1) return std::vector<double>(groups, values[0]);
  throw MisconfigurationError(str(schedule, " got ", values.size(), " values of ", option,
                                  " for an optimizer with ", groups,
                                  " parameter groups. Give one for all, or one for each."));
}

void require_option(bool good, const char* schedule, const char* option, double value,
                    const char* expected) {
  if (good) return;
  throw MisconfigurationError(
      str(schedule, " got ", option, " ", value, ", expected ", expected, "."));
}

}  // namespace lightning
