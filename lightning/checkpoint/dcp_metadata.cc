#include "lightning/checkpoint/dcp_metadata.h"

#include <algorithm>
#include <limits>
#include <numeric>
#include <optional>
#include <tuple>

#include "lightning/checkpoint/pickle_reader.h"
#include "lightning/checkpoint/pickle_writer.h"
#include "lightning/errors.h"

namespace lightning {
namespace {

using Kind = PickleNode::Kind;
using Sizes = std::vector<int64_t>;

constexpr const char* kModule = "torch.distributed.checkpoint.metadata";
constexpr size_t kMostDims = 64;  // as torch has it
// A tree this deep is no state of a training; walkers of trees recurse.
constexpr size_t kMostPathItems = 256;
constexpr size_t kMostFileName = 255;

template <class... Args>
[[noreturn]] void refuse(const Args&... args) {
  throw CheckpointError(str(args...));
}

std::string show(const Sizes& sizes) {
  std::vector<std::string> words;
  for (const int64_t size : sizes) words.push_back(std::to_string(size));
  return "[" + join(words) + "]";
}

std::string show(const PickleNode* node) {
  if (node == nullptr) return "nothing";
  static const char* const names[] = {
      "None",  "a bool",      "an int",      "an int",    "a float",   "a complex",
      "a str", "bytes",       "a bytearray", "a tuple",   "a list",    "a dict",
      "a set", "a frozenset", "the global",  "an object", "an object", "a persistent id"};
  const PickleNode* global = node;
  if (node->kind == Kind::kCall || node->kind == Kind::kNew) global = node->items[0];
  std::string text = names[static_cast<size_t>(node->kind)];
  if (global->kind == Kind::kGlobal) {
    text += str(global == node ? " " : " of ", global->text, ".", global->name);
  }
  return text;
}

// An object of torch's class of that name. Its module moved between versions:
// torch.distributed._shard.sharded_tensor.metadata had some of them before 2.3.
bool is_object(const PickleNode* node, std::string_view name) {
  if (node == nullptr || (node->kind != Kind::kNew && node->kind != Kind::kCall)) return false;
  const PickleNode* global = node->items[0];
  return global->kind == Kind::kGlobal && global->name == name &&
         global->text.substr(0, 17) == "torch.distributed";
}

const PickleNode* lookup(const PickleNode& dict, std::string_view key) {
  for (size_t i = dict.items.size(); i >= 2; i -= 2) {
    const PickleNode* found = dict.items[i - 2];
    if (found->kind == Kind::kString && found->text == key) return dict.items[i - 1];
  }
  return nullptr;
}

// A member of a dataclass; null where it is missing or None.
const PickleNode* field(const PickleNode* object, std::string_view name) {
  if (object->additions == nullptr || object->additions->state == nullptr) return nullptr;
  const PickleNode& state = *object->additions->state;
  if (state.kind != Kind::kDict) return nullptr;
  const PickleNode* found = lookup(state, name);
  return found == nullptr || found->kind == Kind::kNone ? nullptr : found;
}

const PickleNode& dict_field(const PickleNode* object, std::string_view name) {
  const PickleNode* found = field(object, name);
  if (found == nullptr || found->kind != Kind::kDict) {
    refuse("its `", name, "` is ", show(found), ", expected a dict");
  }
  return *found;
}

// torch.Size, or a plain tuple or list of ints; nothing for anything else.
std::optional<Sizes> read_sizes(const PickleNode* node) {
  if (node == nullptr) return std::nullopt;
  if (node->kind == Kind::kCall && node->items[0]->kind == Kind::kGlobal &&
      node->items[0]->name == "Size" && node->items[1]->items.size() == 1) {
    node = node->items[1]->items[0];
  }
  if (node->kind != Kind::kTuple && node->kind != Kind::kList) return std::nullopt;
  if (node->items.size() > kMostDims) return std::nullopt;
  Sizes sizes;
  sizes.reserve(node->items.size());
  for (const PickleNode* item : node->items) {
    if (item->kind != Kind::kInt) return std::nullopt;
    sizes.push_back(item->integer);
  }
  return sizes;
}

Sizes sizes_field(const PickleNode* object, std::string_view name, const std::string& fqn) {
  const PickleNode* found = field(object, name);
  auto sizes = read_sizes(found);
  if (!sizes) {
    refuse("the `", name, "` of \"", fqn, "\" is ", show(found),
           ", expected a torch.Size of at most ", kMostDims, " ints");
  }
  return *std::move(sizes);
}

DType read_dtype(const PickleNode* tensor, const std::string& fqn) {
  const PickleNode* properties = field(tensor, "properties");
  if (!is_object(properties, "TensorProperties") || properties->additions == nullptr ||
      properties->additions->state == nullptr ||
      properties->additions->state->kind != Kind::kTuple ||
      properties->additions->state->items.size() < 2) {
    refuse("the `properties` of \"", fqn, "\" are ", show(properties),
           ", expected a TensorProperties with its tuple of values");
  }
  const auto& values = properties->additions->state->items;
  const PickleNode* layout = values[1];
  if (layout->kind == Kind::kCall && layout->items[1]->items.size() == 1) {
    layout = layout->items[1]->items[0];  // torch.serialization._get_layout("torch.strided")
  }
  if (layout->kind == Kind::kString && layout->text != "torch.strided") {
    refuse("the tensor \"", fqn, "\" has the layout ", layout->text,
           ", of which only torch.strided can be read");
  }
  const auto dtype = values[0]->kind == Kind::kGlobal && values[0]->text == "torch"
                         ? dtype_of_torch_name(values[0]->name)
                         : std::nullopt;
  if (!dtype)
    refuse("the dtype of \"", fqn, "\" is ", show(values[0]), ", which is not known here");
  return *dtype;
}

bool is_empty(const Sizes& sizes) {
  return std::find(sizes.begin(), sizes.end(), 0) != sizes.end();
}

// Bytes of an array; nothing where a size is negative or the product leaves int64_t.
std::optional<uint64_t> bytes_of(const Sizes& sizes, size_t element) {
  uint64_t bytes = element;
  for (const int64_t size : sizes) {
    if (size < 0) return std::nullopt;
    // A 0 further on does not excuse sizes that overflow before it: torch multiplies in order.
    if (size > 0 && bytes > static_cast<uint64_t>(std::numeric_limits<int64_t>::max()) /
                                static_cast<uint64_t>(size)) {
      return std::nullopt;
    }
    bytes *= static_cast<uint64_t>(std::max<int64_t>(size, 1));
  }
  return is_empty(sizes) ? 0 : bytes;
}

// Goes through the nodes once and makes items of them.
class Parser {
 public:
  Parser(const PickleNode& root, size_t bytes) : left_(bytes) {
    if (!is_object(&root, "Metadata")) {
      refuse("it holds ", show(&root), ", expected a ", kModule, ".Metadata");
    }
    read_items(dict_field(&root, "state_dict_metadata"));
    read_places(dict_field(&root, "storage_data"));
    read_paths(field(&root, "planner_data"));
  }

