// The CheckpointIO of this build: one safetensors file, whose metadata holds what is not a tensor.
//
// A tensor stands under its path in the tree, "state_dict.net.0.weight". `__metadata__` has
// "format": "pt" (which other readers of such files ask for) and "lightning_state": the tree as
// JSON, with maps of one key for what JSON lacks:
//
//   {"dict": [[key, value], ...]}   in order; keys are ints and strings
//   {"tuple": [...]}   {"tensor": "name"}   {"float": "inf" | "-inf" | "nan"}
//
// Numbers with a fraction or an exponent are floats, others ints.
#include <ftw.h>
#include <sys/stat.h>

#include <cerrno>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <nlohmann/json.hpp>
#include <unordered_map>
#include <unordered_set>

#include "lightning/checkpoint/checkpoint_io.h"
#include "lightning/checkpoint/safetensors.h"
#include "lightning/errors.h"

namespace lightning {
namespace {

using Tree = nlohmann::json;

constexpr const char* kTreeKey = "lightning_state";
// Of the tree as saved. A node takes up to three levels of JSON.
constexpr int kMostDepth = 100;

std::string text_of(const State::Key& key) {
  const auto* text = std::get_if<std::string>(&key);
  return text != nullptr ? *text : std::to_string(std::get<int64_t>(key));
}

class Encoder {
 public:
  Tree encode(const State& state, const std::string& path, int depth = 0) {
    if (depth > kMostDepth) {
      throw CheckpointError(str("The state is nested more than ", kMostDepth, " deep at \"",
                                path.substr(0, 100), "...\". Save flatter values."));
    }
    if (state.is_none()) return nullptr;
    if (state.is<bool>()) return state.as_bool();
    if (state.is<int64_t>()) return state.as_int();
    if (state.is<double>()) return number(state.as_double());
    if (state.is<std::string>()) return checked(state.as_string(), path);
    if (state.is<TensorState>()) return tensor(state.as_tensor_state(), path);
    if (state.is<State::List>()) return list(state, path, depth);
    if (state.is<State::Tuple>()) return {{"tuple", list(state, path, depth)}};
    Tree items = Tree::array();
    for (const auto& [key, value] : state.as_dict()) {
      const auto below = joined(path, text_of(key));
      Tree name = std::visit([](const auto& k) { return Tree(k); }, key);
      if (name.is_string()) checked(text_of(key), below);
      items.push_back(Tree::array({std::move(name), encode(value, below, depth + 1)}));
    }
    return {{"dict", std::move(items)}};
  }

  SafetensorsContent content;

 private:
  static std::string joined(const std::string& path, const std::string& key) {
    return path.empty() ? key : path + "." + key;
  }

  static Tree number(double value) {
    if (std::isnan(value)) return {{"float", "nan"}};
    if (std::isinf(value)) return {{"float", value > 0 ? "inf" : "-inf"}};
    return value;
  }

  static Tree checked(const std::string& text, const std::string& path) {
    Tree value = text;
    try {
      value.dump();
    } catch (const Tree::exception&) {
      throw CheckpointError(str("The text at \"", path,
                                "\" is not UTF-8, which a checkpoint cannot hold. Encode it."));
    }
    return value;
  }

  Tree list(const State& state, const std::string& path, int depth) {
    Tree items = Tree::array();
    size_t index = 0;
    for (const auto& item : state.as_list()) {
      items.push_back(encode(item, joined(path, std::to_string(index++)), depth + 1));
    }
    return items;
  }

  Tree tensor(const TensorState& value, const std::string& path) {
    if (value.chunks.size() != 1 || value.chunks[0].sizes != value.sizes) {
      throw CheckpointError(str("The tensor \"", path, "\" is here in ", value.chunks.size(),
                                " chunks; this file format holds whole ones. Gather it first."));
    }
    // Two paths can read the same: the key "a.b", and "b" under "a".
    std::string name = path.empty() ? "value" : path;
    while (name == "__metadata__" || names_.count(name) > 0) name += "~";
    names_.insert(name);
    content.tensors.emplace_back(name, value.whole());
    return {{"tensor", name}};
  }

  std::unordered_set<std::string> names_;
};

class Decoder {
 public:
  explicit Decoder(const SafetensorsContent& content) {
    for (const auto& [name, tensor] : content.tensors) tensors_.emplace(name, tensor);
  }

  State decode(const Tree& tree) const {
    if (tree.is_null()) return {};
    if (tree.is_boolean()) return tree.get<bool>();
    if (tree.is_number_float()) return tree.get<double>();
    if (tree.is_number()) return integer(tree);
    if (tree.is_string()) return tree.get<std::string>();
    if (tree.is_array()) return list(tree);
    if (tree.size() != 1) refuse("a map does not have one key");
    const auto item = tree.begin();
    if (item.key() == "tuple") return State::Tuple{list(item.value())};
    if (item.key() == "dict") return dict(item.value());
    if (item.key() == "tensor") return tensor(item.value());
    if (item.key() == "float") return number(item.value());
    refuse("\"" + item.key() + "\" is not known");
  }

 private:
  [[noreturn]] static void refuse(const std::string& what) {
    throw CheckpointError("its tree is broken: " + what);
  }

