// Activation checkpointing: what a block computes is dropped after forward and computed anew in
// backward (replay.h), for a third more compute and a fraction of the memory. Gradients stay bit
// for bit what they are without it.
//
// By type or name of module, for any model and without a call in it:
//
//   ActivationCheckpoints checkpoints(model, {"Block"});
//   ...in each training step: const Scope scope = checkpoints.use();
//
// or by hand, anywhere in forward: `x = lightning::checkpoint([&] { return block(x); });`
#pragma once

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "lightning/fwd.h"
#include "lightning/param/replay.h"
#include "lightning/param/touch.h"
#include "lightning/scope.h"

namespace lightning {

// Runs a piece of forward and gives what it gives.
template <class Function>
auto checkpoint(Function&& function) {
  const Scope region = region_scope("lightning::checkpoint");
  return std::forward<Function>(function)();
}

// A region begins when a parameter of a chosen module is read and ends when one outside of that
// module is (or the first one again: the module is used a second time).
//
// Kept by whoever trains, as long as the model is trained; made after the model was moved and, in a
// sharding strategy, given its backings.
class ActivationCheckpoints {
 public:
  //   policy   types or names of modules (see plan_units); where they lie in each other the outer
  //            counts. Empty for the model's own repeated blocks.
  // Errors: MisconfigurationError for an entry that no module matches, and for modules that hold no
  // parameters of their own, whose use cannot be seen.
  ActivationCheckpoints(const torch::nn::Module& model,
                        const std::vector<std::string>& policy = {});
  ~ActivationCheckpoints();
  ActivationCheckpoints(const ActivationCheckpoints&) = delete;
  ActivationCheckpoints& operator=(const ActivationCheckpoints&) = delete;

  // Regions are recorded on this thread while it lives; around forward, without backward or with.
  // A parameter that got other data since (Module::to) is taken up again.
  Scope use();

 private:
  class Listener;
  struct Watched;

  void watch(Watched& watched);
  void touched(const Listener& listener, const BackedParameter& parameter);

  std::unique_ptr<Backing> backing_;  // of parameters that have none
  std::vector<std::unique_ptr<Listener>> listeners_;
  std::vector<std::unique_ptr<Watched>> parameters_;
  const Listener* current_ = nullptr;       // whose region is recorded
  const BackedParameter* first_ = nullptr;  // read in it
  bool others_ = false;                     // were read since
};

}  // namespace lightning
