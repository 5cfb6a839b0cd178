// Which parameters of a model are made whole together: its units. A block of a transformer is one;
// what is in no block (embeddings, the last norm, the head) is the root unit.
//
// Source: the role of `auto_wrap_policy` in Lightning 2.6's FSDPStrategy. Nothing is wrapped here:
// a plan is a list of parameters.
#pragma once

#include <ATen/core/Tensor.h>

#include <string>
#include <vector>

#include "lightning/fwd.h"

namespace lightning {

struct PlannedParameter {
  std::string name;  // the first of its names, as named_parameters() gives them
  at::Tensor tensor;
  // Of tied weights that lie further out than their own module's unit: another of their modules.
  std::string tied_to;
};

struct UnitPlan {
  std::string name;  // of its module: "blocks.3"; "" for the root
  std::string type;  // of its module: "BlockImpl"
  // The unit it lies in, by index; -1 for the root. A unit stays whole while units in it are used.
  int64_t parent = -1;
  std::vector<PlannedParameter> parameters;
};

// The units of a model, the root first and each before those in it. A parameter belongs to the
// innermost unit that holds it; one that is used in several (tied weights) to the innermost that
// holds them all. Units that are left without parameters are left out, but for the root.
//
//   policy   types ("Block", "BlockImpl", "torch::nn::Linear") or names ("encoder.layers.0") of
//            modules, each of which becomes a unit. Without a policy the model's own repeated
//            blocks do: modules of one type that stand side by side in a ModuleList, Sequential or
//            ModuleDict and have modules with parameters in them; where there are none, layers of
//            one type side by side.
//
// Errors: MisconfigurationError for an entry that no module of the model matches.
std::vector<UnitPlan> plan_units(const torch::nn::Module& model,
                                 const std::vector<std::string>& policy = {});

}  // namespace lightning