  std::vector<DcpMetadata::Item> items() && { return std::move(items_); }

 private:
  void read_items(const PickleNode& dict);
  void read_chunks(const PickleNode* node, DcpMetadata::Item& item);
  void read_places(const PickleNode& dict);
  DcpMetadata::Place read_place(const PickleNode* node, const std::string& fqn) const;
  void put(DcpMetadata::Place place, const PickleNode* key, size_t i);
  const std::vector<size_t>& chunks_by_offsets(size_t i);
  void read_paths(const PickleNode* planner_data);

  // A pickle may refer to one list any number of times. Of a pickle that torch wrote, each number
  // and letter that is kept here took a byte, most took several.
  void spend(size_t values) {
    if (values > left_) refuse("it repeats its lists beyond any use");
    left_ -= values;
  }

  size_t left_;
  std::vector<DcpMetadata::Item> items_;
  std::unordered_map<std::string_view, size_t> index_;
  std::unordered_map<size_t, std::vector<size_t>> by_offsets_;
};

void Parser::read_items(const PickleNode& dict) {
  items_.reserve(dict.items.size() / 2);
  for (size_t i = 0; i + 1 < dict.items.size(); i += 2) {
    const PickleNode* key = dict.items[i];
    const PickleNode* value = dict.items[i + 1];
    if (key->kind != Kind::kString) refuse("a key of state_dict_metadata is ", show(key));
    DcpMetadata::Item item;
    item.fqn = std::string(key->text);
    if (is_object(value, "TensorStorageMetadata")) {
      item.is_tensor = true;
      item.dtype = read_dtype(value, item.fqn);
      item.sizes = sizes_field(value, "size", item.fqn);
      spend(item.sizes.size());
      read_chunks(field(value, "chunks"), item);
    } else if (!is_object(value, "BytesStorageMetadata")) {
      refuse("the entry \"", item.fqn, "\" is ", show(value),
             ", expected a TensorStorageMetadata or a BytesStorageMetadata");
    }
    const auto [place, added] = index_.emplace(key->text, items_.size());
    if (added) {
      items_.push_back(std::move(item));
    } else {
      items_[place->second] = std::move(item);
    }
  }
}

// Chunks that are there twice, as replicas are in folders of some versions, have one place between
// them, so they are one chunk.
void drop_repeated(std::vector<DcpMetadata::Chunk>& chunks) {
  const auto before = [](const DcpMetadata::Chunk* a, const DcpMetadata::Chunk* b) {
    return std::tie(a->offsets, a->sizes) < std::tie(b->offsets, b->sizes);
  };
  std::vector<const DcpMetadata::Chunk*> order;
  for (const auto& chunk : chunks) order.push_back(&chunk);
  std::stable_sort(order.begin(), order.end(), before);
  std::vector<bool> repeated(chunks.size());
  bool any = false;
  for (size_t i = 1; i < order.size(); ++i) {
    if (before(order[i - 1], order[i])) continue;
    repeated[static_cast<size_t>(order[i] - chunks.data())] = any = true;
  }
  if (!any) return;
  std::vector<DcpMetadata::Chunk> kept;
  for (size_t i = 0; i < chunks.size(); ++i) {
    if (!repeated[i]) kept.push_back(std::move(chunks[i]));
  }
  chunks = std::move(kept);
}

void Parser::read_chunks(const PickleNode* node, DcpMetadata::Item& item) {
  if (node == nullptr || (node->kind != Kind::kList && node->kind != Kind::kTuple)) {
    refuse("the `chunks` of \"", item.fqn, "\" are ", show(node), ", expected a list");
  }
  spend(node->items.size());
  item.chunks.reserve(node->items.size());
  for (const PickleNode* entry : node->items) {
    if (!is_object(entry, "ChunkStorageMetadata")) {
      refuse("a chunk of \"", item.fqn, "\" is ", show(entry), ", expected a ChunkStorageMetadata");
    }
    DcpMetadata::Chunk chunk;
    chunk.offsets = sizes_field(entry, "offsets", item.fqn);
    chunk.sizes = sizes_field(entry, "sizes", item.fqn);
    spend(chunk.offsets.size());
    item.chunks.push_back(std::move(chunk));
  }
  drop_repeated(item.chunks);
}

DcpMetadata::Place Parser::read_place(const PickleNode* node, const std::string& fqn) const {
  const PickleNode* file = is_object(node, "_StorageInfo") ? field(node, "relative_path") : nullptr;
  if (file == nullptr || file->kind != Kind::kString) {
    refuse("the place of \"", fqn, "\" is ", show(node),
           ", expected a _StorageInfo with relative_path, offset and length");
  }
  if (file->text.size() > kMostFileName) {
    refuse("\"", fqn, "\" is said to be in a file with a name of ", file->text.size(), " bytes");
  }
  const PickleNode* transforms = field(node, "transform_descriptors");
  if (transforms != nullptr && !transforms->items.empty()) {
    const PickleNode* first = transforms->items[0];
    refuse("the bytes of \"", fqn, "\" are changed by ", transforms->items.size(),
           " stream transforms (", first->kind == Kind::kString ? first->text : "unnamed",
           "), which cannot be undone here. Save without _extensions");
  }
  const PickleNode* offset = field(node, "offset");
  const PickleNode* length = field(node, "length");
  for (const PickleNode* number : {offset, length}) {
    if (number == nullptr || number->kind != Kind::kInt || number->integer < 0) {
      refuse("the offset or the length of \"", fqn, "\" in ", file->text, " is no number of bytes");
    }
  }
  return {std::string(file->text), static_cast<uint64_t>(offset->integer),
          static_cast<uint64_t>(length->integer)};
}

void Parser::read_places(const PickleNode& dict) {
  for (size_t i = 0; i + 1 < dict.items.size(); i += 2) {
    const PickleNode* key = dict.items[i];
    const PickleNode* fqn = is_object(key, "MetadataIndex") ? field(key, "fqn") : nullptr;
    if (fqn == nullptr || fqn->kind != Kind::kString) {
      refuse("a key of storage_data is ", show(key), ", expected a MetadataIndex with its fqn");
    }
    const auto found = index_.find(fqn->text);
    if (found == index_.end()) continue;  // nothing refers to it
    put(read_place(dict.items[i + 1], items_[found->second].fqn), key, found->second);
  }
}

void Parser::put(DcpMetadata::Place place, const PickleNode* key, size_t i) {
  DcpMetadata::Item& item = items_[i];
  if (!item.is_tensor) {
    item.place = std::move(place);
    return;
  }
  const Sizes offsets = sizes_field(key, "offset", item.fqn);
  const auto is_it = [&](size_t chunk) {
    return item.chunks[chunk].offsets == offsets && !is_empty(item.chunks[chunk].sizes);
  };
  // The number of the chunk is a hint, the offsets are the key.
  const PickleNode* hint = field(key, "index");
  if (hint != nullptr && hint->kind == Kind::kInt && hint->integer >= 0 &&
      static_cast<uint64_t>(hint->integer) < item.chunks.size() &&
      is_it(static_cast<size_t>(hint->integer))) {
    item.chunks[static_cast<size_t>(hint->integer)].place = std::move(place);
    return;
  }
  const auto& order = chunks_by_offsets(i);
  auto at = std::lower_bound(
      order.begin(), order.end(), offsets,
      [&](size_t chunk, const Sizes& wanted) { return item.chunks[chunk].offsets < wanted; });
  if (at != order.end() && is_it(*at)) item.chunks[*at].place = std::move(place);
}

// The chunks that hold something, sorted.
const std::vector<size_t>& Parser::chunks_by_offsets(size_t i) {
  const auto [place, added] = by_offsets_.try_emplace(i);
  auto& order = place->second;
  if (!added) return order;
  const auto& chunks = items_[i].chunks;
  for (size_t chunk = 0; chunk < chunks.size(); ++chunk) {
    if (!is_empty(chunks[chunk].sizes)) order.push_back(chunk);
  }
  std::sort(order.begin(), order.end(),
            [&](size_t a, size_t b) { return chunks[a].offsets < chunks[b].offsets; });
  return order;
}

// Also puts the items in the order of planner_data, which is that of the tree; that of
// state_dict_metadata follows the ranks that wrote them.
void Parser::read_paths(const PickleNode* planner_data) {
  if (planner_data == nullptr || planner_data->kind != Kind::kDict) return;
  std::vector<DcpMetadata::Item> ordered;
  ordered.reserve(items_.size());
  std::vector<bool> taken(items_.size());
  for (size_t i = 0; i + 1 < planner_data->items.size(); i += 2) {
    const PickleNode* key = planner_data->items[i];
    const PickleNode* path = planner_data->items[i + 1];
    if (key->kind != Kind::kString || path->kind != Kind::kTuple) continue;
    const auto found = index_.find(key->text);
    if (found == index_.end() || taken[found->second]) continue;
    DcpMetadata::Item& item = items_[found->second];
    if (path->items.size() > kMostPathItems) {
      refuse("the path of \"", item.fqn.substr(0, 100), "\" has ", path->items.size(),
             " parts, more than ", kMostPathItems);
    }
    spend(path->items.size());
    for (const PickleNode* part : path->items) {
      if (part->kind == Kind::kInt) {
        item.path.emplace_back(part->integer);
      } else if (part->kind == Kind::kString) {
        spend(part->text.size());
        item.path.emplace_back(std::string(part->text));
      } else {
        refuse("the path of \"", item.fqn, "\" has ", show(part), " in it");
      }
    }
    taken[found->second] = true;
    ordered.push_back(std::move(item));
  }
  for (size_t i = 0; i < items_.size(); ++i) {
    if (!taken[i]) ordered.push_back(std::move(items_[i]));
  }
  items_ = std::move(ordered);
}

void check_bounds(const DcpMetadata::Item& item, const DcpMetadata::Chunk& chunk) {
  bool inside =
      chunk.offsets.size() == item.sizes.size() && chunk.sizes.size() == item.sizes.size();
  for (size_t d = 0; inside && d < item.sizes.size(); ++d) {
    inside = chunk.offsets[d] >= 0 && chunk.sizes[d] >= 0 && chunk.offsets[d] <= item.sizes[d] &&
             chunk.sizes[d] <= item.sizes[d] - chunk.offsets[d];
  }
  if (inside) return;
  refuse("the tensor \"", item.fqn, "\" of shape ", show(item.sizes), " has a chunk of ",
         show(chunk.sizes), " at ", show(chunk.offsets), ", which does not lie in it");
}

// Whether the chunks of a tensor fill it without overlap.
//
// Let c(x) be the number of chunks that hold the point x. Its derivative along all dims is a sum
// of one point for each corner of each chunk, positive where an even number of its coordinates are
// at the chunk's end. The chunks fill the tensor exactly when this equals the sum of the tensor's
// own corners. Dims that no chunk splits are left out; the others cost 2^dims corners for each
// chunk and a sort, however the chunks lie.
class Tiling {
 public:
  explicit Tiling(const DcpMetadata::Item& item) : item_(item) {
    for (const auto& chunk : item.chunks) {
      if (!is_empty(chunk.sizes)) boxes_.push_back(&chunk);
    }
    whole_.offsets.assign(item.sizes.size(), 0);
    whole_.sizes = item.sizes;
    for (size_t d = 0; d < item.sizes.size(); ++d) {
      const auto split = [&](const auto* box) { return box->sizes[d] != item.sizes[d]; };
      if (std::any_of(boxes_.begin(), boxes_.end(), split)) dims_.push_back(d);
    }
    boxes_.push_back(&whole_);  // counts negative
  }

