#include "loggers/graph.h"

#include <ATen/core/grad_mode.h>
#include <torch/csrc/jit/frontend/tracer.h>
#include <torch/csrc/jit/ir/ir.h>

#include <algorithm>
#include <sstream>
#include <unordered_map>
#include <utility>
#include <vector>

#include "lightning/log.h"
#include "lightning/module.h"
#include "lightning/scope.h"
#include "loggers/protobuf.h"

namespace lightning {
namespace {

namespace jit = torch::jit;

using NamedTensors = std::vector<std::pair<std::string, at::Tensor>>;

std::string slashes(std::string name) {
  std::replace(name.begin(), name.end(), '.', '/');
  return name;
}

void collect(const Batch& batch, const std::string& name, NamedTensors& out) {
  if (batch.is_tensor()) out.emplace_back(name, batch.tensor());
  for (size_t i = 0; batch.is_list() && i < batch.size(); ++i) {
    collect(batch.at(i), str(name, "/", i), out);
  }
  if (!batch.is_map()) return;
  for (const auto& [key, item] : batch.as_map()) collect(item, name + "/" + key, out);
}

// Eval mode while it lives, then each submodule's own mode again.
Scope eval_mode(LightningModule& module) {
  std::vector<std::pair<torch::nn::Module*, bool>> modes;
  modes.emplace_back(&module, module.is_training());
  for (const auto& part : module.modules(/*include_self=*/false)) {
    modes.emplace_back(part.get(), part->is_training());
  }
  module.eval();
  return scope_exit([modes] {
    // train() goes down the tree, and a module stands before its children in the list.
    for (const auto& [part, training] : modes) part->train(training);
  });
}

Batch example_on_device(LightningModule& module) {
  const auto parameters = module.parameters();
  const at::Device device = parameters.empty() ? at::Device(at::kCPU) : parameters[0].device();
  auto batch = module.on_before_batch_transfer(module.example_input_array, 0);
  return module.on_after_batch_transfer(
      module.transfer_batch_to_device(std::move(batch), device, 0), 0);
}

std::string attribute(const std::string& key, const std::string& value) {
  std::string entry;
  protobuf::bytes(entry, 1, key);
  protobuf::bytes(entry, 2, value);
  return entry;
}

std::string shape_attribute(const at::IntArrayRef& sizes) {
  std::string shape, list, value;
  for (const auto size : sizes) {
    std::string dim;
    protobuf::integer(dim, 1, size);
    protobuf::bytes(shape, 2, dim);
  }
  protobuf::bytes(list, 7, shape);
  protobuf::bytes(value, 1, list);
  return attribute("_output_shapes", value);
}

// tensorboard.NodeDef.
struct GraphNode {
  std::string name;
  std::string op;
  std::vector<std::string> inputs;
  std::string text;
  const jit::Value* shape_of = nullptr;

  std::string encoded() const {
    std::string out, shown;
    protobuf::text(out, 1, name);
    protobuf::text(out, 2, op);
    for (const auto& input : inputs) protobuf::text(out, 3, input);
    protobuf::bytes(shown, 2, text);
    protobuf::bytes(out, 5, attribute("attr", shown));
    const auto type = shape_of->type()->cast<c10::TensorType>();
    const auto sizes = type == nullptr ? std::nullopt : type->sizes().concrete_sizes();
    if (sizes) protobuf::bytes(out, 5, shape_attribute(*sizes));
    return out;
  }
};

std::string constant_text(const jit::Node& node) {
  const auto value =
      node.kind() == c10::prim::Constant ? jit::toIValue(node.output()) : std::nullopt;
  if (!value || value->isNone()) return "{}";
  std::ostringstream text;
  if (value->isTensor()) {
    text << "{value: tensor " << value->toTensor().sizes() << "}";
  } else {
    text << "{value: " << *value << "}";
  }
  return text.str();
}

// Gives each value of the graph its name, in the scope of the parameters it is computed with.
class Namer {
 public:
  explicit Namer(const NamedTensors& inputs) {
    for (const auto& [name, tensor] : inputs) input_names_.push_back(slashes(name));
  }

