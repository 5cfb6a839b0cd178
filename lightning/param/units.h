// Makes the parameters of a model whole unit by unit as they are used, and takes their gradients.
// A strategy says what gathering, releasing and reducing are (UnitKeeper); when each happens is
// decided here, by the touches of the model's own operators:
//   - forward: the first touch of a unit gathers it and releases the one before; units that this
//     one lies in (the root) stay;
//   - backward: likewise; when the gradients of all of a unit's trainable parameters are there they
//     are handed over and the unit is released. The unit that forward used last is still whole. At
//     the end of backward come the units of which some parameters got no gradient;
//   - the order learned in one pass says what to gather ahead in the next.
// So each unit is gathered once in forward and once in backward, the last one and the root once in
// all, for a model that uses its units one after another.
//
// Reading a parameter of a unit is allowed in use(), in backward and in whole(); elsewhere it is
// refused with the parameter's name: gathering is a collective act, and one rank that looks on its
// own would wait for the others for ever. Writing is allowed in whole(true) only.
//
// Calls to the keeper come on the thread that touches, one at a time.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "lightning/param/touch.h"
#include "lightning/param/unit_plan.h"
#include "lightning/scope.h"

namespace lightning {

class Units;

class Unit final : public Backing {
 public:
  ~Unit() override;

  const std::string& name() const { return name_; }  // "" for the root
  int64_t index() const { return index_; }
  const std::vector<std::unique_ptr<BackedParameter>>& parameters() const { return parameters_; }
  // True also while it is being gathered.
  bool is_whole() const { return state_ != State::kReleased; }

  void before(Touch& touch) override;

 private:
  friend class Units;
  enum class State { kReleased, kGathering, kWhole };

  Unit(Units& units, const UnitPlan& plan, int64_t index);
  size_t trainable() const;

  Units& units_;
  std::string name_;
  int64_t index_;
  int64_t parent_;
  std::vector<std::unique_ptr<BackedParameter>> parameters_;
  State state_ = State::kWhole;
  bool used_ = false;                      // since it was gathered, or since backward began
  bool handed_over_ = false;               // its gradients, in this backward
  uint64_t serial_ = 0;                    // of the operator that touched it last
  std::vector<BackedParameter*> arrived_;  // those with a gradient that was not handed over
};

// What a strategy does with a unit.
class UnitKeeper {
 public:
  virtual ~UnitKeeper() = default;

  // Before a parameter gets its backing: how it shall look.
  virtual BackedOptions look(const std::string& /*name*/, const at::Tensor& /*parameter*/) {
    return {};
  }
  // Once, while the unit is whole for the first time: keep what gather() will need. A parameter
  // from the meta device is not whole.
  virtual void take(Unit& unit) = 0;

  // Starts to make all parameters of the unit whole; wait() follows before they are read.
  virtual void gather(Unit& unit) = 0;
  virtual void wait(Unit& /*unit*/) {}
  virtual void release(Unit& unit);  // releases each parameter

  // Gradients of these parameters are there, in .grad(): those of all trainable ones, or at the end
  // of backward those that came. What is left in .grad() is added to by the next backward.
  virtual void reduce(Unit& unit, const std::vector<BackedParameter*>& arrived) = 0;
  // After the last reduce() of a backward.
  virtual void backward_end() {}

  // At the end of whole(true), while the unit is whole: keep what was written.
  virtual void write_back(Unit& unit) { take(unit); }

  // Completes "Parameter x is ...": "in 4 shards".
  virtual std::string placement() const { return "kept in parts"; }
};

struct UnitsOptions {
  // Units gathered ahead of their use.
  int64_t prefetch = 1;
  // False keeps units whole from forward to backward (SHARD_GRAD_OP).
  bool release_after_forward = true;
  // False keeps the root whole only as long as a unit outside of any other.
  bool keep_root = true;
};

class Units {
 public:
  // Puts the keeper behind all parameters of the plan, unit by unit: no more than one is held whole
  // beside what the model has.
  Units(const std::vector<UnitPlan>& plan, std::unique_ptr<UnitKeeper> keeper,
        const UnitsOptions& options = {});
  // Call restore() on the parameters, or leave them unreadable.
  ~Units();
  Units(const Units&) = delete;
  Units& operator=(const Units&) = delete;

  UnitKeeper& keeper() const { return *keeper_; }
  const std::vector<std::unique_ptr<Unit>>& units() const { return units_; }

  // Parameters may be read while one lives.
  //   backward_follows   keeps the last unit and the root whole at its end; else all are released
  // Errors: MisconfigurationError where a parameter was given other data since the last one.
  Scope use(bool backward_follows);

  // After an update of the optimizer, or any other change behind the parameters: what is whole is
  // old, and so are graphs from before.
  void changed();
  void release_all();

  // Everything whole, on purpose: on all ranks at the same time.
  //   write   what is written meanwhile counts
  Scope whole(bool write = false);
  // Likewise, one unit at a time, the root first.
  void for_each_whole(const std::function<void(Unit&)>& visit, bool write = false);

 private:
  friend class Unit;
  // Which unit followed which, by the two before it.
  using Order = std::map<std::pair<int64_t, int64_t>, int64_t>;

  void touched(Unit& unit, Touch& touch);
  void check_allowed(const Unit& unit, const Touch& touch) const;
  void enter(Unit& unit, uint64_t serial);
  void note_order(const Unit& unit);
  Order& order();
  int64_t expected_after(int64_t before, int64_t unit);
  void release_others(const Unit& unit, uint64_t serial);
  bool may_release(const Unit& unit) const;
  bool lies_in(const Unit& inner, const Unit& outer) const;
  void gather(Unit& unit);
  void finish_gathering(Unit& unit);
  void gather_ahead(const Unit& unit);
  void release(Unit& unit);
  void wake_all();

  void gradient_arrived(Unit& unit, BackedParameter& parameter);
  void hand_over(Unit& unit);
  void enter_backward();
  void finish_backward(int id);
  void forget_broken_backward();

  std::recursive_mutex mutex_;
  std::unique_ptr<UnitKeeper> keeper_;
  UnitsOptions options_;
  std::vector<std::unique_ptr<Unit>> units_;
  int64_t in_use_ = 0, in_whole_ = 0, in_writing_ = 0;  // scopes that are alive
  bool training_ = false;                               // the outermost use()'s backward_follows
  int backward_ = -1;                                   // autograd's number of it
  std::weak_ptr<void> backward_lives_;                  // expires with it, however it ends
  int64_t previous_ = -1, current_ = -1;                // units, in this pass
  Order forward_order_, evaluation_order_, backward_order_;
  std::map<int64_t, int64_t> reversed_;  // which unit came before which in forward
};

}  // namespace lightning
