#include "strategies/sharded_checkpoint.h"

#include <fcntl.h>
#include <stdio.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <exception>
#include <memory>
#include <optional>
#include <unordered_set>
#include <utility>
#include <variant>
#include <vector>

#include "lightning/checkpoint/atomic_file.h"
#include "lightning/checkpoint/checkpoint_file.h"
#include "lightning/checkpoint/dcp.h"
#include "lightning/checkpoint/mapped_file.h"
#include "lightning/checkpoint/migration.h"
#include "lightning/checkpoint/torch_archive.h"
#include "lightning/checkpoint/torch_file.h"
#include "lightning/checkpoint/unfinished_folder.h"
#include "lightning/errors.h"
#include "lightning/files.h"
#include "strategies/shard_keeper.h"

namespace lightning {
namespace {

using Item = DcpMetadata::Item;
using DcpKey = std::variant<int64_t, std::string>;

// ---- Items on their way to rank 0 ---------------------------------------------------------------

State list_of(const std::vector<int64_t>& numbers) {
  State::List list;
  for (const auto number : numbers) list.emplace_back(number);
  return list;
}

std::vector<int64_t> numbers_of(const State& list) {
  std::vector<int64_t> numbers;
  for (const auto& number : list.as_list()) numbers.push_back(number.as_int());
  return numbers;
}

State state_of(const DcpMetadata::Place& place) {
  return State::List{place.file, static_cast<int64_t>(place.offset),
                     static_cast<int64_t>(place.bytes)};
}

DcpMetadata::Place place_of(const State& state) {
  const auto& list = state.as_list();
  return {list[0].as_string(), static_cast<uint64_t>(list[1].as_int()),
          static_cast<uint64_t>(list[2].as_int())};
}

State state_of(const Item& item) {
  State::List path, chunks;
  for (const auto& key : item.path) {
    std::visit([&path](const auto& one) { path.emplace_back(one); }, key);
  }
  for (const auto& chunk : item.chunks) {
    chunks.emplace_back(
        State::List{list_of(chunk.offsets), list_of(chunk.sizes), state_of(chunk.place)});
  }
  return State::List{item.fqn,
                     std::move(path),
                     item.is_tensor,
                     static_cast<int64_t>(item.dtype),
                     list_of(item.sizes),
                     std::move(chunks),
                     state_of(item.place)};
}

Item item_of(const State& state) {
  const auto& list = state.as_list();
  Item item;
  item.fqn = list[0].as_string();
  for (const auto& key : list[1].as_list()) {
    if (key.is<int64_t>()) {
      item.path.emplace_back(key.as_int());
    } else {
      item.path.emplace_back(key.as_string());
    }
  }
  item.is_tensor = list[2].as_bool();
  item.dtype = static_cast<DType>(list[3].as_int());
  item.sizes = numbers_of(list[4]);
  for (const auto& chunk : list[5].as_list()) {
    const auto& parts = chunk.as_list();
    item.chunks.push_back({numbers_of(parts[0]), numbers_of(parts[1]), place_of(parts[2])});
  }
  item.place = place_of(list[6]);
  return item;
}

// ---- The folder ---------------------------------------------------------------------------------

// What goes into the ranks' files, and what does not.
std::pair<State, State> take_apart(const State& checkpoint, const std::string& model_key) {
  auto sharded = State::dict(), values = State::dict();
  for (const auto& [key, value] : checkpoint.as_dict()) {
    const auto name = to_string(key);
    if (name == "state_dict") {
      sharded[model_key] = value;
    } else if (name == "optimizer_states") {
      const auto& optimizers = value.as_list();
      for (size_t i = 0; i < optimizers.size(); ++i) sharded[str("optimizer_", i)] = optimizers[i];
    } else {
      values[key] = value;
    }
  }
  return {std::move(sharded), std::move(values)};
}

[[noreturn]] void fail(const std::string& path, int reason) {
  throw CheckpointError(
      str("Cannot save the checkpoint folder ", path, ": ", std::strerror(reason), "."));
}

// The two change places at once where the file system can do that, so that a whole checkpoint is at
// `path` at any moment.
void put_in_place(const std::string& made, const std::string& path) {
  if (::rename(made.c_str(), path.c_str()) != 0) {  // what is there is a file, or not empty
    const bool swapped =
        ::renameat2(AT_FDCWD, made.c_str(), AT_FDCWD, path.c_str(), RENAME_EXCHANGE) == 0;
    if (!swapped) {
      const auto aside = made + ".old";
      remove_checkpoint_file(aside);
      if (::rename(path.c_str(), aside.c_str()) != 0) fail(path, errno);
      if (::rename(made.c_str(), path.c_str()) != 0) fail(path, errno);
      remove_checkpoint_file(aside);
    }
    remove_checkpoint_file(made);
  }
  sync_folder(folder_of(path));
}

// ---- Reading ------------------------------------------------------------------------------------

// The names of parameters, and of what optimizers keep for each element of one. Which tensors are
// parameters is told by the optimizers' states; a tensor of which that is not known is taken whole.
std::unordered_set<std::string> cut_tensors(const DcpMetadata& metadata) {
  std::unordered_set<std::string> cut;
  for (const auto& item : metadata.items) {  // "optimizer_0", "state", "net.weight", "exp_avg"
    if (item.path.size() != 4 || item.path[1] != DcpKey("state") || item.sizes.empty()) continue;
    const auto* name = std::get_if<std::string>(&item.path[2]);
    for (const char* model : {"model.", "state_dict."}) {
      const auto* weight = name != nullptr ? metadata.find(model + *name) : nullptr;
      if (weight == nullptr || weight->sizes != item.sizes) continue;
      cut.insert(item.fqn);
      cut.insert(weight->fqn);
    }
  }
  return cut;
}

State as_checkpoint(State state, CheckpointFormat format, const std::string& path) {
  try {
    state = as_trainer_checkpoint(std::move(state), format);
  } catch (const CheckpointError& error) {
    throw CheckpointError(str("Cannot load the checkpoint ", path, ": ", error.what()));
  }
  migrate_checkpoint(state, path);
  return state;
}

// ---- A save -------------------------------------------------------------------------------------

// What went wrong in `work`; empty for nothing.
template <class F>
std::string error_of(F&& work) {
  try {
    work();
    return "";
  } catch (const std::exception& error) {
    return error.what();
  }
}

std::string first_error(const std::vector<std::string>& errors) {
  for (size_t rank = 0; rank < errors.size(); ++rank) {
    if (!errors[rank].empty()) return str("On rank ", rank, ": ", errors[rank]);
  }
  return "";
}

class ShardedSave {
 public:
  ShardedSave(State checkpoint, std::string path, std::string model_key, Collectives& ranks,
              SideChannel channel)
      : path_(std::move(path)), model_key_(std::move(model_key)), channel_(std::move(channel)) {
    while (path_.size() > 1 && path_.back() == '/') path_.pop_back();
    made_ = unfinished_folder(path_);
    begin(ranks);
    plan(std::move(checkpoint), ranks);
  }

