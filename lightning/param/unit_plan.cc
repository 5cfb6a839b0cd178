#include "lightning/param/unit_plan.h"

#include <torch/nn/module.h>
#include <torch/nn/modules/container/moduledict.h>
#include <torch/nn/modules/container/modulelist.h>
#include <torch/nn/modules/container/sequential.h>
#include <torch/nn/modules/embedding.h>

#include <algorithm>
#include <map>
#include <set>
#include <unordered_map>

#include "lightning/errors.h"

namespace lightning {
namespace {

using torch::nn::Module;

// The tree of a model's modules, in the order in which they were registered.
struct Place {
  std::string name;
  const Module* module;
  int64_t parent;  // index of a Place; -1 for the model
  bool is_unit = false;
  int64_t unit = -1;  // index of a UnitPlan
};

void add_places(std::vector<Place>& places, const std::string& name, const Module& module,
                int64_t parent) {
  const auto here = static_cast<int64_t>(places.size());
  places.push_back({name, &module, parent});
  for (const auto& child : module.named_children()) {
    add_places(places, name.empty() ? child.key() : name + "." + child.key(), *child.value(), here);
  }
}

bool is_container(const Module& module) {
  return module.as<torch::nn::ModuleList>() != nullptr ||
         module.as<torch::nn::Sequential>() != nullptr ||
         module.as<torch::nn::ModuleDict>() != nullptr;
}

bool has_parameters(const Module& module) { return !module.parameters().empty(); }

bool has_layers(const Module& module) {
  for (const auto& child : module.children()) {
    if (has_parameters(*child)) return true;
  }
  return false;
}

// What `counts` takes of the children of one parent, where it takes two or more of one type.
template <class Parent, class Child>
bool mark_repeated(std::vector<Place>& places, Parent is_parent, Child counts) {
  std::map<std::pair<int64_t, std::string>, std::vector<Place*>> groups;
  for (auto& place : places) {
    if (place.parent < 0 || !is_parent(*places[static_cast<size_t>(place.parent)].module)) continue;
    if (counts(*place.module)) groups[{place.parent, place.module->name()}].push_back(&place);
  }
  bool any = false;
  for (auto& [key, group] : groups) {
    if (group.size() < 2) continue;
    any = true;
    for (auto* const place : group) place->is_unit = true;
  }
  return any;
}

void mark_blocks(std::vector<Place>& places) {
  const bool blocks = mark_repeated(places, is_container, [](const Module& module) {
    return !is_container(module) && has_layers(module);
  });
  if (blocks) return;
  mark_repeated(
      places, [](const Module&) { return true; },
      [](const Module& module) {
        // A table is read in a few rows, and seldom beside one of its kind.
        return !is_container(module) && has_parameters(module) &&
               module.as<torch::nn::Embedding>() == nullptr;
      });
}

// "BlockImpl" for "myproject::BlockImpl"; template arguments stay.
std::string last_name(const std::string& type) {
  const auto arguments = type.find('<');
  const auto colons = type.rfind("::", arguments);
  return colons == std::string::npos ? type : type.substr(colons + 2);
}

// "Block" for "BlockImpl", which TORCH_MODULE makes of it.
std::string without_impl(const std::string& type) {
  const std::string impl = "Impl";
  const bool ends =
      type.size() > impl.size() && type.compare(type.size() - impl.size(), impl.size(), impl) == 0;
  return ends ? type.substr(0, type.size() - impl.size()) : type;
}

bool is_type(const std::string& type, const std::string& wanted) {
  for (const auto& name : {type, last_name(type)}) {
    if (name == wanted || without_impl(name) == wanted) return true;
  }
  return false;
}

void mark_policy(std::vector<Place>& places, const std::vector<std::string>& policy) {
  for (const auto& wanted : policy) {
    bool found = false;
    for (auto& place : places) {
      if (place.name != wanted && !is_type(place.module->name(), wanted)) continue;
      found = true;
      place.is_unit = true;
    }
    if (found) continue;
    std::set<std::string> types;
    for (const auto& place : places) types.insert(without_impl(last_name(place.module->name())));
    const std::vector<std::string> known(types.begin(), types.end());
    throw MisconfigurationError(str("A policy names \"", wanted,
                                    "\", which is neither the type nor "
                                    "the name of a module of this model.",
                                    did_you_mean(wanted, known), " Its types: ", join(known), "."));
  }
}

int64_t common_ancestor(const std::vector<UnitPlan>& units, int64_t a, int64_t b) {
  // A unit comes after the one it lies in.
  while (a != b) (a > b ? a : b) = units[static_cast<size_t>(std::max(a, b))].parent;
  return a;
}

struct Owner {
  int64_t unit;
  PlannedParameter parameter;
};

// Each parameter once, in the order of named_parameters().
std::vector<Owner> find_owners(const std::vector<Place>& places,
                               const std::vector<UnitPlan>& units) {
  std::vector<Owner> owners;
  std::unordered_map<const void*, size_t> seen;
  for (const auto& place : places) {
    for (const auto& item : place.module->named_parameters(/*recurse=*/false)) {
      if (!item.value().defined()) continue;
      const auto [found, is_new] = seen.emplace(item.value().unsafeGetTensorImpl(), owners.size());
      if (is_new) {
        const auto name = place.name.empty() ? item.key() : place.name + "." + item.key();
        owners.push_back({place.unit, {name, item.value(), ""}});
      } else {
        auto& owner = owners[found->second];
        const auto common = common_ancestor(units, owner.unit, place.unit);
        if (common != place.unit || common != owner.unit) owner.parameter.tied_to = place.name;
        owner.unit = common;
      }
    }
  }
  return owners;
}

std::vector<UnitPlan> without_empty(std::vector<UnitPlan> units) {
  std::vector<UnitPlan> kept;
  std::vector<int64_t> index(units.size());
  for (size_t i = 0; i < units.size(); ++i) {
    const auto parent = units[i].parent < 0 ? -1 : index[static_cast<size_t>(units[i].parent)];
    if (i > 0 && units[i].parameters.empty()) {
      index[i] = parent;
      continue;
    }
    index[i] = static_cast<int64_t>(kept.size());
    units[i].parent = parent;
    kept.push_back(std::move(units[i]));
  }
  return kept;
}

}  // namespace

std::vector<UnitPlan> plan_units(const torch::nn::Module& model,
                                 const std::vector<std::string>& policy) {
  std::vector<Place> places;
  add_places(places, "", model, -1);
  if (policy.empty()) {
    mark_blocks(places);
  } else {
    mark_policy(places, policy);
  }

  std::vector<UnitPlan> units;
  for (size_t i = 0; i < places.size(); ++i) {
    auto& place = places[i];
    const auto parent = i == 0 ? -1 : places[static_cast<size_t>(place.parent)].unit;
    if (i == 0 || place.is_unit) {
      place.unit = static_cast<int64_t>(units.size());
      units.push_back({place.name, last_name(place.module->name()), parent, {}});
    } else {
      place.unit = parent;
    }
  }
  for (auto& owner : find_owners(places, units)) {
    units[static_cast<size_t>(owner.unit)].parameters.push_back(std::move(owner.parameter));
  }
  return without_empty(std::move(units));
}

}  // namespace lightning
