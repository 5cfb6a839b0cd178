#include "lightning/checkpoint/dcp.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <c10/core/ScalarType.h>
#include <dirent.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <numeric>
#include <optional>
#include <utility>

#include "lightning/checkpoint/atomic_file.h"
#include "lightning/checkpoint/scalar_type.h"
#include "lightning/checkpoint/torch_file.h"
#include "lightning/checkpoint/zip_writer.h"
#include "lightning/errors.h"

namespace lightning {
namespace {

using Item = DcpMetadata::Item;
using Place = DcpMetadata::Place;
using Sizes = std::vector<int64_t>;

constexpr const char* kMetadataName = "/.metadata";
constexpr uint64_t kAlignment = 64;       // of items in a file, so that their tensors can be mapped
constexpr size_t kMostDepth = 256;        // of a tree, whose walkers recurse
constexpr int64_t kPieceBytes = 1 << 20;  // that a thread copies at least

template <class... Args>
[[noreturn]] void refuse(const std::string& folder, const Args&... args) {
  throw CheckpointError(str("Cannot load the checkpoint folder ", folder, ": ", args...));
}

bool is_empty(const Sizes& sizes) {
  return std::find(sizes.begin(), sizes.end(), 0) != sizes.end();
}

// ---- Reading ------------------------------------------------------------------------------------

// A box that is copied from one array of bytes to another.
struct BoxCopy {
  const uint8_t* from;
  uint8_t* to;
  int64_t element;
  Sizes lengths;
  Sizes from_strides;  // in bytes
  Sizes to_strides;

  void run() const {
    // The last dims of the box that lie without gaps on both sides are one run of bytes.
    int64_t bytes = element;
    size_t dims = lengths.size();
    for (; dims > 0; --dims) {
      const size_t d = dims - 1;
      if (lengths[d] != 1 && (from_strides[d] != bytes || to_strides[d] != bytes)) break;
      bytes *= lengths[d];
    }
    const int64_t runs = std::accumulate(lengths.begin(), lengths.begin() + dims, int64_t{1},
                                         std::multiplies<int64_t>());
    if (runs == 1) return copy_run(bytes);
    const int64_t grain = std::max<int64_t>(1, kPieceBytes / bytes);
    at::parallel_for(0, runs, grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const auto [source, target] = offsets_of(i, dims);
        std::memcpy(to + target, from + source, static_cast<size_t>(bytes));
      }
    });
  }

 private:
  void copy_run(int64_t bytes) const {
    at::parallel_for(0, bytes, kPieceBytes, [&](int64_t begin, int64_t end) {
      std::memcpy(to + begin, from + begin, static_cast<size_t>(end - begin));
    });
  }

  std::pair<int64_t, int64_t> offsets_of(int64_t run, size_t dims) const {
    int64_t source = 0;
    int64_t target = 0;
    for (size_t d = dims; d-- > 0; run /= lengths[d]) {
      source += run % lengths[d] * from_strides[d];
      target += run % lengths[d] * to_strides[d];
    }
    return {source, target};
  }
};

Sizes in_bytes(at::IntArrayRef strides, int64_t element) {
  Sizes result = strides.vec();
  for (int64_t& stride : result) stride *= element;
  return result;
}

// Where a chunk and the box that is read meet; nothing where they do not.
struct Overlap {
  Sizes in_chunk;
  Sizes in_box;
  Sizes lengths;
};

std::optional<Overlap> overlap_of(const DcpMetadata::Chunk& chunk, const Sizes& offsets,
                                  const Sizes& sizes) {
  Overlap overlap;
  for (size_t d = 0; d < offsets.size(); ++d) {
    const int64_t begin = std::max(chunk.offsets[d], offsets[d]);
    const int64_t end = std::min(chunk.offsets[d] + chunk.sizes[d], offsets[d] + sizes[d]);
    if (begin >= end) return std::nullopt;
    overlap.in_chunk.push_back(begin - chunk.offsets[d]);
    overlap.in_box.push_back(begin - offsets[d]);
    overlap.lengths.push_back(end - begin);
  }
  return overlap;
}