  void check() {
    make_corners();
    std::sort(corners_.begin(), corners_.end(),
              [&](Corner a, Corner b) { return compare(a, b) < 0; });
    for (size_t begin = 0; begin < corners_.size();) {
      size_t end = begin;
      int64_t sum = 0;
      for (; end < corners_.size() && compare(corners_[begin], corners_[end]) == 0; ++end) {
        sum += sign(corners_[end]);
      }
      if (sum != 0) report(corners_[begin], sum);
      begin = end;
    }
  }

 private:
  struct Corner {
    uint32_t box;
    uint32_t ends;  // a bit for each of dims_: the chunk's end rather than its begin
  };
  // 8 bytes each, against the 100 and more that a chunk takes in the file.
  static constexpr uint64_t kMostCornersPerChunk = 16;
  static constexpr uint64_t kMostCornersOfFew = 4096;

  void make_corners() {
    const uint64_t boxes = boxes_.size();
    const uint64_t most = std::max(kMostCornersOfFew, boxes * kMostCornersPerChunk);
    if (dims_.size() > 12 || boxes << dims_.size() > most ||
        boxes > std::numeric_limits<uint32_t>::max()) {
      refuse("the tensor \"", item_.fqn, "\" of shape ", show(item_.sizes), " is split along ",
             dims_.size(), " dims into ", boxes - 1, " chunks; at most 4 dims are supported");
    }
    corners_.reserve(boxes << dims_.size());
    for (uint32_t box = 0; box < boxes; ++box) {
      for (uint32_t ends = 0; ends < uint32_t{1} << dims_.size(); ++ends) {
        corners_.push_back({box, ends});
      }
    }
  }

