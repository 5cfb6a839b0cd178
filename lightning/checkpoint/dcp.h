// Sharded checkpoints: folders of torch.distributed.checkpoint, read for any number of ranks and
// written by any.
#pragma once

#include <cstdint>
#include <functional>
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
  // What a box needs of a tensor: the chunks that meet it, where they lie in the mapped files if
  // they are aligned there, else copies of what lies in the box. Other chunks are not touched.
  TensorState read_part(const std::string& fqn, const std::vector<int64_t>& offsets,
                        const std::vector<int64_t>& sizes) const;
  State read_value(const std::string& fqn) const;
  // Compares the CRCs of all that read_part() of these boxes will need, by several threads at once.
  // Errors: as read(), of the first box with one.
  struct Box {
    std::string fqn;
    std::vector<int64_t> offsets;
    std::vector<int64_t> sizes;
  };
  void verify(const std::vector<Box>& boxes) const;
  // Some of the bytes of a tensor as they would lie in row-major order.
  // Errors: as read(); for bytes beyond its end.
  void read_bytes(const std::string& fqn, uint64_t offset, uint64_t bytes, void* to) const;

  // The tree of everything: containers whose keys on the way are list indices are lists, with None
  // where nothing was saved (an empty dict leaves no item); others are dicts. Items without a path
  // are in the root under their name. Keys of dicts are strings, since a save makes them so.
  //
  //   whole   false: each tensor has its chunks, which lie in the mapped files where an item is
  //           aligned there, and are copies where it is not
  State read_all(bool whole = true) const;
  // The same with what `leaf` gives for each item.
  using Leaf = std::function<State(const DcpMetadata::Item& item)>;
  State tree(const Leaf& leaf) const;

 private:
  struct File {
    std::shared_ptr<MappedFile> content;
    std::unordered_set<uint64_t> verified;  // offsets of items
  };

  void check_files() const;
  const DcpMetadata::Item& item(const std::string& fqn) const;
  void check_box(const DcpMetadata::Item& item, const std::vector<int64_t>& offsets,
                 const std::vector<int64_t>& sizes) const;
  TensorState part_of(const DcpMetadata::Item& item, const std::vector<int64_t>& offsets,
                      const std::vector<int64_t>& sizes) const;
  std::shared_ptr<MappedFile> content(const std::string& file) const;
  bool is_verified(const DcpMetadata::Place& place) const;
  void set_verified(const DcpMetadata::Place& place) const;
  TorchArchive open(const DcpMetadata::Place& place) const;
  at::Tensor read_box(const DcpMetadata::Item& item, const std::vector<int64_t>& offsets,
                      const std::vector<int64_t>& sizes) const;
  void fill_box(const DcpMetadata::Item& item, const std::vector<int64_t>& offsets,
                const at::Tensor& box) const;
  State read_item(const DcpMetadata::Item& item, bool whole) const;

  std::string folder_;
  bool verify_;
  DcpMetadata metadata_;
  mutable std::mutex mutex_;  // of files_
  mutable std::unordered_map<std::string, File> files_;
};

// What this rank writes of a tree: every chunk that it holds of the tree's tensors, and with rank 0
// what is no tensor, as __<rank>_0.distcp.
//
// All places are known before the first byte is written, so that the items can be sent to whoever
// writes the metadata meanwhile. The tree is kept alive; the values of its tensors are read by
// write().
//
// The tree is taken apart as Python does it: dicts by their keys, as strings; lists where they hold
// a tensor, a dict or such a list; all else (tuples, sets, lists of numbers) is one value. Empty
// dicts leave nothing, and of tensors only the elements: no Parameter, no requires_grad. A tensor
// that several ranks hold whole is written by each; give it no chunks on all but one of them to
// save the room.
//
// Source: torch 2.11, `torch.distributed.checkpoint._traverse`.
class DcpRankWriter {
 public:
  // Errors: CheckpointError as write_torch_file(); for a root that is no dict, for two values whose
  // keys join to one name, for chunks that are not what they say.
  DcpRankWriter(State state, int64_t rank);
  ~DcpRankWriter();
  DcpRankWriter(DcpRankWriter&&) noexcept;

  // For write_dcp_metadata().
  std::vector<DcpMetadata::Item> items() const;

  // A `.metadata` that is in the folder goes: what it describes is replaced. On any thread.
  // Errors: CheckpointError of the disk.
  void write(const std::string& folder) const;

 private:
  struct Plan;
  std::unique_ptr<Plan> plan_;
};

// Both. Gives the items.
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
