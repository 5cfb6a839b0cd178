#include "tools/lightning/show.h"

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>
#include <set>
#include <unordered_map>

#include "lightning/errors.h"
#include "lightning/escaped.h"
#include "lightning/terminal.h"
#include "tools/lightning/shown_text.h"

namespace lightning::tools {
namespace {

using Json = nlohmann::ordered_json;

constexpr size_t kMostValue = 120;  // characters of a value in the text
constexpr size_t kMostInline = 60;  // of a list or dict that stands on one line
constexpr int kMostColumns = 48;

std::string shape_text(const TensorState& tensor) {
  std::vector<std::string> sizes;
  for (const auto size : tensor.sizes) sizes.push_back(std::to_string(size));
  return "[" + join(sizes) + "]";
}

// The value of a 0-dim tensor, as far as it is an ordinary number.
State scalar_of(const TensorState& tensor) {
  const bool has_value = tensor.sizes.empty() && tensor.chunks.size() == 1 &&
                         tensor.chunks[0].tensor.defined() && tensor.chunks[0].tensor.is_cpu() &&
                         tensor.chunks[0].tensor.layout() == at::kStrided;
  if (!has_value) return {};
  const auto value = tensor.chunks[0].tensor;
  if (tensor.dtype == at::kBool) return value.item<bool>();
  if (at::isIntegralType(tensor.dtype, false) && !at::isBarebonesUnsignedType(tensor.dtype)) {
    return value.item<int64_t>();
  }
  if (tensor.dtype == at::kFloat) return static_cast<double>(value.item<float>());
  if (tensor.dtype == at::kDouble) return value.item<double>();
  return {};
}

bool is_container(const State& state) {
  return state.is_dict() || state.is<State::List>() || state.is<State::Tuple>() ||
         state.is<State::Set>() || state.is_object();
}

bool has_tensor(const State& state, int depth = 0) {
  if (state.is<TensorState>()) return true;
  if (depth > kMostDepth) return false;
  const auto nodes = nodes_below(state);
  return std::any_of(nodes.begin(), nodes.end(),
                     [&](const auto& node) { return has_tensor(*node.value, depth + 1); });
}

std::string value_text(const State& state, size_t most) {
  return shortened(escaped(state.repr(4 * most)), most);
}

// "list, 3 items", and the name of an object's class.
std::string container_text(const State& state, size_t below) {
  if (state.is_object()) return "object " + escaped(state.type_name());
  return str(escaped(state.type_name()), ", ", counted(below, "item"));
}

// Remembers the first path of each tensor's memory.
class Places {
 public:
  // The path of an earlier tensor that is the same memory; empty for the first.
  std::string shared(const TensorState& tensor, const std::string& path) {
    const auto place = place_of(tensor);
    if (place.empty()) return "";
    const auto [found, added] = first_.emplace(place, path);
    return added ? "" : found->second;
  }

 private:
  std::unordered_map<std::string, std::string> first_;
};

std::string joined(const std::string& path, const std::string& name) {
  return path.empty() ? name : path + "." + name;
}

// ---- Text ---------------------------------------------------------------------------------------

class Tree {
 public:
  explicit Tree(int depth) : depth_(depth) {}

  void add(const State& state, const std::string& name, const std::string& path, int level) {
    if (state.is<TensorState>()) {
      add_tensor(state.as_tensor_state(), name, path, level);
      return;
    }
    if (!is_container(state)) {
      lines_.push_back({indented(name, level), value_text(state, kMostValue), ""});
      return;
    }
    const auto nodes = nodes_below(state);
    if (!has_tensor(state)) {
      const auto whole = escaped(state.repr(4 * kMostInline));
      if (nodes.empty() || whole.size() <= kMostInline) {
        lines_.push_back({indented(name, level), shortened(whole, kMostValue), ""});
        return;
      }
    }
    TensorTotals totals;
    totals.add(state);
    lines_.push_back({indented(name, level), container_text(state, nodes.size()),
                      totals.tensors > 0 ? bytes_text(totals.bytes) : ""});
    if (level + 1 >= depth_ || level >= kMostDepth) return;
    for (const auto& node : nodes) add(*node.value, node.name, joined(path, node.name), level + 1);
  }

  void print(std::ostream& out) const {
    // A few long names do not push everything else to the right.
    int name_columns = 0, what_columns = 0;
    for (const auto& line : lines_) {
      const int name = display_width(line.name), what = display_width(line.what);
      if (name <= kMostColumns) name_columns = std::max(name_columns, name);
      if (what <= kMostColumns && !line.size.empty()) what_columns = std::max(what_columns, what);
    }
    for (const auto& line : lines_) {
      out << pad_right(line.name, name_columns) << "  ";
      if (line.size.empty()) {
        out << line.what << '\n';
      } else {
        out << pad_right(line.what, what_columns) << "  " << pad_left(line.size, 10) << '\n';
      }
    }
  }