  int64_t sign(Corner corner) const {
    const bool negative =
        (__builtin_popcount(corner.ends) % 2 == 1) != (corner.box + size_t{1} == boxes_.size());
    return negative ? -1 : 1;
  }

  int64_t coordinate(Corner corner, size_t k) const {
    const auto& box = *boxes_[corner.box];
    const size_t d = dims_[k];
    return box.offsets[d] + ((corner.ends >> k & 1) != 0 ? box.sizes[d] : 0);
  }

  int compare(Corner a, Corner b) const {
    for (size_t k = 0; k < dims_.size(); ++k) {
      const int64_t left = coordinate(a, k);
      const int64_t right = coordinate(b, k);
      if (left != right) return left < right ? -1 : 1;
    }
    return 0;
  }

  // At the first corner that is left over, in the order of its coordinates, so many chunks too
  // many or too few begin.
  [[noreturn]] void report(Corner corner, int64_t sum) const {
    Sizes at(item_.sizes.size(), 0);
    for (size_t k = 0; k < dims_.size(); ++k) at[dims_[k]] = coordinate(corner, k);
    if (sum > 0) {
      refuse("chunks of the tensor \"", item_.fqn, "\" of shape ", show(item_.sizes),
             " overlap at ", show(at));
    }
    refuse("no chunk of the tensor \"", item_.fqn, "\" of shape ", show(item_.sizes),
           " holds its element at ", show(at));
  }