// The elements from `begin` to `end` of a tensor in row-major order, as boxes one behind the other:
// f(offsets, sizes).
template <class F>
void for_each_box(const Sizes& sizes, int64_t begin, int64_t end, const F& f) {
  Sizes offsets(sizes.size(), 0), lengths(sizes.size(), 1);
  const std::function<void(size_t, int64_t, int64_t)> visit = [&](size_t dim, int64_t from,
                                                                  int64_t to) {
    if (from >= to) return;
    if (dim == sizes.size()) return f(offsets, lengths);
    const auto each = std::accumulate(sizes.begin() + static_cast<std::ptrdiff_t>(dim) + 1,
                                      sizes.end(), int64_t{1}, std::multiplies<int64_t>());
    const auto part_of = [&](int64_t index, int64_t first, int64_t last) {
      offsets[dim] = index;
      lengths[dim] = 1;
      visit(dim + 1, first, last);
    };
    const auto first_whole = (from + each - 1) / each, whole_end = to / each;
    if (first_whole > whole_end) {  // within one index
      part_of(whole_end, from - whole_end * each, to - whole_end * each);
    } else {
      if (from < first_whole * each) part_of(first_whole - 1, from % each, each);
      if (first_whole < whole_end) {
        offsets[dim] = first_whole;
        lengths[dim] = whole_end - first_whole;
        for (size_t d = dim + 1; d < sizes.size(); ++d) {
          offsets[d] = 0;
          lengths[d] = sizes[d];
        }
        f(offsets, lengths);
      }
      if (whole_end * each < to) part_of(whole_end, 0, to % each);
    }
  };
  visit(0, begin, end);
}

int64_t offset_of(const Sizes& place, const Sizes& strides) {
  return std::inner_product(place.begin(), place.end(), strides.begin(), int64_t{0});
}

TensorRecord record_of(const TorchArchive& archive, const Item& item,
                       const DcpMetadata::Chunk& chunk) {
  if (!TorchArchive::is_tensor(archive.root())) {
    throw CheckpointError("its item holds no tensor.");
  }
  TensorRecord record = archive.record(archive.root());
  if (record.dtype != item.dtype || record.sizes != chunk.sizes) {
    throw CheckpointError(str("its item in ", chunk.place.file, " at ", chunk.place.offset,
                              " holds ", info(record.dtype).torch_name, " ",
                              at::IntArrayRef(record.sizes), ", expected ",
                              info(item.dtype).torch_name, " ", at::IntArrayRef(chunk.sizes),
                              ". The files are of several saves, or damaged."));
  }
  return record;
}

void copy_overlap(const TorchArchive& archive, const TensorRecord& record, const Overlap& overlap,
                  const at::Tensor& box) {
  if (record.conjugate || record.negative) {  // bits that the bytes do not have
    at::Tensor from = read_torch_archive(archive).as_tensor();
    at::Tensor to = box;
    for (size_t d = 0; d < overlap.lengths.size(); ++d) {
      const auto dim = static_cast<int64_t>(d);
      from = from.narrow(dim, overlap.in_chunk[d], overlap.lengths[d]);
      to = to.narrow(dim, overlap.in_box[d], overlap.lengths[d]);
    }
    to.copy_(from);
    return;
  }
  const auto element = static_cast<int64_t>(info(record.dtype).bytes);
  BoxCopy copy;
  copy.element = element;
  copy.lengths = overlap.lengths;
  copy.from_strides = in_bytes(record.strides, element);
  copy.to_strides = in_bytes(box.strides(), element);
  copy.from = reinterpret_cast<const uint8_t*>(archive.zip().data(*record.storage).data()) +
              record.storage_offset * element + offset_of(overlap.in_chunk, copy.from_strides);
  copy.to =
      static_cast<uint8_t*>(box.mutable_data_ptr()) + offset_of(overlap.in_box, copy.to_strides);
  copy.run();
}

// The tree on the way to the items.
struct Branch {
  using Key = std::variant<int64_t, std::string>;
  std::vector<std::pair<Key, Branch>> children;
  std::map<Key, size_t> index;
  const Item* item = nullptr;

  Branch& child(const Key& key) {
    const auto [place, added] = index.emplace(key, children.size());
    if (added) children.emplace_back(key, Branch());
    return children[place->second].second;
  }

  // One more than the highest index, where this is a list.
  std::optional<uint64_t> list_size() const {
    if (children.empty()) return std::nullopt;
    // Sorted, so that ints come first and the last is the highest.
    const auto* first = std::get_if<int64_t>(&index.begin()->first);
    const auto* last = std::get_if<int64_t>(&index.rbegin()->first);
    if (first == nullptr || last == nullptr || *first < 0) return std::nullopt;
    return static_cast<uint64_t>(*last) + 1;
  }
};

