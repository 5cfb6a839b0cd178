#include "lightning/param/activation_checkpoint.h"

#include <torch/csrc/autograd/graph_task.h>

#include "lightning/errors.h"
#include "lightning/param/unit_plan.h"

namespace lightning {
namespace {

// Of parameters that are always whole.
class Whole : public Backing {
 public:
  Whole() { set_asleep(true); }
  void before(Touch&) override {}
};

// The one whose use() lives on this thread.
thread_local ActivationCheckpoints* in_use = nullptr;

}  // namespace

class ActivationCheckpoints::Listener : public TouchListener {
 public:
  Listener(ActivationCheckpoints& checkpoints, std::string name)
      : checkpoints_(checkpoints), name_(std::move(name)) {}

  // Empty for what lies in no chosen module.
  const std::string& name() const { return name_; }
  void touched(BackedParameter& parameter) override {
    if (in_use == &checkpoints_) checkpoints_.touched(*this, parameter);
  }

 private:
  ActivationCheckpoints& checkpoints_;
  std::string name_;
};

struct ActivationCheckpoints::Watched {
  PlannedParameter planned;
  Listener* listener;
  std::unique_ptr<BackedParameter> own;  // null where a strategy has one
};

ActivationCheckpoints::ActivationCheckpoints(const torch::nn::Module& model,
                                             const std::vector<std::string>& policy)
    : backing_(std::make_unique<Whole>()) {
  const auto units = plan_units(model, policy);
  if (units.size() < 2) {
    throw MisconfigurationError(
        str("Activation checkpointing found no module to act on: ",
            policy.empty() ? "the model has no repeated blocks"
                           : "those named (" + join(policy) + ") hold no parameters of their own",
            ". Name the types of the blocks to compute anew, or use lightning::checkpoint in "
            "forward."));
  }
  std::vector<Listener*> of_unit;
  for (const auto& unit : units) {
    if (unit.parent > 0) {
      of_unit.push_back(of_unit[static_cast<size_t>(unit.parent)]);
    } else {
      listeners_.push_back(std::make_unique<Listener>(*this, unit.name));
      of_unit.push_back(listeners_.back().get());
    }
    for (const auto& planned : unit.parameters) {
      parameters_.push_back(std::make_unique<Watched>(Watched{planned, of_unit.back(), nullptr}));
      watch(*parameters_.back());
    }
  }
}

ActivationCheckpoints::~ActivationCheckpoints() {
  for (const auto& each : parameters_) {
    auto* const backed = backed_parameter(each->planned.tensor);
    if (each->own != nullptr) {
      if (each->own->is_in_place()) each->own->restore(each->own->memory());
    } else if (backed != nullptr && backed->listener() == each->listener) {
      backed->listen(nullptr);
    }
  }
}

void ActivationCheckpoints::watch(Watched& watched) {
  auto* backed = backed_parameter(watched.planned.tensor);
  if (backed == nullptr) {
    watched.own =
        std::make_unique<BackedParameter>(watched.planned.name, watched.planned.tensor, *backing_);
    backed = watched.own.get();
  }
  backed->listen(watched.listener);
}

Scope ActivationCheckpoints::use() {
  if (in_use == this) return nullptr;
  for (const auto& each : parameters_) {
    const auto* const backed = backed_parameter(each->planned.tensor);
    if (backed != nullptr && backed->listener() == each->listener) continue;
    each->own.reset();
    watch(*each);
  }
  auto* const before = std::exchange(in_use, this);
  current_ = nullptr;
  return scope_exit([this, before] {
    in_use = before;
    if (current_ != nullptr) end_region();
    current_ = nullptr;
  });
}

void ActivationCheckpoints::touched(const Listener& listener, const BackedParameter& parameter) {
  if (torch::autograd::get_current_graph_task_id() >= 0) return;  // a replay, or backward itself
  if (!recording_region()) current_ = nullptr;                    // backward ended it
  if (recording_region() && current_ == nullptr) return;          // a region by hand
  if (current_ == &listener && !(others_ && &parameter == first_)) {
    others_ |= &parameter != first_;
    return;
  }
  if (current_ != nullptr) end_region();
  current_ = nullptr;
  if (listener.name().empty()) return;
  begin_region("\"" + listener.name() + "\"");
  current_ = &listener;
  first_ = &parameter;
  others_ = false;
}

}  // namespace lightning
