// A checkpoint opened to be looked at: what is in it and of what shape, without the bytes of its
// tensors. Nothing in the file is run, and no CRC is compared, so that opening takes no longer for
// 50 GB than for 50 KB.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <unordered_set>
#include <vector>

#include "lightning/checkpoint/checkpoint_file.h"
#include "lightning/checkpoint/state.h"

namespace lightning::tools {

struct CheckpointView {
  // Of a sharded folder.
  struct File {
    std::string name;
    uint64_t bytes = 0;
    uint64_t chunks = 0;  // of tensors
    uint64_t values = 0;
  };

  std::string path;
  CheckpointFormat format = CheckpointFormat::kTorch;
  uint64_t bytes = 0;  // on the disk
  // The tensors of a sharded folder and of a safetensors file have shapes and no values.
  State tree;
  std::map<std::string, std::string> metadata;  // of a safetensors file
  std::vector<File> files;                      // of a sharded folder
  bool lacks_values = false;                    // a sharded folder without meta.pt

  // Errors: CheckpointError, as read_checkpoint_file().
  static CheckpointView open(const std::string& path);
};

// What the tensors of a part of the tree take. One that lies where another does counts once.
struct TensorTotals {
  uint64_t tensors = 0;
  uint64_t elements = 0;
  uint64_t bytes = 0;
  std::map<std::string, uint64_t> by_dtype;  // how many tensors

  void add(const State& state);

 private:
  void add(const State& state, int depth);
  std::unordered_set<std::string> seen_;
};

// The same text for tensors that share their memory, of equal shape; empty where nothing is known.
std::string place_of(const TensorState& tensor);

uint64_t bytes_of(const TensorState& tensor);
std::string dtype_name(const TensorState& tensor);  // "float32"

// Walkers of trees go no deeper.
inline constexpr int kMostDepth = 200;
struct NamedNode {
  std::string name;
  const State* value;
};
// The nodes right below one: a dict's entries, the items of a list, what an object holds.
std::vector<NamedNode> nodes_below(const State& state);

}  // namespace lightning::tools