Branch branches_of(const std::vector<Item>& items, const std::string& folder) {
  Branch root;
  for (const auto& item : items) {
    Branch* branch = &root;
    for (const auto& key : item.path) {
      if (branch->item != nullptr) break;
      branch = &branch->child(key);
    }
    if (item.path.empty()) branch = &root.child(item.fqn);
    if (branch->item != nullptr || !branch->children.empty()) {
      refuse(folder, "the path of \"", item.fqn,
             "\" leads through another value. The metadata is damaged.");
    }
    branch->item = &item;
  }
  return root;
}

// ---- Writing ------------------------------------------------------------------------------------

struct Leaf {
  Item item;
  const State* value;
};

// Takes a tree apart. Source: torch 2.11, `traverse_state_dict` and `flatten_state_dict`.
class Flattener {
 public:
  explicit Flattener(const State& root) {
    if (!root.is_dict()) {
      throw CheckpointError(str("A sharded checkpoint is made of a dict, got a ", root.type_name(),
                                ". Put it under a key."));
    }
    visit(root);
  }

  std::vector<Leaf> leaves() && { return std::move(leaves_); }

 private:
  void visit(const State& value) {
    if (path_.size() > kMostDepth) {
      throw CheckpointError(str("The tree is deeper than ", kMostDepth, " at \"",
                                name().substr(0, 100), "...\"; it may contain itself."));
    }
    if (value.is_dict()) {
      for (const auto& [key, entry] : value.as_dict()) {
        path_.emplace_back(to_string(key));
        visit(entry);
        path_.pop_back();
      }
    } else if (is_split(value, 0)) {
      int64_t i = 0;
      for (const auto& entry : value.as_list()) {
        path_.emplace_back(i++);
        visit(entry);
        path_.pop_back();
      }
    } else {
      add(value);
    }
  }

  // Dicts are always taken apart, lists when they hold a tensor or what is taken apart itself.
  static bool is_split(const State& value, size_t depth) {
    if (value.is_dict()) return true;
    if (!value.is<State::List>() || depth > kMostDepth) return false;
    const auto& list = value.as_list();
    return std::any_of(list.begin(), list.end(), [&](const State& entry) {
      return entry.is<TensorState>() || is_split(entry, depth + 1);
    });
  }

  std::string name() const {
    std::string name;
    for (const auto& part : path_) {
      const auto* index = std::get_if<int64_t>(&part);
      if (&part != &path_.front()) name += '.';
      name += index != nullptr ? std::to_string(*index) : std::get<std::string>(part);
    }
    return name;
  }

  void add(const State& value) {
    Leaf leaf{{}, &value};
    leaf.item.fqn = name();
    leaf.item.path = path_;
    leaf.item.is_tensor = value.is<TensorState>();
    if (!names_.insert(leaf.item.fqn).second) {
      throw CheckpointError(str("Two values of the tree have the name \"", leaf.item.fqn,
                                "\" in a sharded checkpoint, where keys are joined with \".\". "
                                "Rename one of the keys."));
    }
    leaves_.push_back(std::move(leaf));
  }

  std::vector<std::variant<int64_t, std::string>> path_;
  std::unordered_set<std::string> names_;
  std::vector<Leaf> leaves_;
};

void check_chunk(const std::string& fqn, const TensorState& state,
                 const TensorState::Chunk& chunk) {
  const bool fits = chunk.tensor.defined() && chunk.tensor.sizes() == chunk.sizes &&
                    chunk.tensor.scalar_type() == state.dtype &&
                    chunk.offsets.size() == state.sizes.size();
  if (fits) return;
  const std::string got =
      chunk.tensor.defined()
          ? str(c10::getDtypeNames(chunk.tensor.scalar_type()).first, " ", chunk.tensor.sizes())
          : "no tensor";
  throw CheckpointError(str("A chunk of \"", fqn, "\", ", c10::getDtypeNames(state.dtype).first,
                            " ", at::IntArrayRef(state.sizes), ", is said to have ",
                            at::IntArrayRef(chunk.sizes), " at ", at::IntArrayRef(chunk.offsets),
                            " and holds ", got, "."));
}

