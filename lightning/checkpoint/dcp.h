// Sharded checkpoints: folders of torch.distributed.checkpoint, read for any number of ranks and
// written by any.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "lightning/checkpoint/dcp_metadata.h"
#include "lightning/checkpoint/mapped_file.h"
#include "lightning/checkpoint/state.h"
#include "lightning/checkpoint/torch_archive.h"

namespace lightning {

// All members may be called from several threads at once.
class DcpReader {
 public:
  //   verify   compares the CRCs of an item when it is read for the first time
  // Errors: CheckpointError for a folder without `.metadata` (an unfinished save), for one that is
  // broken, and for files that are missing or too short for their items.
  explicit DcpReader(std::string folder, bool verify = true);

  const DcpMetadata& metadata() const { return metadata_; }

  // A box of a tensor, put together from the chunks that meet it: whatever number of ranks wrote
  // them. Contiguous, on the host, a copy.
  // Errors: CheckpointError for an unknown name, a box outside the tensor, a chunk whose item has
  // another shape or dtype, a flipped bit (CRC).
  at::Tensor read(const std::string& fqn, const std::vector<int64_t>& offsets,
                  const std::vector<int64_t>& sizes) const;
  at::Tensor read(const std::string& fqn) const;
  State read_value(const std::string& fqn) const;

  // The tree of everything: containers whose keys on the way are list indices are lists, with None
  // where nothing was saved (an empty dict leaves no item); others are dicts. Items without a path
  // are in the root under their name. Keys of dicts are strings, since a save makes them so.
  //
  //   whole   false: each tensor has its chunks, which lie in the mapped files where an item is
  //           aligned there, and are copies where it is not
  State read_all(bool whole = true) const;

 private:
  struct File {
    std::shared_ptr<MappedFile> content;
    std::unordered_set<uint64_t> verified;  // offsets of items
  };

  void check_files() const;
  const DcpMetadata::Item& item(const std::string& fqn) const;
  TorchArchive open(const DcpMetadata::Place& place) const;
  at::Tensor read_box(const DcpMetadata::Item& item, const std::vector<int64_t>& offsets,
                      const std::vector<int64_t>& sizes) const;
  State read_item(const DcpMetadata::Item& item, bool whole) const;

  std::string folder_;
  bool verify_;
  DcpMetadata metadata_;
  mutable std::mutex mutex_;  // of files_
  mutable std::unordered_map<std::string, File> files_;
};

// Writes what this rank holds of the tree: every chunk of its tensors, and with rank 0 what is no
// tensor, as __<rank>_0.distcp. Gives the items for write_dcp_metadata(). A `.metadata` that is in
// the folder goes first: what it describes is replaced.
//
// The tree is taken apart as Python does it: dicts by their keys, as strings; lists where they hold
// a tensor, a dict or such a list; all else (tuples, sets, lists of numbers) is one value. Empty
// dicts leave nothing, and of tensors only the elements: no Parameter, no requires_grad. A tensor
// that several ranks hold whole is written by each; give it no chunks on all but one of them to
// save the room.
//
// Errors: CheckpointError of the disk, and as write_torch_file(); for a root that is no dict, for
// two values whose keys join to one name, for chunks that are not what they say.
// Source: torch 2.11, `torch.distributed.checkpoint._traverse`.
std::vector<DcpMetadata::Item> write_dcp_rank(const State& state, const std::string& folder,
                                              int64_t rank);
// Completes the save: the items of all ranks, chunks of one tensor put together. Written last, so
// that a folder with `.metadata` is a whole checkpoint. Files of ranks that an earlier save in this
// folder had and this one has not are removed after that.
// Errors: CheckpointError for chunks that overlap or leave a hole, and for ranks that disagree.
void write_dcp_metadata(const std::vector<DcpMetadata::Item>& items, const std::string& folder);
// Both, by one process that holds everything.
void write_dcp(const State& state, const std::string& folder);

}  // namespace lightning
