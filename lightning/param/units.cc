#include "lightning/param/units.h"

#include <torch/csrc/autograd/engine.h>
#include <torch/csrc/autograd/graph_task.h>

#include <algorithm>

#include "lightning/errors.h"

namespace lightning {
namespace {

// Autograd's number of the backward that runs on this thread; -1 outside.
int running_backward() { return torch::autograd::get_current_graph_task_id(); }

}  // namespace

// ---- Unit --------------------------------------------------------------------------------------

Unit::Unit(Units& units, const UnitPlan& plan, int64_t index)
    : units_(units), name_(plan.name), index_(index), parent_(plan.parent) {
  for (const auto& planned : plan.parameters) {
    const auto look = units.keeper().look(planned.name, planned.tensor);
    parameters_.push_back(
        std::make_unique<BackedParameter>(planned.name, planned.tensor, *this, look));
    auto* const parameter = parameters_.back().get();
    parameter->on_gradient([this, parameter] { units_.gradient_arrived(*this, *parameter); });
  }
}

Unit::~Unit() = default;

size_t Unit::trainable() const {
  return static_cast<size_t>(
      std::count_if(parameters_.begin(), parameters_.end(),
                    [](const auto& each) { return each->parameter().requires_grad(); }));
}

void Unit::before(Touch& touch) { units_.touched(*this, touch); }

void UnitKeeper::release(Unit& unit) {
  for (const auto& parameter : unit.parameters()) parameter->release();
}

// ---- Set-up ------------------------------------------------------------------------------------

Units::Units(const std::vector<UnitPlan>& plan, std::unique_ptr<UnitKeeper> keeper,
             const UnitsOptions& options)
    : keeper_(std::move(keeper)), options_(options) {
  for (size_t i = 0; i < plan.size(); ++i) {
    units_.push_back(std::unique_ptr<Unit>(new Unit(*this, plan[i], static_cast<int64_t>(i))));
    keeper_->take(*units_.back());
    release(*units_.back());
  }
}

Units::~Units() = default;

Scope Units::use(bool backward_follows) {
  const std::lock_guard<std::recursive_mutex> lock(mutex_);
  if (in_use_ == 0 && in_whole_ == 0 && running_backward() < 0) {
    forget_broken_backward();
    previous_ = current_ = -1;
    training_ = backward_follows;
    for (const auto& unit : units_) {
      for (const auto& parameter : unit->parameters()) {
        if (parameter->is_in_place()) continue;
        throw MisconfigurationError(
            str("Parameter \"", parameter->name(), "\", which is ", keeper_->placement(),
                ", was given other data (by set_data, Module::to or the like) since the strategy "
                "set the model up. Convert and move the model before that, say in configure_model, "
                "and write weights inside a whole-parameter scope."));
      }
    }
  }
  ++in_use_;
  return scope_exit([this, backward_follows] {
    const std::lock_guard<std::recursive_mutex> end(mutex_);
    if (--in_use_ > 0 || in_whole_ > 0) return;
    if (backward_follows) {
      wake_all();  // the first use in backward of what is whole says what to gather ahead
    } else {
      release_all();
    }
  });
}

void Units::wake_all() {
  for (const auto& unit : units_) unit->set_asleep(false);
}

void Units::changed() {
  const std::lock_guard<std::recursive_mutex> lock(mutex_);
  release_all();
  for (const auto& unit : units_) {
    for (const auto& parameter : unit->parameters()) parameter->mark_changed();
  }
}

void Units::release_all() {
  const std::lock_guard<std::recursive_mutex> lock(mutex_);
  for (const auto& unit : units_) release(*unit);
  previous_ = current_ = -1;
}

Scope Units::whole(bool write) {
  const std::lock_guard<std::recursive_mutex> lock(mutex_);
  for (const auto& unit : units_) gather(*unit);
  for (const auto& unit : units_) {
    finish_gathering(*unit);
    unit->set_asleep(true);
  }
  ++in_whole_;
  in_writing_ += write ? 1 : 0;
  return scope_exit([this, write] {
    const std::lock_guard<std::recursive_mutex> end(mutex_);
    in_writing_ -= write ? 1 : 0;
    if (write) {
      for (const auto& unit : units_) keeper_->write_back(*unit);
    }
    if (--in_whole_ == 0) release_all();
  });
}

void Units::for_each_whole(const std::function<void(Unit&)>& visit, bool write) {
  const std::lock_guard<std::recursive_mutex> lock(mutex_);
  for (const auto& unit : units_) {
    const bool was_whole = unit->is_whole();
    gather(*unit);
    finish_gathering(*unit);
    const bool was_asleep = unit->asleep();
    unit->set_asleep(true);
    in_writing_ += write ? 1 : 0;
    const auto end = scope_exit([&] {
      in_writing_ -= write ? 1 : 0;
      unit->set_asleep(was_asleep);
      if (!was_whole) release(*unit);
    });
    visit(*unit);
    if (write) keeper_->write_back(*unit);
  }
}

// ---- A touch -----------------------------------------------------------------------------------

void Units::touched(Unit& unit, Touch& touch) {
  const std::lock_guard<std::recursive_mutex> lock(mutex_);
  check_allowed(unit, touch);
  if (unit.asleep()) return;  // an allowed write
  enter_backward();
  enter(unit, touch.serial);
}

void Units::check_allowed(const Unit& unit, const Touch& touch) const {
  const auto& name = touch.parameter.name();
  if (touch.writes && in_writing_ == 0) {
    throw MisconfigurationError(
        str("Parameter \"", name, "\", which is ", keeper_->placement(), ", is written by ",
            touch.operator_name(),
            ", but what is written to it here would be lost. Write it in a whole-parameter scope "
            "that writes back, or before the strategy sets the model up."));
  }
  if (unit.asleep() || in_use_ > 0 || in_whole_ > 0 || running_backward() >= 0) return;
  throw MisconfigurationError(
      str("Parameter \"", name, "\", which is ", keeper_->placement(), ", is read by ",
          touch.operator_name(),
          " outside a step. To read it all ranks must gather it together: read it in a training, "
          "validation, test or prediction step, or open a whole-parameter scope on all ranks."));
}

void Units::enter(Unit& unit, uint64_t serial) {
  unit.serial_ = serial;
  if (current_ != unit.index_) {
    note_order(unit);
    previous_ = current_;
    current_ = unit.index_;
  }
  release_others(unit, serial);
  gather(unit);
  gather_ahead(unit);
  finish_gathering(unit);
  unit.used_ = true;
  unit.set_asleep(true);
}

void Units::gather(Unit& unit) {
  if (unit.state_ != Unit::State::kReleased) return;
  keeper_->gather(unit);
  unit.state_ = Unit::State::kGathering;
  unit.used_ = false;
}

void Units::finish_gathering(Unit& unit) {
  if (unit.state_ != Unit::State::kGathering) return;
  keeper_->wait(unit);
  unit.state_ = Unit::State::kWhole;
}

void Units::release(Unit& unit) {
  unit.set_asleep(false);
  unit.used_ = false;
  if (unit.state_ == Unit::State::kReleased) return;
  if (unit.state_ == Unit::State::kGathering) {
    try {
      keeper_->wait(unit);
    } catch (const std::exception&) {
      // Nobody reads it, and the next collective says what is wrong with the others.
    }
  }
  keeper_->release(unit);
  unit.state_ = Unit::State::kReleased;
}

void Units::release_others(const Unit& unit, uint64_t serial) {
  for (const auto& other : units_) {
    if (other.get() == &unit || lies_in(unit, *other)) continue;
    other->set_asleep(false);  // its next use is news
    const bool of_this_operator = other->serial_ == serial;
    if (other->used_ && !of_this_operator && may_release(*other)) release(*other);
  }
}

bool Units::lies_in(const Unit& inner, const Unit& outer) const {
  if (outer.parent_ < 0) return options_.keep_root;
  for (auto at = inner.parent_; at >= 0; at = units_[static_cast<size_t>(at)]->parent_) {
    if (at == outer.index_) return true;
  }
  return false;
}

bool Units::may_release(const Unit& unit) const {
  if (backward_ < 0) return options_.release_after_forward || !training_;
  // What has gradients to come is released when they are there: its weights may be read until then.
  return unit.trainable() == 0 || unit.handed_over_;
}

// ---- The order ---------------------------------------------------------------------------------

Units::Order& Units::order() {
  if (backward_ >= 0) return backward_order_;
  return training_ ? forward_order_ : evaluation_order_;
}

void Units::note_order(const Unit& unit) {
  order()[{previous_, current_}] = unit.index_;
  if (backward_ < 0 && training_) reversed_[unit.index_] = current_;
}

int64_t Units::expected_after(int64_t before, int64_t unit) {
  const auto& known = order();
  const auto found = known.find({before, unit});
  if (found != known.end()) return found->second;
  if (backward_ < 0) return -1;
  const auto back = reversed_.find(unit);
  return back == reversed_.end() ? -1 : back->second;
}

void Units::gather_ahead(const Unit& unit) {
  auto before = previous_, at = unit.index_;
  for (int64_t i = 0; i < options_.prefetch; ++i) {
    const auto next = expected_after(before, at);
    if (next < 0 || next == unit.index_) return;
    gather(*units_[static_cast<size_t>(next)]);
    before = std::exchange(at, next);
  }
}

// ---- Backward ----------------------------------------------------------------------------------

void Units::enter_backward() {
  forget_broken_backward();
  const int id = running_backward();
  // A backward inside another is part of it.
  if (id < 0 || backward_ >= 0) return;
  backward_ = id;
  previous_ = current_ = -1;
  wake_all();
  for (const auto& unit : units_) {
    unit->used_ = false;
    unit->handed_over_ = false;
  }
  const auto lives = std::make_shared<int>(id);
  backward_lives_ = lives;
  torch::autograd::Engine::get_default_engine().queue_callback(
      [this, lives] { finish_backward(*lives); });
}

void Units::gradient_arrived(Unit& unit, BackedParameter& parameter) {
  const std::lock_guard<std::recursive_mutex> lock(mutex_);
  enter_backward();
  unit.arrived_.push_back(&parameter);
  if (unit.arrived_.size() < unit.trainable()) return;
  hand_over(unit);
  // A frozen weight may be read after the last gradient of its unit: then the next unit's touch
  // releases it.
  if (unit.trainable() == unit.parameters_.size()) release(unit);
}

void Units::hand_over(Unit& unit) {
  const auto arrived = std::exchange(unit.arrived_, {});
  unit.handed_over_ = true;
  keeper_->reduce(unit, arrived);
}

void Units::finish_backward(int id) {
  const std::lock_guard<std::recursive_mutex> lock(mutex_);
  if (backward_ != id) return;
  for (const auto& unit : units_) {
    if (!unit->arrived_.empty()) hand_over(*unit);
  }
  keeper_->backward_end();
  backward_ = -1;
  if (in_whole_ == 0) release_all();
}

// One that threw never came to its end.
void Units::forget_broken_backward() {
  if (backward_ < 0 || !backward_lives_.expired()) return;
  backward_ = -1;
  for (const auto& unit : units_) {
    for (auto* const parameter : unit->arrived_) parameter->take_gradient();
    unit->arrived_.clear();
  }
  release_all();
}

}  // namespace lightning