// A zip in the file: one chunk of a tensor, or one other value.
//
// The places of all zips are known before the first is written. A chunk that must be put in order
// first has that done when its turn comes, so that one of them at a time takes memory; until then
// memory that is never touched stands for it.
class Piece {
 public:
  Piece(const State& value, Place& place) : place_(&place), writer_(torch_file_writer(value)) {}

  Piece(const at::Tensor& chunk, Place& place)
      : place_(&place),
        unordered_(lies_in_order(chunk) ? at::Tensor() : chunk.detach()),
        writer_(writer_of(unordered_.defined() ? at::empty(chunk.sizes(), chunk.scalar_type())
                                               : chunk.detach())) {}

  uint64_t bytes() const { return writer_.bytes(); }
  Place& place() const { return *place_; }

  // Whether several may be written at once.
  bool is_in_order() const { return !unordered_.defined(); }
  void add_to(ZipBatch& batch) const { batch.add(writer_, place_->offset); }

  void write_in_order(AtomicFile& file) const {
    const ZipWriter writer = writer_of(unordered_.resolve_conj().resolve_neg().contiguous());
    TORCH_CHECK(writer.bytes() == bytes(), "an item changed while it was written");
    writer.write(file, place_->offset);
  }

 private:
  static bool lies_in_order(const at::Tensor& chunk) {
    return chunk.is_non_overlapping_and_dense() && !chunk.is_conj() && !chunk.is_neg();
  }
  static ZipWriter writer_of(const at::Tensor& chunk) { return torch_file_writer(State(chunk)); }

  Place* place_;
  at::Tensor unordered_;
  ZipWriter writer_;
};

// The chunks that hold something go to the item, their tensors to `tensors` in the same order.
void add_chunks(const TensorState& state, Item& item, std::vector<const at::Tensor*>& tensors) {
  const auto dtype = dtype_of(state.dtype);
  if (!dtype) {
    throw CheckpointError(str("\"", item.fqn, "\" is ", c10::getDtypeNames(state.dtype).first,
                              ", which a sharded checkpoint of this program cannot hold."));
  }
  item.dtype = *dtype;
  item.sizes = state.sizes;
  for (const auto& chunk : state.chunks) {
    check_chunk(item.fqn, state, chunk);
    if (is_empty(chunk.sizes)) continue;
    item.chunks.push_back({chunk.offsets, chunk.sizes, {}});
    tensors.push_back(&chunk.tensor);
  }
}

std::vector<Piece> pieces_of(std::vector<Leaf>& leaves, const std::string& file, int64_t rank) {
  std::vector<Piece> pieces;
  for (auto& leaf : leaves) {
    try {
      if (!leaf.item.is_tensor) {
        if (rank == 0) pieces.emplace_back(*leaf.value, leaf.item.place);
        continue;
      }
      std::vector<const at::Tensor*> tensors;
      add_chunks(leaf.value->as_tensor_state(), leaf.item, tensors);
      for (size_t i = 0; i < tensors.size(); ++i) {
        pieces.emplace_back(*tensors[i], leaf.item.chunks[i].place);
      }
    } catch (const CheckpointError& error) {
      throw CheckpointError(str("Cannot save \"", leaf.item.fqn, "\": ", error.what()));
    }
  }
  for (auto& piece : pieces) piece.place().file = file;
  return pieces;
}

// From which a GPU copies without a stop on the way.
std::shared_ptr<char> pinned_memory(uint64_t bytes) {
  const auto memory =
      at::empty({static_cast<int64_t>(bytes)}, at::TensorOptions(at::kByte).pinned_memory(true));
  return {static_cast<char*>(memory.mutable_data_ptr()), [memory](char*) {}};
}

uint64_t lay_out(const std::vector<Piece>& pieces) {
  uint64_t end = 0;
  for (const auto& piece : pieces) {
    piece.place().offset = (end + kAlignment - 1) / kAlignment * kAlignment;
    piece.place().bytes = piece.bytes();
    end = piece.place().offset + piece.place().bytes;
  }
  return end;
}

// From here on the folder is no checkpoint until a new `.metadata` is written.
void remove_metadata(const std::string& folder) {
  const std::string path = folder + kMetadataName;
  if (::unlink(path.c_str()) == 0) {
    sync_folder(folder);
    return;
  }
  if (errno == ENOENT || errno == ENOTDIR) return;
  throw CheckpointError(str("Cannot replace the checkpoint folder ", folder, ": ", path,
                            " cannot be removed: ", std::strerror(errno),
                            ". Give a folder that this user may write to."));
}