  const std::string& input(const jit::Value* value, size_t i) {
    return names_[value] = input_names_.at(i);
  }
  const std::string& output(const jit::Value* value, const jit::Node& node) {
    const auto where = scope(node);
    auto& name = names_[value];
    name = (where.empty() ? "" : where + "/") + node.kind().toUnqualString() + "_" +
           value->debugName();
    return name;
  }
  const std::string& of(const jit::Value* value) const { return names_.at(value); }

 private:
  std::string scope(const jit::Node& node) const {
    for (const auto* input : node.inputs()) {
      const auto known = names_.find(input);
      if (known == names_.end() || input->node()->kind() != c10::prim::Param) continue;
      const auto& name = known->second;
      const auto end = name.rfind('/');
      if (name.rfind("input/", 0) != 0 && name != "input" && end != std::string::npos) {
        return name.substr(0, end);
      }
    }
    return "";
  }

  std::vector<std::string> input_names_;
  std::unordered_map<const jit::Value*, std::string> names_;
};

std::string encode(const jit::Graph& graph, const NamedTensors& inputs) {
  constexpr int64_t kProducer = 22;  // what torch.utils.tensorboard writes
  std::string out, versions;
  Namer namer(inputs);
  const auto add = [&](const GraphNode& node) { protobuf::bytes(out, 1, node.encoded()); };
  for (size_t i = 0; i < graph.inputs().size(); ++i) {
    const auto* value = graph.inputs()[i];
    const auto& name = namer.input(value, i);
    if (value->hasUses()) add({name, "Parameter", {}, "", value});
  }
  for (const auto* node : graph.nodes()) {
    std::vector<std::string> sources;
    for (const auto* source : node->inputs()) sources.push_back(namer.of(source));
    for (const auto* value : node->outputs()) {
      add({namer.output(value, *node), node->kind().toQualString(), sources, constant_text(*node),
           value});
    }
  }
  for (size_t i = 0; i < graph.outputs().size(); ++i) {
    const auto* value = graph.outputs()[i];
    add({str("output/output.", i + 1), "IO Node", {namer.of(value)}, "", value});
  }
  protobuf::integer(versions, 1, kProducer);
  protobuf::bytes(out, 4, versions);
  return out;
}

}  // namespace

std::string traced_graph(LightningModule& module) {
  if (module.example_input_array.is_none()) {
    warn(
        "TensorBoardLogger(log_graph=true) writes no graph: set the module's "
        "example_input_array to an input of its forward.");
    return "";
  }
  const auto eval = eval_mode(module);
  const at::NoGradGuard no_grad;
  const Batch example = example_on_device(module);

  NamedTensors inputs;
  collect(example, "input", inputs);
  for (const auto& item : module.named_parameters()) inputs.emplace_back(item.key(), item.value());
  for (const auto& item : module.named_buffers()) inputs.emplace_back(item.key(), item.value());
  inputs.erase(std::remove_if(inputs.begin(), inputs.end(),
                              [](const auto& input) { return !input.second.defined(); }),
               inputs.end());
  jit::Stack stack;
  for (const auto& [name, tensor] : inputs) stack.emplace_back(tensor);

  const auto forward = [&](const jit::Stack&) {
    jit::Stack outputs;
    module.predict_forward(example).for_each_tensor(
        [&](const at::Tensor& tensor) { outputs.emplace_back(tensor); });
    return outputs;
  };
  const auto no_name = [](const at::Tensor&) { return std::string(); };
  const auto traced = jit::tracer::trace(stack, forward, no_name, /*strict=*/false);
  return encode(*traced.first->graph, inputs);
}

}  // namespace lightning
