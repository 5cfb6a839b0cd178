#include "tools/lightning/convert.h"

#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <map>
#include <unordered_map>
#include <unordered_set>
#include <utility>
#include <vector>

#include "lightning/checkpoint/checkpoint_file.h"
#include "lightning/checkpoint/dcp.h"
#include "lightning/checkpoint/migration.h"
#include "lightning/checkpoint/safetensors.h"
#include "lightning/checkpoint/torch_file.h"
#include "lightning/errors.h"
#include "lightning/escaped.h"
#include "lightning/files.h"
#include "lightning/version.h"
#include "tools/lightning/checkpoint_view.h"
#include "tools/lightning/shown_text.h"

namespace lightning::tools {
namespace {

// What save_weights_only leaves out.
constexpr const char* kForResuming[] = {"callbacks",      "optimizer_states", "lr_schedulers",
                                        "MixedPrecision", "FSDPPrecision",    "exact_resume"};

bool ends_with(const std::string& text, const std::string& end) {
  return text.size() >= end.size() && text.compare(text.size() - end.size(), end.size(), end) == 0;
}

bool same_place(const std::string& a, const std::string& b) {
  struct stat first {
  }, second{};
  return ::stat(a.c_str(), &first) == 0 && ::stat(b.c_str(), &second) == 0 &&
         first.st_dev == second.st_dev && first.st_ino == second.st_ino;
}

std::string format_of(const std::string& path, const std::string& asked) {
  static const std::vector<std::string> kKnown = {"ckpt", "state_dict", "safetensors", "dcp"};
  if (!asked.empty()) {
    if (std::find(kKnown.begin(), kKnown.end(), asked) != kKnown.end()) return asked;
    throw MisconfigurationError(str("convert got the format \"", asked, "\". Known: ", join(kKnown),
                                    ".", did_you_mean(asked, kKnown)));
  }
  static const std::pair<const char*, const char*> kEnds[] = {
      {".ckpt", "ckpt"},      {".pt", "state_dict"},           {".pth", "state_dict"},
      {".bin", "state_dict"}, {".safetensors", "safetensors"}, {"/", "dcp"}};
  for (const auto& [end, format] : kEnds) {
    if (ends_with(path, end)) return format;
  }
  const auto name = path.substr(path.rfind('/') + 1);
  if (folder_exists(path) || name.find('.') == std::string::npos) return "dcp";
  throw MisconfigurationError(
      str("The name ", path,
          " does not tell the format: expected .ckpt, .pt, .pth, .safetensors or a folder. Name it "
          "with --format ckpt, state_dict, safetensors or dcp."));
}

const State& weights_of(const State& checkpoint, const std::string& from) {
  const auto* weights = checkpoint.find("state_dict");
  if (weights != nullptr && weights->is_dict()) return *weights;
  std::vector<std::string> keys;
  for (const auto& node : nodes_below(checkpoint)) keys.push_back('"' + node.name + '"');
  if (keys.size() > 10) keys.resize(10);
  throw CheckpointError(str("There are no weights in ", from,
                            ": it has neither a \"state_dict\" nor tensors under their names, but ",
                            keys.empty() ? "nothing" : join(keys), "."));
}

// ---- Weights ------------------------------------------------------------------------------------

struct NamedTensor {
  std::string name;
  const TensorState* tensor;
};

// The tensors of a state dict; those in dicts below it by their path.
void collect(const State& state, const std::string& path, std::vector<NamedTensor>& tensors,
             std::vector<std::string>& others, int depth = 0) {
  if (state.is<TensorState>()) {
    tensors.push_back({path, &state.as_tensor_state()});
  } else if (state.is_dict() && depth < kMostDepth) {
    for (const auto& [key, value] : state.as_dict()) {
      const auto name = path.empty() ? to_string(key) : path + "." + to_string(key);
      collect(value, name, tensors, others, depth + 1);
    }
  } else {
    others.push_back(path + " (" + state.type_name() + ")");
  }
}

std::string listed(const std::vector<std::string>& names) {
  constexpr size_t kMost = 20;
  const std::vector<std::string> first(
      names.begin(), names.begin() + static_cast<std::ptrdiff_t>(std::min(names.size(), kMost)));
  return escaped(join(first)) +
         (names.size() > kMost ? str(" and ", names.size() - kMost, " more") : "");
}

void note_tied(const std::vector<NamedTensor>& tensors, std::ostream& notes) {
  std::vector<std::string> order;
  std::map<std::string, std::vector<std::string>> by_place;
  for (const auto& [name, tensor] : tensors) {
    const auto place = place_of(*tensor);
    if (place.empty()) continue;
    auto& names = by_place[place];
    if (names.empty()) order.push_back(place);
    names.push_back(name);
  }
  for (const auto& place : order) {
    const auto& names = by_place[place];
    if (names.size() > 1) {
      notes << "tied tensors, each written on its own: " << listed(names) << '\n';
    }
  }
}

void note_dropped(const std::vector<std::string>& names, const char* what, std::ostream& notes) {
  if (!names.empty()) notes << "left out, " << what << ": " << listed(names) << '\n';
}

void note_dropped_keys(const State& checkpoint, std::ostream& notes) {
  std::vector<std::string> keys;
  for (const auto& [key, value] : checkpoint.as_dict()) {
    static_cast<void>(value);
    if (to_string(key) != "state_dict") keys.push_back(to_string(key));
  }
  note_dropped(keys, "no weights", notes);
}

void write_weights_file(const State& weights, const std::string& to,
                        std::map<std::string, std::string> metadata, std::ostream& notes) {
  std::vector<NamedTensor> tensors;
  std::vector<std::string> others;
  collect(weights, "", tensors, others);
  note_dropped(others, "no tensors", notes);
  note_tied(tensors, notes);
  SafetensorsContent content;
  for (const auto& [name, tensor] : tensors) content.tensors.emplace_back(name, tensor->whole());
  content.metadata = std::move(metadata);
  content.metadata.emplace("format", "pt");  // other readers ask for it
  write_safetensors(to, content);
}

// ---- Optimizers by the names of their parameters, as sharded folders have them ------------------

[[noreturn]] void refuse_optimizer(size_t number, const std::string& reason) {
  throw CheckpointError(str("optimizer_states[", number,
                            "] numbers its parameters, and a sharded "
                            "folder needs their names, which cannot be told here: ",
                            reason,
                            ". Convert with --weights-only, or let a Trainer with a sharded "
                            "strategy load the checkpoint and save it."));
}

bool is_buffer(const std::string& name) {
  for (const char* buffer : {"running_mean", "running_var", "num_batches_tracked"}) {
    if (name == buffer || ends_with(name, str(".", buffer))) return true;
  }
  return false;
}

// Every state of a weight's shape belongs to it; a number for each is enough to tell that not.
void check_shapes(const State& states, const std::unordered_map<int64_t, NamedTensor>& named,
                  size_t number) {
  for (const auto& [key, state] : states.as_dict()) {
    const auto* id = std::get_if<int64_t>(&key);
    const auto found = id != nullptr ? named.find(*id) : named.end();
    if (found == named.end()) {
      refuse_optimizer(number, str("it has a state for ", to_string(key), ", which no group has"));
    }
    for (const auto& [name, value] : state.as_dict()) {
      if (!value.is<TensorState>()) continue;
      const auto& sizes = value.as_tensor_state().sizes;
      if (sizes.empty() || sizes == found->second.tensor->sizes) continue;
      refuse_optimizer(
          number, str("the ", to_string(name), " of parameter ", *id, " is ",
                      at::IntArrayRef(sizes), ", but \"", found->second.name, "\" in its place is ",
                      at::IntArrayRef(found->second.tensor->sizes)));
    }
  }
}

std::vector<std::string> names_of_group(const State& group) {
  const auto* names = group.find("param_names");
  std::vector<std::string> texts;
  if (names == nullptr || !names->is<State::List>()) return texts;
  for (const auto& name : names->as_list()) {
    if (name.is<std::string>()) texts.push_back(name.as_string());
  }
  return texts;
}

// Which weight each number is: by the `param_names` of the groups where they are; else, for one
// group, by the order of the weights that are neither buffers nor tied to an earlier one.
std::unordered_map<int64_t, NamedTensor> name_parameters(const State& optimizer,
                                                         const std::vector<NamedTensor>& weights,
                                                         size_t number, std::ostream& notes) {
  std::vector<NamedTensor> parameters;
  std::unordered_map<std::string, NamedTensor> by_name;
  std::unordered_set<std::string> places;
  for (const auto& weight : weights) {
    by_name.emplace(weight.name, weight);
    const auto place = place_of(*weight.tensor);
    const bool is_tied = !place.empty() && !places.insert(place).second;
    if (!is_tied && !is_buffer(weight.name)) parameters.push_back(weight);
  }
  const auto& groups = optimizer.at("param_groups").as_list();
  std::unordered_map<int64_t, NamedTensor> named;
  for (const auto& group : groups) {
    const auto& ids = group.at("params").as_list();
    const auto names = names_of_group(group);
    const bool has_names = names.size() == ids.size();
    if (!has_names && groups.size() > 1) {
      refuse_optimizer(number, str("it has ", groups.size(), " groups without param_names"));
    }
    if (!has_names && ids.size() != parameters.size()) {
      refuse_optimizer(number,
                       str("it has ", ids.size(), " parameters, and there are ", parameters.size(),
                           " weights that are neither buffers nor tied"));
    }
    for (size_t i = 0; i < ids.size(); ++i) {
      if (!has_names) {
        named[ids[i].as_int()] = parameters[i];
        continue;
      }
      const auto found = by_name.find(names[i]);
      if (found == by_name.end()) {
        refuse_optimizer(number, str("\"", names[i], "\" is not among the weights"));
      }
      named[ids[i].as_int()] = found->second;
    }
    if (!has_names) {
      notes << "optimizer " << number
            << ": its parameters are taken to be in the order of the weights, which their shapes "
               "agree with\n";
    }
  }
  return named;
}

State by_name(const State& optimizer, const std::vector<NamedTensor>& weights, size_t number,
              std::ostream& notes) {
  const auto named = name_parameters(optimizer, weights, number, notes);
  const State empty = State::dict();
  const auto* found = optimizer.find("state");
  const State& states = found != nullptr && found->is_dict() ? *found : empty;
  check_shapes(states, named, number);
  State result = optimizer;
  State::Dict renamed;
  for (const auto& [key, state] : states.as_dict()) {
    renamed[named.at(std::get<int64_t>(key)).name] = state;
  }
  result["state"] = std::move(renamed);
  State::List groups;
  for (const auto& group : optimizer.at("param_groups").as_list()) {
    State::List names;
    for (const auto& id : group.at("params").as_list()) names.push_back(named.at(id.as_int()).name);
    groups.push_back(group);
    groups.back()["params"] = std::move(names);
  }
  result["param_groups"] = std::move(groups);
  return result;
}

// ---- Sharded folders ----------------------------------------------------------------------------

State sharded_tree(const State& checkpoint, const State& weights, const std::string& layout,
                   std::ostream& notes) {
  if (layout == "plain") return weights;
  State tree = State::dict({{layout == "fsdp" ? "model" : "state_dict", weights}});
  const auto* optimizers = checkpoint.find("optimizer_states");
  if (optimizers == nullptr) return tree;
  std::vector<NamedTensor> tensors;
  std::vector<std::string> others;
  collect(weights, "", tensors, others);
  size_t number = 0;
  for (const auto& optimizer : optimizers->as_list()) {
    tree[str("optimizer_", number)] = by_name(optimizer, tensors, number, notes);
    ++number;
  }
  return tree;
}

// Moves a whole folder to its place, in the place of what is there.
void replace_folder(const std::string& from, const std::string& to) {
  remove_checkpoint_file(to);
  if (::rename(from.c_str(), to.c_str()) == 0) return;
  const int reason = errno;
  remove_checkpoint_file(from);
  throw CheckpointError(str("Cannot write the checkpoint ", to, ": ", std::strerror(reason),
                            ". Give a folder that this user may write to."));
}

void write_folder(const State& checkpoint, const State& weights, const std::string& to,
                  const std::string& layout, std::ostream& notes) {
  const State tree = sharded_tree(checkpoint, weights, layout, notes);
  std::string place = to;
  while (place.size() > 1 && place.back() == '/') place.pop_back();
  const auto unfinished = str(place, ".", ::getpid(), ".tmp");
  try {
    if (layout == "plain") {
      note_dropped_keys(checkpoint, notes);
    } else {
      State rest = checkpoint;
      rest.as_dict().erase("state_dict");
      rest.as_dict().erase("optimizer_states");
      write_torch_file(rest, unfinished + "/meta.pt");
    }
    write_dcp(tree, unfinished);
  } catch (...) {
    remove_checkpoint_file(unfinished);
    throw;
  }
  replace_folder(unfinished, place);
}

// ---- The whole ----------------------------------------------------------------------------------

// As a Trainer's, also where only weights were there.
State trainer_checkpoint(State state, CheckpointFormat format, const std::string& from,
                         const ConvertOptions& options) {
  state = as_trainer_checkpoint(std::move(state), format);
  migrate_checkpoint(state, from);
  if (options.weights_only) {
    for (const char* key : kForResuming) state.as_dict().erase(key);
  }
  return state;
}

// What Python's load_from_checkpoint and validate(ckpt_path) ask for besides the weights.
void complete(State& state, std::ostream& notes) {
  if (state.contains("pytorch-lightning_version")) return;
  notes << "the input holds weights alone: a Trainer can load and evaluate the checkpoint, fit "
           "cannot resume from it\n";
  State whole = State::dict(
      {{"epoch", 0}, {"global_step", 0}, {"pytorch-lightning_version", kPythonLightningVersion}});
  for (const auto& [key, value] : state.as_dict()) whole[key] = value;
  state = std::move(whole);
}

std::string layout_of(const ConvertOptions& options, const State& checkpoint) {
  static const std::vector<std::string> kKnown = {"fsdp", "model_parallel", "plain"};
  if (options.layout.empty()) {
    return checkpoint.contains("pytorch-lightning_version") ? "fsdp" : "plain";
  }
  if (std::find(kKnown.begin(), kKnown.end(), options.layout) != kKnown.end()) {
    return options.layout;
  }
  throw MisconfigurationError(str("convert got the layout \"", options.layout, "\". Known: ",
                                  join(kKnown), ".", did_you_mean(options.layout, kKnown)));
}

// What --force may replace: a file, or a folder that holds a sharded checkpoint and nothing else.
void check_replaceable(const std::string& from, const std::string& to) {
  namespace fs = std::filesystem;
  const auto refuse = [&](const std::string& what) {
    throw CheckpointError(
        str("The output ", to, " ", what, ", which --force does not replace. Give another name."));
  };
  std::error_code ignored;
  const auto status = fs::status(to, ignored);
  if (fs::is_regular_file(status) || fs::is_symlink(fs::symlink_status(to, ignored))) return;
  if (!fs::is_directory(status)) refuse("is neither a file nor a folder");
  const auto folder = fs::weakly_canonical(to, ignored),
             input = fs::weakly_canonical(from, ignored);
  const auto within = input.lexically_relative(folder);
  if (!within.empty() && *within.begin() != "..") refuse("holds the input");
  for (const auto& entry : fs::directory_iterator(to, ignored)) {
    const auto& path = entry.path();
    const bool ours = path.filename() == ".metadata" || path.filename() == "meta.pt" ||
                      path.extension() == ".distcp";
    if (!ours) refuse(str("is a folder with other things in it (", path.filename().string(), ")"));
  }
}

void check_output(const std::string& from, const std::string& to, const ConvertOptions& options) {
  if (same_place(from, to)) {
    throw CheckpointError(str("The output ", to, " is the input. Give another name."));
  }
  if (!path_exists(to)) return;
  if (!options.force) {
    throw CheckpointError(str("The output ", to, " exists. Give another name, or --force."));
  }
  check_replaceable(from, to);
}

}  // namespace

void convert_checkpoint(const std::string& from, const std::string& to,
                        const ConvertOptions& options, std::ostream& notes) {
  const auto format = format_of(to, options.format);
  if (!options.layout.empty() && format != "dcp") {
    throw MisconfigurationError(str("convert got the layout \"", options.layout,
                                    "\" for the format ", format, "; only dcp has layouts."));
  }
  layout_of(options, State::dict());
  const auto input = detect_format(from);
  check_output(from, to, options);

  std::map<std::string, std::string> metadata;
  if (input == CheckpointFormat::kSafetensors && format == "safetensors") {
    metadata = read_safetensors_header(from).metadata;
  }
  State state = trainer_checkpoint(read_checkpoint_file(from), input, from, options);
  const State weights = weights_of(state, from);
  const bool replaces_folder = options.force && format != "dcp" && folder_exists(to);
  if (replaces_folder) {
    throw CheckpointError(str("The output ", to,
                              " is a folder, which a file does not replace. "
                              "Remove it, or give another name."));
  }
  if (format == "safetensors") {
    note_dropped_keys(state, notes);
    write_weights_file(weights, to, std::move(metadata), notes);
  } else if (format == "state_dict") {
    note_dropped_keys(state, notes);
    write_torch_file(weights, to);
  } else if (format == "ckpt") {
    complete(state, notes);
    write_torch_file(state, to);
  } else {
    const auto layout = layout_of(options, state);
    if (layout != "plain") complete(state, notes);
    write_folder(state, weights, to, layout, notes);
  }
}

}  // namespace lightning::tools