// "__<rank>_<number>.distcp", as Python names them too.
bool is_rank_file(const std::string& name) {
  size_t at = 2;
  const auto skip_digits = [&] {
    const size_t begin = at;
    while (at < name.size() && name[at] >= '0' && name[at] <= '9') ++at;
    return at > begin;
  };
  return name.rfind("__", 0) == 0 && skip_digits() && at < name.size() && name[at++] == '_' &&
         skip_digits() && name.compare(at, std::string::npos, ".distcp") == 0;
}

std::unordered_set<std::string> files_of(const DcpMetadata& metadata) {
  std::unordered_set<std::string> files;
  for (const auto& item : metadata.items) {
    files.insert(item.place.file);
    for (const auto& chunk : item.chunks) files.insert(chunk.place.file);
  }
  files.erase("");
  return files;
}

// They would take room for as long as the folder lives. One that cannot be removed harms no one.
void remove_leftovers(const std::string& folder, const DcpMetadata& metadata) {
  const auto files = files_of(metadata);
  DIR* open = ::opendir(folder.c_str());
  if (open == nullptr) return;
  std::vector<std::string> leftovers;
  while (const dirent* entry = ::readdir(open)) {
    const std::string name = entry->d_name;
    if (is_rank_file(name) && files.count(name) == 0) leftovers.push_back(folder + "/" + name);
  }
  ::closedir(open);
  for (const auto& path : leftovers) ::unlink(path.c_str());
}

// What goes wrong in `work` is said of the folder's item.
template <class Work>
auto about_item(const std::string& folder, const std::string& fqn, const Work& work) {
  try {
    return work();
  } catch (const CheckpointError& error) {
    refuse(folder, "\"", fqn, "\": ", error.what());
  }
}

DcpMetadata read_metadata(const std::string& folder) {
  struct stat found {};
  const std::string path = folder + kMetadataName;
  if (::stat(folder.c_str(), &found) != 0) refuse(folder, std::strerror(errno), ".");
  if (!S_ISDIR(found.st_mode)) refuse(folder, "it is a file, expected a folder.");
  if (::stat(path.c_str(), &found) != 0) {
    if (errno != ENOENT) refuse(folder, ".metadata: ", std::strerror(errno), ".");
    if (::stat((folder + "/__0.metadata").c_str(), &found) == 0) {
      refuse(folder,
             "it has a .metadata for each rank and none for all. Save with use_collectives=True.");
    }
    refuse(folder,
           "it has no .metadata, which is written last: the save was not finished. Load an earlier "
           "checkpoint.");
  }
  const auto file = MappedFile::open(path);
  try {
    auto metadata = DcpMetadata::parse(
        {reinterpret_cast<const char*>(file->data()), static_cast<size_t>(file->size())});
    file->check();
    return metadata;
  } catch (const CheckpointError& error) {
    refuse(folder, "its .metadata cannot be used: ", error.what(), ". Load an earlier checkpoint.");
  }
}

}  // namespace

DcpReader::DcpReader(std::string folder, bool verify)
    : folder_(std::move(folder)), verify_(verify), metadata_(read_metadata(folder_)) {
  check_files();
}

// All files are there and as long as their items need, before anything is read.
void DcpReader::check_files() const {
  struct Need {
    uint64_t end = 0;
    const Item* item = nullptr;
  };
  std::map<std::string, Need> needs;
  const auto add = [&](const Place& place, const Item& item) {
    if (place.file.empty()) return;
    auto& need = needs[place.file];
    if (need.item == nullptr || place.offset + place.bytes > need.end) {
      need = {place.offset + place.bytes, &item};
    }
  };
  for (const auto& item : metadata_.items) {
    add(item.place, item);
    for (const auto& chunk : item.chunks) add(chunk.place, item);
  }
  for (const auto& [name, need] : needs) {
    struct stat found {};
    if (::stat((folder_ + "/" + name).c_str(), &found) != 0) {
      refuse(folder_, "its file ", name, ", which holds \"", need.item->fqn,
             "\", cannot be opened: ", std::strerror(errno), ". Copy the files of all ranks.");
    }
    if (!S_ISREG(found.st_mode) || static_cast<uint64_t>(found.st_size) < need.end) {
      refuse(folder_, "its file ", name, " has ", found.st_size, " bytes, but \"", need.item->fqn,
             "\" ends at ", need.end, ". It was not copied whole; copy it again.");
    }
  }
}

