#include "lightning/checkpoint/module_state.h"

#include <ATen/core/grad_mode.h>
#include <torch/nn/module.h>

#include <functional>
#include <unordered_set>

#include "lightning/errors.h"

namespace lightning {
namespace {

// Lists longer than this are cut: the first names tell what kind of model the file is of.
constexpr size_t kMostNamesShown = 20;

using Visit = std::function<void(const std::string& name, const at::Tensor& tensor)>;

void walk(const torch::nn::Module& module, const std::string& prefix, const Visit& visit) {
  for (const auto& item : module.named_parameters(/*recurse=*/false)) {
    visit(prefix + item.key(), item.value());
  }
  for (const auto& item : module.named_buffers(/*recurse=*/false)) {
    visit(prefix + item.key(), item.value());
  }
  for (const auto& item : module.named_children()) {
    if (item.value() != nullptr) walk(*item.value(), prefix + item.key() + ".", visit);
  }
}

std::string shown(c10::IntArrayRef sizes, at::ScalarType dtype) {
  return str(c10::getDtypeNames(dtype).first, " ", sizes);
}

std::string lines(const std::string& title, const std::vector<std::string>& names) {
  if (names.empty()) return "";
  std::string text = str("\n  ", title, " (", names.size(), "):");
  for (size_t i = 0; i < names.size() && i < kMostNamesShown; ++i) text += "\n    " + names[i];
  if (names.size() > kMostNamesShown) {
    text += str("\n    and ", names.size() - kMostNamesShown, " more");
  }
  return text;
}

// The state of a module, held against the module: what may be copied and what does not fit.
struct Comparison {
  std::vector<std::pair<at::Tensor, const TensorState*>> copies;  // to, from
  IncompatibleKeys keys;
  std::vector<std::string> misfits;
};

void compare_one(Comparison& result, const std::string& name, const at::Tensor& to,
                 const State& value) {
  if (!value.is<TensorState>()) {
    result.misfits.push_back(
        str(name, ": the state holds a ", value.type_name(), ", the module expects a tensor"));
    return;
  }
  const auto& from = value.as_tensor_state();
  const bool loses_imaginary = c10::isComplexType(from.dtype) && !to.is_complex();
  if (to.sizes() != c10::IntArrayRef(from.sizes) || loses_imaginary) {
    result.misfits.push_back(str(name, ": the state holds ", shown(from.sizes, from.dtype),
                                 ", the module expects ", shown(to.sizes(), to.scalar_type())));
  } else if (to.is_meta()) {
    result.misfits.push_back(name + ": the module's tensor is on the meta device, without storage");
  } else {
    result.copies.emplace_back(to, &from);
  }
}

Comparison compare(const torch::nn::Module& module, const State& state) {
  Comparison result;
  std::unordered_set<std::string> expected;
  walk(module, "", [&](const std::string& name, const at::Tensor& tensor) {
    expected.insert(name);
    if (const State* value = state.find(name)) {
      compare_one(result, name, tensor, *value);
    } else {
      result.keys.missing.push_back(name);
    }
  });
  for (const auto& [key, value] : state.as_dict()) {
    const auto* name = std::get_if<std::string>(&key);
    if (name == nullptr || expected.count(*name) == 0)
      result.keys.unexpected.push_back(to_string(key));
  }
  return result;
}

std::string advice(const Comparison& found) {
  const auto& [missing, unexpected] = found.keys;
  if (missing.empty() && unexpected.empty()) {
    return "Build the module with the sizes of the checkpoint.";
  }
  for (const auto& name : missing) {
    for (const auto& other : unexpected) {
      const auto ends_with = [](const std::string& text, const std::string& end) {
        return text.size() > end.size() &&
               text.compare(text.size() - end.size() - 1, end.size() + 1, "." + end) == 0;
      };
      if (ends_with(other, name) || ends_with(name, other)) {
        return str("\"", other, "\" and \"", name,
                   "\" differ by a prefix: rename the keys, or the "
                   "members of the module.");
      }
    }
  }
  return "Build the module as it was when the checkpoint was written, or load with strict false to "
         "take only the keys that both have.";
}

// Python's `Module._version` of each submodule, by its name: 2 where a norm keeps running
// statistics and counts its batches, 1 elsewhere.
void versions(const torch::nn::Module& module, const std::string& prefix, State& out) {
  const auto type = module.name();
  const bool counts =
      type.find("BatchNorm") != std::string::npos || type.find("InstanceNorm") != std::string::npos;
  out[prefix] = State::dict({{"version", counts ? 2 : 1}});
  for (const auto& item : module.named_children()) {
    if (item.value() == nullptr) continue;
    versions(*item.value(), prefix.empty() ? item.key() : prefix + "." + item.key(), out);
  }
}

}  // namespace

State module_state_dict(const torch::nn::Module& module) {
  State state = State::ordered_dict();
  walk(module, "",
       [&](const std::string& name, const at::Tensor& tensor) { state[name] = tensor.detach(); });
  auto metadata = State::ordered_dict();
  versions(module, "", metadata);
  auto as_ordered = *state.as_dict().python_class();
  as_ordered.attributes = State::dict({{"_metadata", std::move(metadata)}});
  state.as_dict().set_python_class(std::make_shared<State::Object>(std::move(as_ordered)));
  return state;
}

IncompatibleKeys load_module_state_dict(torch::nn::Module& module, const State& state, bool strict,
                                        const CopyTensor& copy) {
  auto found = compare(module, state);
  const bool fits = found.keys.missing.empty() && found.keys.unexpected.empty();
  if (!found.misfits.empty() || (strict && !fits)) {
    throw CheckpointError(str("The state does not fit the module \"", module.name(),
                              "\"; nothing was loaded.",
                              strict ? lines("missing from the state", found.keys.missing) : "",
                              strict ? lines("not in the module", found.keys.unexpected) : "",
                              lines("of another shape", found.misfits), "\n", advice(found)));
  }
  const at::NoGradGuard no_grad;
  if (copy == nullptr) {
    for (auto& [to, from] : found.copies) from->whole();  // or an error, before the first copy
  }
  for (auto& [to, from] : found.copies) {
    if (copy != nullptr) {
      copy(to, *from);
    } else {
      to.copy_(from->whole());
    }
  }
  return std::move(found.keys);
}

}  // namespace lightning
