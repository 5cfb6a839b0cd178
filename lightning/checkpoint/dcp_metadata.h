// The `.metadata` of a folder of torch.distributed.checkpoint: which tensors and values there are,
// in what chunks, and where their bytes lie. Needs no LibTorch. The bytes are in FORMATS.md.
// Source: torch 2.11, `torch.distributed.checkpoint.metadata` and `.filesystem`.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <variant>
#include <vector>

#include "lightning/checkpoint/dtype.h"

namespace lightning {

struct DcpMetadata {
  struct Place {
    std::string file;  // in the folder; has no "/"
    uint64_t offset = 0;
    uint64_t bytes = 0;
  };
  struct Chunk {
    std::vector<int64_t> offsets;
    std::vector<int64_t> sizes;
    Place place;  // no file where a size is 0
  };
  struct Item {
    std::string fqn;  // the keys of its path, joined with "."
    // The way from the root: dict keys and list indices; empty where the file does not say.
    std::vector<std::variant<int64_t, std::string>> path;
    bool is_tensor = false;
    DType dtype = DType::kFloat32;
    std::vector<int64_t> sizes;
    std::vector<Chunk> chunks;  // of a tensor
    Place place;                // of another value: an item that is a torch.save of it
  };
  std::vector<Item> items;

  const Item* find(const std::string& fqn) const;

  // The items in the order of the tree, where the file says it.
  // Errors: CheckpointError that says what is wrong, without the folder's name: not such a pickle,
  // a file name that leaves the folder, chunks that lie outside their tensor, overlap or leave a
  // hole, items that overlap in a file or are too short for their tensor, sizes that overflow,
  // streams that are compressed.
  static DcpMetadata parse(std::string_view pickle);
  // What the ranks of a save wrote, as one: their chunks of a tensor together, a chunk that several
  // wrote (a replica) once, from the first of them.
  // Errors: as parse(), and for ranks that disagree on what an item is.
  static DcpMetadata merge(std::vector<Item> parts);
  std::string to_pickle() const;

 private:
  void check() const;

  mutable std::unordered_map<std::string, size_t> index_;
};

}  // namespace lightning