const DcpMetadata::Item& DcpReader::item(const std::string& fqn) const {
  if (const auto* found = metadata_.find(fqn)) return *found;
  std::vector<std::string> names;
  for (const auto& item : metadata_.items) names.push_back(item.fqn);
  throw CheckpointError(
      str("The checkpoint folder ", folder_, " has no \"", fqn, "\".", did_you_mean(fqn, names)));
}

std::shared_ptr<MappedFile> DcpReader::content(const std::string& file) const {
  const std::lock_guard lock(mutex_);
  auto& content = files_[file].content;
  if (content == nullptr) content = MappedFile::open(folder_ + "/" + file);
  return content;
}

bool DcpReader::is_verified(const Place& place) const {
  const std::lock_guard lock(mutex_);
  return !verify_ || files_[place.file].verified.count(place.offset) > 0;
}

void DcpReader::set_verified(const Place& place) const {
  const std::lock_guard lock(mutex_);
  files_[place.file].verified.insert(place.offset);
}

TorchArchive DcpReader::open(const Place& place) const {
  const bool verify = !is_verified(place);
  TorchArchive archive(content(place.file), place.offset, place.bytes, verify);
  if (verify) set_verified(place);
  return archive;
}

void DcpReader::verify(const std::vector<Box>& boxes) const {
  struct Zip {
    const Item* item;
    const Place* place;
    ZipReader zip;
  };
  std::deque<Zip> zips;  // whose records stay where they are
  std::vector<ZipRecord> records;
  for (const auto& box : boxes) {
    const auto& found = item(box.fqn);
    check_box(found, box.offsets, box.sizes);
    for (const auto& chunk : found.chunks) {
      if (is_empty(chunk.sizes) || !overlap_of(chunk, box.offsets, box.sizes)) continue;
      if (is_verified(chunk.place)) continue;
      try {
        const auto& place = chunk.place;
        zips.push_back({&found, &place, {content(place.file), place.offset, place.bytes}});
      } catch (const CheckpointError&) {
        continue;  // said better by who reads it
      }
      const auto& zip = zips.back().zip;
      if (!zip.has_crcs()) {
        zips.pop_back();
        continue;
      }
      for (const auto& record : zip.records()) records.push_back({&zip, &record});
    }
  }
  const auto crcs = crcs_of(records);
  auto crc = crcs.begin();
  for (const auto& [item, place, zip] : zips) {
    about_item(folder_, item->fqn, [&, &zip = zip] {
      for (const auto& record : zip.records()) zip.compare(record, *crc++);
      zip.file()->check();
    });
    set_verified(*place);
  }
}

at::Tensor DcpReader::read_box(const DcpMetadata::Item& item, const std::vector<int64_t>& offsets,
                               const std::vector<int64_t>& sizes) const {
  at::Tensor box = at::empty(sizes, scalar_type(item.dtype));
  if (!is_empty(sizes)) fill_box(item, offsets, box);
  return box;
}

void DcpReader::fill_box(const DcpMetadata::Item& item, const std::vector<int64_t>& offsets,
                         const at::Tensor& box) const {
  const auto sizes = box.sizes().vec();
  for (const auto& chunk : item.chunks) {
    const auto overlap = is_empty(chunk.sizes) ? std::nullopt : overlap_of(chunk, offsets, sizes);
    if (!overlap) continue;
    const auto archive = open(chunk.place);
    copy_overlap(archive, record_of(archive, item, chunk), *overlap, box);
    archive.zip().file()->check();
  }
}

State DcpReader::read_item(const DcpMetadata::Item& item, bool whole) const {
  return about_item(folder_, item.fqn, [&]() -> State {
    if (!item.is_tensor) return read_torch_archive(open(item.place));
    if (whole) return read_box(item, Sizes(item.sizes.size(), 0), item.sizes);
    return part_of(item, Sizes(item.sizes.size(), 0), item.sizes);
  });
}