 private:
  struct Line {
    std::string name, what, size;
  };

  static std::string indented(const std::string& name, int level) {
    return std::string(static_cast<size_t>(2 * level), ' ') + shortened(escaped(name), 200);
  }

  void add_tensor(const TensorState& tensor, const std::string& name, const std::string& path,
                  int level) {
    std::string what = str(tensor.is_parameter ? "Parameter " : "Tensor ", dtype_name(tensor), ' ',
                           shape_text(tensor));
    const State value = scalar_of(tensor);
    if (!value.is_none()) what += " = " + value.repr();
    if (tensor.chunks.size() != 1) what += ", " + counted(tensor.chunks.size(), "chunk");
    const auto shared = places_.shared(tensor, path);
    if (!shared.empty()) what += ", the memory of " + escaped(shared);
    lines_.push_back({indented(name, level), what, bytes_text(bytes_of(tensor))});
  }

  int depth_;
  Places places_;
  std::vector<Line> lines_;
};

std::string totals_text(const State& state) {
  TensorTotals totals;
  totals.add(state);
  std::vector<std::string> dtypes;
  for (const auto& [dtype, count] : totals.by_dtype) {
    dtypes.push_back(totals.by_dtype.size() == 1 ? dtype : str(count_text(count), " ", dtype));
  }
  return str(counted(totals.tensors, "tensor"), ", ", counted(totals.elements, "element"), ", ",
             bytes_text(totals.bytes), dtypes.empty() ? "" : ": ", join(dtypes));
}

const State* dict_at(const State& tree, const char* key) {
  const auto* found = tree.find(key);
  return found != nullptr && found->is_dict() ? found : nullptr;
}

// The weights of a checkpoint, or null.
const State* weights_of(const State& tree) {
  for (const char* key : {"state_dict", "model"}) {
    if (const auto* found = dict_at(tree, key)) return found;
  }
  return nullptr;
}

void add_objects(const State& state, std::set<std::string>& names, int depth = 0) {
  if (state.is_object()) names.insert(state.type_name());
  if (depth > kMostDepth) return;
  for (const auto& node : nodes_below(state)) add_objects(*node.value, names, depth + 1);
}

class Summary {
 public:
  explicit Summary(std::ostream& out) : out_(out) {}

  void line(const std::string& name, const std::string& what) {
    out_ << pad_right(name, 18) << what << '\n';
  }
  void values(const std::string& name, const State& dict) {
    out_ << name << '\n';
    for (const auto& node : nodes_below(dict)) {
      out_ << "  " << pad_right(shortened(escaped(node.name), 80), 15) << ' '
           << value_text(*node.value, kMostValue) << '\n';
    }
  }

 private:
  std::ostream& out_;
};

std::string heading(const CheckpointView& view) {
  const auto* version = view.tree.find("pytorch-lightning_version");
  std::string kind = view.format == CheckpointFormat::kSafetensors ? "weights" : "a tree";
  if (version != nullptr) {
    kind = str("Trainer checkpoint of Lightning ",
               version->is<std::string>() ? escaped(version->as_string()) : version->repr());
  }
  return str(escaped(view.path), ": ", kind, ", ", to_string(view.format), ", ",
             bytes_text(view.bytes));
}

void print_summary(const CheckpointView& view, std::ostream& out) {
  Summary summary(out);
  out << heading(view) << '\n';
  if (view.lacks_values)
    summary.line(kFolderValues, "not there: fit cannot resume from this folder");
  const auto& tree = view.tree;
  for (const char* key : {"epoch", "global_step"}) {
    if (const auto* value = tree.find(key)) summary.line(key, value_text(*value, kMostValue));
  }
  const auto* weights = weights_of(tree);
  if (weights != nullptr) summary.line("weights", totals_text(*weights));
  const auto* optimizers = tree.find("optimizer_states");
  if (optimizers != nullptr && optimizers->is<State::List>()) {
    summary.line("optimizers", str(optimizers->as_list().size(), ": ", totals_text(*optimizers)));
  }
  for (int i = 0;; ++i) {  // of a sharded folder
    const auto* optimizer = dict_at(tree, str("optimizer_", i).c_str());
    if (optimizer == nullptr) break;
    summary.line(str("optimizer_", i), totals_text(*optimizer));
  }
  const auto* schedulers = tree.find("lr_schedulers");
  if (schedulers != nullptr && schedulers->is<State::List>()) {
    summary.line("lr_schedulers", str(schedulers->as_list().size()));
  }
  summary.line("in total", totals_text(tree));
  if (const auto* callbacks = dict_at(tree, "callbacks")) {
    out << "callbacks\n";
    for (const auto& node : nodes_below(*callbacks)) {
      out << "  " << shortened(escaped(node.name), 200) << '\n';
    }
  }
  for (const char* key : {"hyper_parameters", "datamodule_hyper_parameters"}) {
    const auto* found = tree.find(key);
    if (found != nullptr && !nodes_below(*found).empty()) summary.values(key, *found);
  }
  if (!view.metadata.empty()) {
    State::Dict metadata;
    for (const auto& [key, value] : view.metadata) metadata[key] = value;
    summary.values("__metadata__", metadata);
  }
  std::set<std::string> objects;
  add_objects(tree, objects);
  if (!objects.empty()) {
    out << "objects of Python, by name (none of their code is run)\n";
    for (const auto& name : objects) out << "  " << escaped(name) << '\n';
  }
  if (!view.files.empty()) out << "files\n";
  for (const auto& file : view.files) {
    out << "  " << pad_right(escaped(file.name), 15) << ' ' << pad_left(bytes_text(file.bytes), 10);
    if (file.chunks + file.values > 0) {
      out << "  " << counted(file.chunks, "chunk") << ", " << counted(file.values, "value");
    }
    out << '\n';
  }
}

// ---- JSON ---------------------------------------------------------------------------------------

class JsonTree {
 public:
  explicit JsonTree(int depth) : depth_(depth) {}

