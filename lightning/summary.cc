#include "lightning/summary.h"

#include <torch/nn/module.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <functional>
#include <typeinfo>
#include <unordered_set>
#include <utility>

#include "lightning/callback.h"
#include "lightning/errors.h"
#include "lightning/terminal.h"

namespace lightning {
namespace {

using NamedModule = std::pair<std::string, const torch::nn::Module*>;

// All submodules in the order of a walk from the top, the first name of each.
void collect(const torch::nn::Module& module, const std::string& prefix,
             std::unordered_set<const torch::nn::Module*>& seen, std::vector<NamedModule>& out) {
  for (const auto& child : module.named_children()) {
    if (!seen.insert(child.value().get()).second) continue;
    const std::string name = prefix.empty() ? child.key() : prefix + "." + child.key();
    out.emplace_back(name, child.value().get());
    collect(*child.value(), name, seen, out);
  }
}

struct Count {
  int64_t all = 0;
  int64_t trainable = 0;
};

Count count_parameters(const torch::nn::Module& module) {
  std::unordered_set<const void*> seen;
  Count count;
  for (const auto& parameter : module.parameters()) {
    if (!parameter.defined() || !seen.insert(parameter.unsafeGetTensorImpl()).second) continue;
    count.all += parameter.numel();
    if (parameter.requires_grad()) count.trainable += parameter.numel();
  }
  return count;
}

int64_t depth(const std::string& name) { return 1 + std::count(name.begin(), name.end(), '.'); }

LayerSummary summarize_layer(const NamedModule& named, const FlopCounts& flops) {
  const auto& [name, module] = named;
  const auto found = flops.find(name);
  return {name, layer_type(*module), count_parameters(*module).all, module->is_training(),
          found == flops.end() ? 0 : found->second};
}

// Commas between thousands.
std::string grouped(std::string digits) {
  const auto point = std::min(digits.find('.'), digits.size());
  for (auto at = static_cast<std::ptrdiff_t>(point) - 3; at > 0; at -= 3) {
    digits.insert(static_cast<size_t>(at), ",");
  }
  return digits;
}

std::string fixed(double value, int decimals) {
  char text[64];
  std::snprintf(text, sizeof(text), "%.*f", decimals, value);
  return text;
}

}  // namespace

std::string layer_type(const torch::nn::Module& module) {
  std::string name = class_name(typeid(module));
  const std::string suffix = "Impl";
  const auto arguments = std::min(name.find('<'), name.size());
  if (arguments > suffix.size() &&
      name.compare(arguments - suffix.size(), suffix.size(), suffix) == 0) {
    name.erase(arguments - suffix.size(), suffix.size());
  }
  return name;
}

Summary summarize(const torch::nn::Module& module, int64_t max_depth, int64_t parameter_bits,
                  const FlopCounts& flops) {
  if (max_depth < -1) {
    throw MisconfigurationError(str("ModelSummary got max_depth ", max_depth,
                                    ", expected -1 (all layers), 0 (none) or more."));
  }
  std::unordered_set<const torch::nn::Module*> seen = {&module};
  std::vector<NamedModule> modules;
  collect(module, "", seen, modules);

  Summary summary;
  int64_t shown = 0;
  for (const auto& named : modules) {
    ++(named.second->is_training() ? summary.train_modules : summary.eval_modules);
    if (max_depth >= 0 && depth(named.first) > max_depth) continue;
    summary.layers.push_back(summarize_layer(named, flops));
    shown += summary.layers.back().parameters;
  }
  const Count count = count_parameters(module);
  summary.total_parameters = count.all;
  summary.trainable_parameters = count.trainable;
  // Nested layers are counted at every level, so what is left over shows at depth 1 only; and it is
  // too low where layers share parameters. So does the original.
  summary.leftover_parameters = std::max<int64_t>(0, count.all - shown);
  summary.size_mb = static_cast<double>(count.all) * static_cast<double>(parameter_bits) / 8 * 1e-6;
  const auto whole = flops.find("");
  summary.total_flops = whole == flops.end() ? 0 : whole->second;
  return summary;
}

std::vector<SummaryColumn> summary_columns(const Summary& summary) {
  std::vector<SummaryColumn> columns = {{" ", {}},      {"Name", {}}, {"Type", {}},
                                        {"Params", {}}, {"Mode", {}}, {"FLOPs", {}}};
  const auto add_row = [&](std::vector<std::string> cells) {
    for (size_t i = 0; i < columns.size(); ++i) columns[i].cells.push_back(std::move(cells[i]));
  };
  for (size_t i = 0; i < summary.layers.size(); ++i) {
    const LayerSummary& layer = summary.layers[i];
    add_row({std::to_string(i), layer.name, layer.type, human_readable_count(layer.parameters),
             layer.training ? "train" : "eval", human_readable_count(layer.flops)});
  }
  if (summary.leftover_parameters > 0) {
    add_row({" ", "other params", "n/a", human_readable_count(summary.leftover_parameters), "n/a",
             "n/a"});
  }
  return columns;
}

std::string format_summary(const Summary& summary) {
  const auto columns = summary_columns(summary);
  std::vector<int> widths;
  int rule_width = 3 * (static_cast<int>(columns.size()) + 1);
  for (const auto& column : columns) {
    int width = display_width(column.header);
    for (const auto& cell : column.cells) width = std::max(width, display_width(cell));
    widths.push_back(width);
    rule_width += width;
  }
  const auto line = [&](const std::function<const std::string&(const SummaryColumn&)>& cell) {
    std::vector<std::string> cells;
    for (size_t i = 0; i < columns.size(); ++i) {
      cells.push_back(pad_right(cell(columns[i]), widths[i]));
    }
    return join(cells, " | ") + "\n";
  };
  const std::string rule = std::string(static_cast<size_t>(rule_width), '-') + "\n";
  std::string out =
      line([](const SummaryColumn& c) -> const std::string& { return c.header; }) + rule;
  for (size_t row = 0; row < columns[0].cells.size(); ++row) {
    out += line([row](const SummaryColumn& c) -> const std::string& { return c.cells[row]; });
  }
  out += rule;
  const int64_t frozen = summary.total_parameters - summary.trainable_parameters;
  const std::pair<std::string, const char*> totals[] = {
      {human_readable_count(summary.trainable_parameters), "Trainable params"},
      {human_readable_count(frozen), "Non-trainable params"},
      {human_readable_count(summary.total_parameters), "Total params"},
      {formatted_model_size(summary.size_mb), "Total estimated model params size (MB)"},
      {std::to_string(summary.train_modules), "Modules in train mode"},
      {std::to_string(summary.eval_modules), "Modules in eval mode"},
      {human_readable_count(summary.total_flops), "Total Flops"}};
  for (const auto& [value, label] : totals) out += pad_right(value, 10) + label + "\n";
  out.pop_back();
  return out;
}

std::string human_readable_count(int64_t number) {
  static const char* const units[] = {" ", "K", "M", "B", "T"};
  const auto digits = static_cast<int>(std::to_string(number).size());
  const int group = std::min((digits + 2) / 3, 5) - 1;
  const double value = static_cast<double>(number) * std::pow(10.0, -3 * group);
  if (group < 1 || value >= 100) {
    return grouped(std::to_string(static_cast<int64_t>(value))) + " " + units[group];
  }
  return grouped(fixed(value, 1)) + " " + units[group];
}

std::string formatted_model_size(double megabytes) { return grouped(fixed(megabytes, 3)); }

}  // namespace lightning