void DcpReader::check_box(const Item& found, const Sizes& offsets, const Sizes& sizes) const {
  if (!found.is_tensor) refuse(folder_, "\"", found.fqn, "\" is no tensor; use read_value().");
  bool inside = offsets.size() == found.sizes.size() && sizes.size() == found.sizes.size();
  for (size_t d = 0; inside && d < sizes.size(); ++d) {
    inside = offsets[d] >= 0 && sizes[d] >= 0 && offsets[d] <= found.sizes[d] &&
             sizes[d] <= found.sizes[d] - offsets[d];
  }
  if (!inside) {
    refuse(folder_, "a box of ", at::IntArrayRef(sizes), " at ", at::IntArrayRef(offsets),
           " does not lie in \"", found.fqn, "\" of shape ", at::IntArrayRef(found.sizes), ".");
  }
}

TensorState DcpReader::part_of(const Item& item, const Sizes& offsets, const Sizes& sizes) const {
  TensorState state;
  state.sizes = item.sizes;
  state.dtype = scalar_type(item.dtype);
  for (const auto& chunk : item.chunks) {
    if (is_empty(chunk.sizes)) {
      state.chunks.push_back({chunk.offsets, chunk.sizes, at::empty(chunk.sizes, state.dtype)});
      continue;
    }
    const auto overlap = overlap_of(chunk, offsets, sizes);
    if (!overlap) continue;
    const auto archive = open(chunk.place);
    const auto record = record_of(archive, item, chunk);
    if (chunk.place.offset % kAlignment == 0) {
      state.chunks.push_back({chunk.offsets, chunk.sizes, read_torch_archive(archive).as_tensor()});
      continue;
    }
    auto copy = at::empty(overlap->lengths, state.dtype);
    auto to_here = *overlap;
    to_here.in_box.assign(to_here.in_box.size(), 0);
    copy_overlap(archive, record, to_here, copy);
    archive.zip().file()->check();
    auto begin = chunk.offsets;
    for (size_t d = 0; d < begin.size(); ++d) begin[d] += overlap->in_chunk[d];
    state.chunks.push_back({std::move(begin), overlap->lengths, std::move(copy)});
  }
  return state;
}

TensorState DcpReader::read_part(const std::string& fqn, const Sizes& offsets,
                                 const Sizes& sizes) const {
  const auto& found = item(fqn);
  check_box(found, offsets, sizes);
  return about_item(folder_, fqn, [&] { return part_of(found, offsets, sizes); });
}

at::Tensor DcpReader::read(const std::string& fqn, const std::vector<int64_t>& offsets,
                           const std::vector<int64_t>& sizes) const {
  const auto& found = item(fqn);
  check_box(found, offsets, sizes);
  return about_item(folder_, fqn, [&] { return read_box(found, offsets, sizes); });
}

at::Tensor DcpReader::read(const std::string& fqn) const {
  const auto& sizes = item(fqn).sizes;
  return read(fqn, Sizes(sizes.size(), 0), sizes);
}

void DcpReader::read_bytes(const std::string& fqn, uint64_t offset, uint64_t bytes,
                           void* to) const {
  const auto& found = item(fqn);
  const auto dtype = scalar_type(found.dtype);
  const auto element = static_cast<int64_t>(c10::elementSize(dtype));
  const auto begin = static_cast<int64_t>(offset) / element;
  const auto end = static_cast<int64_t>(offset + bytes) / element;
  const auto numel = c10::multiply_integers(found.sizes);
  if (!found.is_tensor || begin * element != static_cast<int64_t>(offset) ||
      end * element != static_cast<int64_t>(offset + bytes) || end > numel) {
    refuse(folder_, "bytes ", offset, " to ", offset + bytes, " are no elements of \"", fqn,
           "\" of shape ", at::IntArrayRef(found.sizes), ".");
  }
  about_item(folder_, fqn, [&] {
    auto* next = static_cast<char*>(to);
    for_each_box(found.sizes, begin, end, [&](const Sizes& offsets, const Sizes& sizes) {
      const auto box = at::from_blob(next, sizes, dtype);
      fill_box(found, offsets, box);
      next += box.nbytes();
    });
  });
}

State DcpReader::read_value(const std::string& fqn) const { return read_item(item(fqn), true); }

State DcpReader::read_all(bool whole) const {
  return tree([&](const Item& item) { return read_item(item, whole); });
}