  const DcpMetadata::Item& item_;
  DcpMetadata::Chunk whole_;
  std::vector<const DcpMetadata::Chunk*> boxes_;
  std::vector<size_t> dims_;  // those that a chunk splits
  std::vector<Corner> corners_;
};

void check_place(const DcpMetadata::Place& place, const std::string& fqn, uint64_t least) {
  const std::string& file = place.file;
  if (file.empty()) refuse("\"", fqn, "\" has no file that holds it, or only in part");
  if (file == "." || file == ".." || file.find('/') != std::string::npos ||
      file.find('\0') != std::string::npos || file.size() > kMostFileName) {
    refuse("\"", fqn, "\" is said to be in \"", file.c_str(),
           "\", which is no name of a file in the folder");
  }
  if (place.bytes > std::numeric_limits<uint64_t>::max() - place.offset) {
    refuse("\"", fqn, "\" is said to be in ", file, " at ", place.offset, " with ", place.bytes,
           " bytes, more than a file can have");
  }
  if (place.bytes < least) {
    refuse("\"", fqn, "\" is said to have ", least, " bytes in an item of ", place.bytes,
           " bytes of ", file);
  }
}

void check_tensor(const DcpMetadata::Item& item) {
  const size_t element = info(item.dtype).bytes;
  const auto bytes = bytes_of(item.sizes, element);
  if (!bytes || item.sizes.size() > kMostDims) {
    refuse("the tensor \"", item.fqn, "\" has the impossible shape ", show(item.sizes));
  }
  for (const auto& chunk : item.chunks) {
    check_bounds(item, chunk);
    if (is_empty(chunk.sizes)) continue;
    // No overflow: the chunk lies in the tensor.
    check_place(chunk.place, item.fqn, bytes_of(chunk.sizes, element).value_or(0));
  }
  if (*bytes > 0) Tiling(item).check();
}

// Items that share bytes would let a small folder claim any amount of memory.
void check_places(const std::vector<DcpMetadata::Item>& items) {
  std::vector<std::pair<const DcpMetadata::Place*, const DcpMetadata::Item*>> places;
  for (const auto& item : items) {
    if (!item.is_tensor) places.emplace_back(&item.place, &item);
    for (const auto& chunk : item.chunks) {
      if (!chunk.place.file.empty()) places.emplace_back(&chunk.place, &item);
    }
  }
  std::sort(places.begin(), places.end(), [](const auto& a, const auto& b) {
    return std::tie(a.first->file, a.first->offset) < std::tie(b.first->file, b.first->offset);
  });
  for (size_t i = 1; i < places.size(); ++i) {
    const auto& [before, owner] = places[i - 1];
    const auto& [place, item] = places[i];
    if (before->file != place->file || before->offset + before->bytes <= place->offset) continue;
    refuse("the items of \"", owner->fqn, "\" and \"", item->fqn, "\" overlap in ", place->file,
           " at ", place->offset);
  }
}

void write_sizes(PickleWriter& out, const Sizes& sizes) {
  out.global("torch", "Size");
  out.begin_tuple(1);
  out.begin_tuple(sizes.size());
  for (const int64_t size : sizes) out.integer(size);
  out.end_tuple();
  out.end_tuple();
  out.call();
}

// An object without its state; build() follows where it has one.
void write_new(PickleWriter& out, const char* module, const char* name) {
  out.global(module, name);
  out.begin_tuple(0);
  out.end_tuple();
  out.make();
}

void begin_dict(PickleWriter& out) {
  out.empty_dict();
  out.begin_items();
}

void write_properties(PickleWriter& out, DType dtype) {
  write_new(out, kModule, "TensorProperties");
  out.begin_tuple(5);
  out.global("torch", info(dtype).torch_name);
  out.global("torch.serialization", "_get_layout");
  out.begin_tuple(1);
  out.text("torch.strided");
  out.end_tuple();
  out.call();
  out.boolean(false);  // requires_grad
  out.global(kModule, "_MEM_FORMAT_ENCODING");
  out.begin_tuple(1);
  out.integer(0);  // contiguous
  out.end_tuple();
  out.call();
  out.boolean(false);  // pin_memory
  out.end_tuple();
  out.build();
}

void write_item(PickleWriter& out, const DcpMetadata::Item& item) {
  out.text(item.fqn);
  if (!item.is_tensor) return write_new(out, kModule, "BytesStorageMetadata");
  write_new(out, kModule, "TensorStorageMetadata");
  begin_dict(out);
  out.text("properties");
  write_properties(out, item.dtype);
  out.text("size");
  write_sizes(out, item.sizes);
  out.text("chunks");
  out.empty_list();
  out.begin_items();
  for (const auto& chunk : item.chunks) {
    write_new(out, kModule, "ChunkStorageMetadata");
    begin_dict(out);
    out.text("offsets");
    write_sizes(out, chunk.offsets);
    out.text("sizes");
    write_sizes(out, chunk.sizes);
    out.end_setitems();
    out.build();
  }
  out.end_appends();
  out.end_setitems();
  out.build();
}

// planner_data: the path of each item, or None where none has one.
void write_paths(PickleWriter& out, const std::vector<DcpMetadata::Item>& items) {
  const auto has_path = [](const DcpMetadata::Item& item) { return !item.path.empty(); };
  if (!items.empty() && std::none_of(items.begin(), items.end(), has_path)) return out.none();
  begin_dict(out);
  for (const auto& item : items) {
    if (!has_path(item)) continue;
    out.text(item.fqn);
    out.begin_tuple(item.path.size());
    for (const auto& part : item.path) {
      if (const auto* index = std::get_if<int64_t>(&part)) {
        out.integer(*index);
      } else {
        out.text(std::get<std::string>(part));
      }
    }
    out.end_tuple();
  }
  out.end_setitems();
}

// `offsets` and `chunk` are those of a tensor's chunk, null for another value.
void write_place(PickleWriter& out, const std::string& fqn, const Sizes* offsets, size_t chunk,
                 const DcpMetadata::Place& place) {
  write_new(out, kModule, "MetadataIndex");
  begin_dict(out);
  out.text("fqn");
  out.text(fqn);
  out.text("index");
  if (offsets == nullptr) {
    out.none();
  } else {
    out.integer(static_cast<int64_t>(chunk));
    out.text("offset");
    write_sizes(out, *offsets);
  }
  out.end_setitems();
  out.build();
  write_new(out, "torch.distributed.checkpoint.filesystem", "_StorageInfo");
  begin_dict(out);
  out.text("relative_path");
  out.text(place.file);
  out.text("offset");
  out.integer(static_cast<int64_t>(place.offset));
  out.text("length");
  out.integer(static_cast<int64_t>(place.bytes));
  out.end_setitems();
  out.build();
}

void write_places(PickleWriter& out, const std::vector<DcpMetadata::Item>& items) {
  begin_dict(out);
  for (const auto& item : items) {
    if (!item.is_tensor) write_place(out, item.fqn, nullptr, 0, item.place);
    for (size_t i = 0; i < item.chunks.size(); ++i) {
      const auto& chunk = item.chunks[i];
      if (!chunk.place.file.empty()) write_place(out, item.fqn, &chunk.offsets, i, chunk.place);
    }
  }
  out.end_setitems();
}

}  // namespace

const DcpMetadata::Item* DcpMetadata::find(const std::string& fqn) const {
  if (index_.size() != items.size()) {
    index_.clear();
    for (size_t i = 0; i < items.size(); ++i) index_.emplace(items[i].fqn, i);
  }
  const auto found = index_.find(fqn);
  return found == index_.end() ? nullptr : &items[found->second];
}

DcpMetadata DcpMetadata::parse(std::string_view pickle) {
  const Pickle nodes(pickle);
  DcpMetadata metadata;
  metadata.items = Parser(nodes.root(), pickle.size()).items();
  metadata.check();
  metadata.find("");  // makes the index, so that readers may be several threads
  return metadata;
}

DcpMetadata DcpMetadata::merge(std::vector<Item> parts) {
  DcpMetadata metadata;
  std::unordered_map<std::string, size_t> index;
  for (auto& part : parts) {
    const auto [place, added] = index.emplace(part.fqn, metadata.items.size());
    if (added) {
      metadata.items.push_back(std::move(part));
      continue;
    }
    Item& item = metadata.items[place->second];
    if (!item.is_tensor || !part.is_tensor) {
      refuse("\"", item.fqn, "\" is no tensor on one rank and is there on another too");
    }
    if (item.dtype != part.dtype || item.sizes != part.sizes) {
      refuse("the ranks disagree on the tensor \"", item.fqn, "\": ", info(item.dtype).torch_name,
             " ", show(item.sizes), " and ", info(part.dtype).torch_name, " ", show(part.sizes));
    }
    for (auto& chunk : part.chunks) item.chunks.push_back(std::move(chunk));
  }
  for (auto& item : metadata.items) drop_repeated(item.chunks);
  metadata.check();
  metadata.find("");
  return metadata;
}

void DcpMetadata::check() const {
  for (const auto& item : items) {
    if (item.is_tensor) {
      check_tensor(item);
    } else {
      check_place(item.place, item.fqn, 1);
    }
  }
  check_places(items);
}

std::string DcpMetadata::to_pickle() const {
  PickleWriter out;
  write_new(out, kModule, "Metadata");
  begin_dict(out);
  out.text("state_dict_metadata");
  begin_dict(out);
  for (const auto& item : items) write_item(out, item);
  out.end_setitems();
  out.text("planner_data");
  write_paths(out, items);
  out.text("storage_data");
  write_places(out, items);
  out.text("storage_meta");
  out.none();
  out.text("version");
  out.text("1.0.0");
  out.end_setitems();
  out.build();
  return out.finish();
}

}  // namespace lightning