  static int64_t integer(const Tree& tree) {
    const bool too_large =
        tree.is_number_unsigned() &&
        tree.get<uint64_t>() > static_cast<uint64_t>(std::numeric_limits<int64_t>::max());
    if (too_large) refuse("an integer is too large");
    return tree.get<int64_t>();
  }

  static double number(const Tree& tree) {
    if (tree == "inf") return INFINITY;
    if (tree == "-inf") return -INFINITY;
    if (tree == "nan") return NAN;
    refuse("a float is not inf, -inf or nan");
  }

  State::List list(const Tree& tree) const {
    if (!tree.is_array()) refuse("a tuple is no list");
    State::List items;
    items.reserve(tree.size());
    for (const auto& item : tree) items.push_back(decode(item));
    return items;
  }

  State dict(const Tree& tree) const {
    if (!tree.is_array()) refuse("a dict is no list of pairs");
    State::Dict items;
    for (const auto& pair : tree) {
      if (!pair.is_array() || pair.size() != 2) refuse("a dict is no list of pairs");
      if (pair[0].is_string()) {
        items[pair[0].get<std::string>()] = decode(pair[1]);
      } else if (pair[0].is_number_integer()) {
        items[integer(pair[0])] = decode(pair[1]);
      } else {
        refuse("a key is neither string nor integer");
      }
    }
    return items;
  }

  State tensor(const Tree& tree) const {
    const auto found = tree.is_string() ? tensors_.find(tree.get<std::string>()) : tensors_.end();
    if (found == tensors_.end()) refuse("a tensor it names is not in the file");
    return found->second;
  }

  std::unordered_map<std::string, at::Tensor> tensors_;
};

// Bounds the nesting before anything walks the tree.
Tree parse(const std::string& text) {
  const auto watch = [](int depth, Tree::parse_event_t, Tree&) {
    if (depth > 3 * kMostDepth + 3) {
      throw CheckpointError("its tree is broken: it is nested too deep");
    }
    return true;
  };
  try {
    return Tree::parse(text, watch);
  } catch (const Tree::exception& error) {
    throw CheckpointError(str("its tree is broken: ", error.what()));
  }
}

bool begins_as_zip(const std::string& path) {
  char begin[4] = {};
  if (std::FILE* file = std::fopen(path.c_str(), "rb")) {
    const size_t got = std::fread(begin, 1, sizeof(begin), file);
    std::fclose(file);
    return got == sizeof(begin) && std::memcmp(begin, "PK\3\4", sizeof(begin)) == 0;
  }
  return false;
}

// What can be told of a file before it is read.
void check_readable(const std::string& path) {
  struct stat found {};
  if (::stat(path.c_str(), &found) != 0) {
    throw CheckpointError(str("Cannot load the checkpoint ", path, ": ", std::strerror(errno),
                              ". Check the path; a relative one starts at the working directory."));
  }
  if (S_ISDIR(found.st_mode)) {
    throw CheckpointError(str("Cannot load the checkpoint ", path,
                              ": it is a folder, as sharded checkpoints are, which this version "
                              "does not read. Give a checkpoint that is one file."));
  }
  if (begins_as_zip(path)) {
    throw CheckpointError(str("Cannot load the checkpoint ", path,
                              ": it is a zip file, as torch.save and Python's Lightning write "
                              "them, which this version does not read. Give a checkpoint that "
                              "this program wrote."));
  }
}

class SafetensorsIO : public CheckpointIO {
 public:
  void save(const State& checkpoint, const std::string& path) override {
    Encoder encoder;
    const Tree tree = encoder.encode(checkpoint, "");
    encoder.content.metadata = {{"format", "pt"}, {kTreeKey, tree.dump()}};
    write_safetensors(path, encoder.content);
  }

  State load(const std::string& path) override {
    check_readable(path);
    SafetensorsContent content;
    try {
      content = read_safetensors(path);
    } catch (const CheckpointError& error) {
      throw CheckpointError(str(error.what(),
                                " As a checkpoint it is torn or of another program; "
                                "load an earlier one."));
    }
    const auto tree = content.metadata.find(kTreeKey);
    if (tree == content.metadata.end()) {
      throw CheckpointError(str("Cannot load the checkpoint ", path,
                                ": it is a safetensors file of weights alone, without the state of "
                                "a run. Read its tensors with read_safetensors()."));
    }
    try {
      return Decoder(content).decode(parse(tree->second));
    } catch (const CheckpointError& error) {
      throw CheckpointError(
          str("Cannot load the checkpoint ", path, ": ", error.what(), ". Load an earlier one."));
    }
  }

  // By nftw: LibTorch exports a copy of std::filesystem whose remove_all crashes in a program built
  // with another libstdc++.
  void remove(const std::string& path) override {
    struct stat found {};
    if (::lstat(path.c_str(), &found) != 0 && errno == ENOENT) return;
    const auto remove_one = [](const char* file, const struct stat*, int, FTW*) {
      return std::remove(file);
    };
    if (::nftw(path.c_str(), remove_one, 16, FTW_DEPTH | FTW_PHYS) != 0) {
      throw CheckpointError(str("Cannot remove the checkpoint ", path, ": ", std::strerror(errno),
                                ". Check the rights on it and on its folder."));
    }
  }
};

}  // namespace

std::shared_ptr<CheckpointIO> default_checkpoint_io() { return std::make_shared<SafetensorsIO>(); }

}  // namespace lightning
