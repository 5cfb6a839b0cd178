#include "tools/lightning/checkpoint_view.h"

#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <variant>

#include "lightning/checkpoint/dcp.h"
#include "lightning/checkpoint/safetensors.h"
#include "lightning/checkpoint/scalar_type.h"
#include "lightning/checkpoint/torch_file.h"
#include "lightning/errors.h"

namespace lightning::tools {
namespace {

uint64_t bytes_on_disk(const std::string& path) {
  struct stat found {};
  return ::stat(path.c_str(), &found) == 0 ? static_cast<uint64_t>(found.st_size) : 0;
}

// ---- The tree of a sharded folder, from its metadata alone --------------------------------------

TensorState tensor_of(const DcpMetadata::Item& item) {
  TensorState tensor;
  tensor.sizes = item.sizes;
  tensor.dtype = scalar_type(item.dtype);
  for (const auto& chunk : item.chunks) tensor.chunks.push_back({chunk.offsets, chunk.sizes, {}});
  return tensor;
}

TensorState tensor_of(const SafetensorsHeader::Entry& entry) {
  TensorState tensor;
  tensor.sizes = entry.sizes;
  tensor.dtype = entry.is_packed ? at::kFloat4_e2m1fn_x2 : scalar_type(entry.dtype);
  tensor.chunks.push_back({std::vector<int64_t>(entry.sizes.size(), 0), entry.sizes, {}});
  return tensor;
}

// Larger values are named, not read.
constexpr uint64_t kMostValueBytes = 1 << 20;

State value_of(const DcpReader& reader, const DcpMetadata::Item& item) {
  if (item.is_tensor) return tensor_of(item);
  if (item.place.bytes > kMostValueBytes) {
    return str("(a value of ", item.place.bytes, " bytes, not read)");
  }
  return reader.read_value(item.fqn);
}

// Puts the value at its path; dicts with the keys 0, 1, ... stand for lists until lists_of(). An
// item whose path leads through another value, or nowhere, stands under its whole name.
void place(State& root, const DcpMetadata::Item& item, State value) {
  State* node = &root;
  const bool is_path = !item.path.empty() && item.path.size() < static_cast<size_t>(kMostDepth);
  if (is_path) {
    for (const auto& step : item.path) {
      if (!node->is_none() && !node->is_dict()) {
        node = nullptr;
        break;
      }
      node = &std::visit([&](const auto& key) -> State& { return (*node)[key]; }, step);
    }
  }
  if (!is_path || node == nullptr || !node->is_none()) node = &root[item.fqn];
  *node = std::move(value);
}

void lists_of(State& state) {
  if (!state.is_dict()) return;
  auto& dict = state.as_dict();
  bool is_list = dict.size() > 0;
  for (auto& [key, value] : dict) {
    lists_of(value);
    is_list &= std::holds_alternative<int64_t>(key);
  }
  if (!is_list) return;
  State::List items;
  for (size_t i = 0; i < dict.size(); ++i) {
    const State* item = dict.find(static_cast<int64_t>(i));
    if (item == nullptr) return;
    items.push_back(*item);
  }
  state = std::move(items);
}

void open_folder(CheckpointView& view) {
  const DcpReader reader(view.path);
  std::map<std::string, CheckpointView::File> files;
  const auto file = [&](const std::string& name) -> CheckpointView::File& {
    auto& found = files[name];
    found.name = name;
    return found;
  };
  file(".metadata");
  view.tree = State::dict();
  for (const auto& item : reader.metadata().items) {
    if (!item.is_tensor && !item.place.file.empty()) ++file(item.place.file).values;
    for (const auto& chunk : item.chunks) {
      if (!chunk.place.file.empty()) ++file(chunk.place.file).chunks;
    }
    place(view.tree, item, value_of(reader, item));
  }
  lists_of(view.tree);
  const auto values = view.path + "/" + kFolderValues;
  view.lacks_values = ::access(values.c_str(), F_OK) != 0;
  if (!view.lacks_values) {
    file(kFolderValues);
    const State rest = read_torch_file(values, false);
    if (rest.is_dict() && view.tree.is_dict()) {
      for (const auto& [key, value] : rest.as_dict()) view.tree[key] = value;
    }
  }
  for (auto& [name, found] : files) {
    found.bytes = bytes_on_disk(view.path + "/" + name);
    view.bytes += found.bytes;
    view.files.push_back(found);
  }
}

}  // namespace

CheckpointView CheckpointView::open(const std::string& path) {
  CheckpointView view;
  view.path = path;
  view.format = detect_format(path);
  if (view.format == CheckpointFormat::kSharded) {
    open_folder(view);
    return view;
  }
  view.bytes = bytes_on_disk(path);
  if (view.format == CheckpointFormat::kTorch) {
    view.tree = read_torch_file(path, false);
    return view;
  }
  auto header = read_safetensors_header(path);
  view.metadata = std::move(header.metadata);
  view.tree = State::ordered_dict();
  view.tree.as_dict().reserve(header.entries.size());
  for (const auto& entry : header.entries) view.tree[entry.name] = tensor_of(entry);
  return view;
}

// ---- Sums ---------------------------------------------------------------------------------------

uint64_t bytes_of(const TensorState& tensor) {
  uint64_t bytes = c10::elementSize(tensor.dtype);
  for (const int64_t size : tensor.sizes) bytes *= static_cast<uint64_t>(size);
  return bytes;
}

std::string dtype_name(const TensorState& tensor) { return c10::getDtypeNames(tensor.dtype).first; }

std::string place_of(const TensorState& tensor) {
  std::string text;
  for (const auto& chunk : tensor.chunks) {
    const bool has_memory = chunk.tensor.defined() && chunk.tensor.layout() == at::kStrided &&
                            !chunk.tensor.is_meta() && chunk.tensor.numel() > 0;
    if (!has_memory) return "";
    text += str(chunk.tensor.const_data_ptr(), ' ', chunk.tensor.sizes(), chunk.tensor.strides(),
                tensor.dtype, ' ');
  }
  return text;
}

std::vector<NamedNode> nodes_below(const State& state) {
  std::vector<NamedNode> nodes;
  const auto add_dict = [&](const State::Dict& dict) {
    for (const auto& [key, value] : dict) nodes.push_back({to_string(key), &value});
  };
  const auto add_list = [&](const State::List& items, const std::string& before) {
    for (size_t i = 0; i < items.size(); ++i) nodes.push_back({str(before, i), &items[i]});
  };
  if (state.is_dict()) add_dict(state.as_dict());
  if (state.is<State::List>() || state.is<State::Tuple>()) add_list(state.as_list(), "");
  if (state.is<State::Set>()) add_list(state.as_set().items, "");
  if (state.is_object()) {
    const auto& object = state.as_object();
    add_list(object.arguments, "argument ");
    add_list(object.items, "item ");
    add_dict(object.entries);
    if (!object.attributes.is_none()) nodes.push_back({"attributes", &object.attributes});
  }
  return nodes;
}

void TensorTotals::add(const State& state) { add(state, 0); }

void TensorTotals::add(const State& state, int depth) {
  if (state.is<TensorState>()) {
    const auto& tensor = state.as_tensor_state();
    const auto place = place_of(tensor);
    ++tensors;
    ++by_dtype[dtype_name(tensor)];
    if (!place.empty() && !seen_.insert(place).second) return;
    bytes += bytes_of(tensor);
    elements += bytes_of(tensor) / std::max<uint64_t>(c10::elementSize(tensor.dtype), 1);
    return;
  }
  if (depth > kMostDepth) return;
  for (const auto& node : nodes_below(state)) add(*node.value, depth + 1);
}

}  // namespace lightning::tools