  void write() {
    const auto own = error_of([this] { writer_->write(made_); });
    auto error = first_error(channel_.gather(name_ + "/written", own));
    if (channel_.rank() == 0) {
      if (error.empty()) error = error_of([this] { complete(); });
      if (!error.empty()) error_of([this] { remove_checkpoint_file(made_); });
    }
    check(channel_.broadcast(name_ + "/outcome", error));
  }

 private:
  void check(const std::string& error) const {
    if (error.empty()) return;
    throw CheckpointError(str("The checkpoint ", path_, " was not saved. ", error));
  }

  // The folder is there, and the save has a name.
  void begin(Collectives& ranks) {
    static int64_t saves = 0;  // of rank 0
    State begun;
    if (ranks.is_global_zero()) {
      const auto error = error_of([this] {
        remove_checkpoint_file(made_);
        held_ = hold_folder(made_);
      });
      begun = State::List{str(saves++), error};
    }
    begun = ranks.broadcast(std::move(begun));
    name_ = begun.as_list()[0].as_string();
    check(begun.as_list()[1].as_string());
  }

  void plan(State checkpoint, Collectives& ranks) {
    State::List items;
    const auto own = error_of([&] {
      auto [sharded, values] = take_apart(checkpoint, model_key_);
      if (ranks.is_global_zero()) values_ = std::move(values);
      writer_.emplace(std::move(sharded), ranks.global_rank());
      for (const auto& item : writer_->items()) items.push_back(state_of(item));
    });
    std::vector<std::string> errors;
    for (const auto& of_rank : ranks.all_gather_states(State::List{own, std::move(items)})) {
      errors.push_back(of_rank.as_list()[0].as_string());
      if (!ranks.is_global_zero()) continue;
      for (const auto& item : of_rank.as_list()[1].as_list()) items_.push_back(item_of(item));
    }
    check(first_error(errors));
  }

  void complete() {
    write_torch_file(values_, made_ + "/" + kFolderValues);
    write_dcp_metadata(items_, made_);
    put_in_place(made_, path_);
  }

  std::string path_, made_, model_key_;
  Scope held_;        // on rank 0: nobody takes `made_` for a leftover
  std::string name_;  // the same on all ranks
  SideChannel channel_;
  std::optional<DcpRankWriter> writer_;
  State values_;             // on rank 0, as those below
  std::vector<Item> items_;  // of all ranks
};

}  // namespace

std::function<void()> plan_sharded_save(State checkpoint, const std::string& path,
                                        const std::string& model_key, Collectives& ranks,
                                        SideChannel channel) {
  auto save = std::make_shared<ShardedSave>(std::move(checkpoint), path, model_key, ranks,
                                            std::move(channel));
  return [save] { save->write(); };
}

State load_sharded_checkpoint(const std::string& path, const ShardPlace& place) {
  const DcpReader reader(path);
  const auto cut = cut_tensors(reader.metadata());
  const auto box_of = [&](const Item& item) {
    DcpReader::Box box{item.fqn, std::vector<int64_t>(item.sizes.size(), 0), item.sizes};
    if (cut.count(item.fqn) == 0) return box;
    const auto rows = rows_of_part(item.sizes[0], place.part, place.parts);
    box.offsets[0] = rows.first;
    box.sizes[0] = rows.count;
    return box;
  };
  std::vector<DcpReader::Box> boxes;
  for (const auto& item : reader.metadata().items) {
    if (item.is_tensor) boxes.push_back(box_of(item));
  }
  reader.verify(boxes);
  State state = reader.tree([&](const Item& item) -> State {
    if (!item.is_tensor) return reader.read_value(item.fqn);
    const auto box = box_of(item);
    return reader.read_part(item.fqn, box.offsets, box.sizes);
  });
  add_folder_values(state, path);
  return as_checkpoint(std::move(state), CheckpointFormat::kSharded, path);
}

State load_file_in_shares(const std::string& path, const Collectives& ranks) {
  const TorchArchive archive(MappedFile::open(path), /*verify=*/false);
  archive.zip().verify_all(static_cast<size_t>(ranks.global_rank()),
                           static_cast<size_t>(ranks.world_size()));
  return as_checkpoint(read_torch_archive(archive), CheckpointFormat::kTorch, path);
}

}  // namespace lightning
