#include "strategies/sharded_checkpoint.h"

#include <fcntl.h>
#include <stdio.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <utility>
#include <vector>

#include "lightning/checkpoint/atomic_file.h"
#include "lightning/checkpoint/checkpoint_file.h"
#include "lightning/checkpoint/dcp.h"
#include "lightning/checkpoint/migration.h"
#include "lightning/checkpoint/torch_file.h"
#include "lightning/errors.h"
#include "lightning/files.h"

namespace lightning {
namespace {

using Item = DcpMetadata::Item;

constexpr const char* kValues = "meta.pt";

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
std::pair<State, State> take_apart(const State& checkpoint) {
  auto sharded = State::dict(), values = State::dict();
  for (const auto& [key, value] : checkpoint.as_dict()) {
    const auto name = to_string(key);
    if (name == "state_dict") {
      sharded["model"] = value;
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
  const auto slash = path.rfind('/');
  sync_folder(slash == std::string::npos ? "." : path.substr(0, slash + 1));
}

}  // namespace

void save_sharded_checkpoint(const State& checkpoint, const std::string& given,
                             Collectives& ranks) {
  auto path = given;
  while (path.size() > 1 && path.back() == '/') path.pop_back();
  const auto made = path + ".unfinished";
  const bool is_first = ranks.global_rank() == 0;
  if (is_first) {
    remove_checkpoint_file(made);
    make_directories(made);
  }
  ranks.barrier("sharded checkpoint: the folder is there");
  const auto [sharded, values] = take_apart(checkpoint);
  State::List own;
  for (const auto& item : write_dcp_rank(sharded, made, ranks.global_rank())) {
    own.push_back(state_of(item));
  }
  const auto all = ranks.all_gather_states(std::move(own));
  if (!is_first) return;
  write_torch_file(values, made + "/" + kValues);
  std::vector<Item> items;
  for (const auto& of_rank : all) {
    for (const auto& item : of_rank.as_list()) items.push_back(item_of(item));
  }
  write_dcp_metadata(items, made);
  put_in_place(made, path);
}

State load_sharded_checkpoint(const std::string& path) {
  State state = DcpReader(path).read_all(/*whole=*/false);
  const auto values = path + "/" + kValues;
  if (::access(values.c_str(), F_OK) == 0) {
    const auto read = read_torch_file(values);
    for (const auto& [key, value] : read.as_dict()) state[key] = value;
  }
  try {
    state = as_trainer_checkpoint(std::move(state), CheckpointFormat::kSharded);
  } catch (const CheckpointError& error) {
    throw CheckpointError(str("Cannot load the checkpoint ", path, ": ", error.what()));
  }
  migrate_checkpoint(state, path);
  return state;
}

}  // namespace lightning