  Json node(const State& state, const std::string& path, int level) {
    Json out;
    out["type"] = state.type_name();
    if (state.is<TensorState>()) {
      add_tensor(state.as_tensor_state(), path, out);
    } else if (is_container(state)) {
      const auto nodes = nodes_below(state);
      TensorTotals totals;
      totals.add(state);
      out["items"] = nodes.size();
      if (totals.tensors > 0) out["bytes"] = totals.bytes;
      if (level >= depth_ || level >= kMostDepth) return out;
      Json entries = Json::array();
      for (const auto& below : nodes) {
        Json entry;
        entry["key"] = below.name;
        entry.update(node(*below.value, joined(path, below.name), level + 1));
        entries.push_back(std::move(entry));
      }
      out["entries"] = std::move(entries);
    } else {
      out["value"] = value(state);
    }
    return out;
  }

 private:
  static Json value(const State& state) {
    if (state.is_none()) return nullptr;
    if (state.is<bool>()) return state.as_bool();
    if (state.is<int64_t>()) return state.as_int();
    if (state.is<double>() && std::isfinite(state.as_double())) return state.as_double();
    if (state.is<std::string>()) return state.as_string();
    return state.repr();
  }

  void add_tensor(const TensorState& tensor, const std::string& path, Json& out) {
    out["dtype"] = dtype_name(tensor);
    out["shape"] = tensor.sizes;
    out["bytes"] = bytes_of(tensor);
    if (tensor.is_parameter) out["is_parameter"] = true;
    if (tensor.chunks.size() != 1) out["chunks"] = tensor.chunks.size();
    const State scalar = scalar_of(tensor);
    if (!scalar.is_none()) out["value"] = value(scalar);
    const auto shared = places_.shared(tensor, path);
    if (!shared.empty()) out["shares"] = shared;
  }

  int depth_;
  Places places_;
};

void print_json(const CheckpointView& view, int depth, std::ostream& out) {
  Json all;
  all["path"] = view.path;
  all["format"] = to_string(view.format);
  all["bytes"] = view.bytes;
  if (view.format == CheckpointFormat::kSharded) all["has_meta"] = !view.lacks_values;
  if (!view.metadata.empty()) all["metadata"] = view.metadata;
  for (const auto& file : view.files) {
    all["files"].push_back({{"name", file.name},
                            {"bytes", file.bytes},
                            {"chunks", file.chunks},
                            {"values", file.values}});
  }
  TensorTotals totals;
  totals.add(view.tree);
  all["totals"] = {
      {"tensors", totals.tensors}, {"elements", totals.elements}, {"bytes", totals.bytes}};
  all["tree"] = JsonTree(depth).node(view.tree, "", 0);
  // Names that are no UTF-8 come with a replacement; control characters are escaped by JSON, and
  // everything beyond ASCII, so that a terminal is safe from those of Unicode too.
  out << all.dump(2, ' ', true, Json::error_handler_t::replace) << '\n';
}

}  // namespace

void show_checkpoint(const CheckpointView& view, const ShowOptions& options, std::ostream& out) {
  if (options.json) {
    print_json(view, options.depth, out);
    return;
  }
  print_summary(view, out);
  if (options.depth <= 0) return;
  out << '\n';
  Tree tree(options.depth);
  if (is_container(view.tree)) {
    for (const auto& node : nodes_below(view.tree)) tree.add(*node.value, node.name, node.name, 0);
  } else {
    tree.add(view.tree, "(the whole file)", "", 0);
  }
  tree.print(out);
}

}  // namespace lightning::tools