State DcpReader::tree(const Leaf& leaf) const {
  // Of Python's lists with holes each has as many entries as its last index says; a hostile index
  // would make it as long as it likes.
  uint64_t most_holes = 1024 + metadata_.items.size();
  const std::function<State(const Branch&, bool)> build = [&](const Branch& branch, bool is_root) {
    if (branch.item != nullptr) return leaf(*branch.item);
    const auto size = is_root ? std::nullopt : branch.list_size();
    if (!size) {
      State::Dict dict;
      dict.reserve(branch.children.size());
      for (const auto& [key, child] : branch.children) {
        std::visit([&, &value = child](const auto& k) { dict[k] = build(value, false); }, key);
      }
      return State(std::move(dict));
    }
    const uint64_t holes = *size - branch.children.size();
    if (holes > most_holes) {
      refuse(folder_, "a list of it has an entry ", *size - 1, " and only ", branch.children.size(),
             " entries. The metadata is damaged.");
    }
    most_holes -= holes;
    State::List list(*size);
    for (const auto& [key, child] : branch.children) {
      list[static_cast<size_t>(std::get<int64_t>(key))] = build(child, false);
    }
    return State(std::move(list));
  };
  return build(branches_of(metadata_.items, folder_), true);
}

struct DcpRankWriter::Plan {
  Plan(State tree, int64_t rank)
      : state(std::move(tree)),
        leaves(Flattener(state).leaves()),
        rank(rank),
        file(str("__", rank, "_0.distcp")),
        pieces(pieces_of(leaves, file, rank)),
        bytes(lay_out(pieces)) {}

  bool lies_on_device() const {
    return std::any_of(leaves.begin(), leaves.end(), [](const Leaf& leaf) {
      if (!leaf.item.is_tensor) return false;
      const auto& chunks = leaf.value->as_tensor_state().chunks;
      return std::any_of(chunks.begin(), chunks.end(),
                         [](const auto& chunk) { return chunk.tensor.is_cuda(); });
    });
  }

  const State state;
  std::vector<Leaf> leaves;
  const int64_t rank;
  const std::string file;
  const std::vector<Piece> pieces;
  const uint64_t bytes;
};

DcpRankWriter::DcpRankWriter(State state, int64_t rank)
    : plan_(std::make_unique<Plan>(std::move(state), rank)) {}
DcpRankWriter::~DcpRankWriter() = default;
DcpRankWriter::DcpRankWriter(DcpRankWriter&&) noexcept = default;

std::vector<DcpMetadata::Item> DcpRankWriter::items() const {
  std::vector<Item> items;
  for (const auto& leaf : plan_->leaves) {
    if (leaf.item.is_tensor || plan_->rank == 0) items.push_back(leaf.item);
  }
  return items;
}

void DcpRankWriter::write(const std::string& folder) const {
  if (plan_->pieces.empty()) return remove_metadata(folder);
  // Through the cache: a run that ends goes on from here, mostly on the same machine.
  AtomicFile file(folder + "/" + plan_->file, plan_->bytes, AtomicFile::Cache::kThrough);
  ZipBatch batch;
  for (const auto& piece : plan_->pieces) {
    if (piece.is_in_order()) {
      piece.add_to(batch);
    } else {
      piece.write_in_order(file);
    }
  }
  batch.write(file, 0, plan_->lies_on_device() ? pinned_memory : nullptr);
  // From here on the folder is no whole checkpoint; a full disk was found out before.
  remove_metadata(folder);
  file.commit();
}

std::vector<DcpMetadata::Item> write_dcp_rank(const State& state, const std::string& folder,
                                              int64_t rank) {
  const DcpRankWriter writer(state, rank);
  writer.write(folder);
  return writer.items();
}

void write_dcp_metadata(const std::vector<DcpMetadata::Item>& items, const std::string& folder) {
  DcpMetadata metadata;
  try {
    metadata = DcpMetadata::merge(items);
  } catch (const CheckpointError& error) {
    throw CheckpointError(str("Cannot save the checkpoint folder ", folder, ": ", error.what(),
                              ". Every element must be held by one rank, or by several in the same "
                              "chunk."));
  }
  const std::string pickle = metadata.to_pickle();
  AtomicFile file(folder + kMetadataName, pickle.size());
  file.write(pickle.data(), pickle.size());
  file.commit();
  remove_leftovers(folder, metadata);
}

void write_dcp(const State& state, const std::string& folder) {
  write_dcp_metadata(write_dcp_rank(state, folder, 0), folder);
}

}  // namespace lightning
