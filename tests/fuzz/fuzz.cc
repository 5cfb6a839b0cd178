#include "tests/fuzz/fuzz.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <utility>
#include <vector>

#include "lightning/checkpoint/crc32.h"
#include "lightning/checkpoint/dcp_metadata.h"
#include "lightning/checkpoint/mapped_file.h"
#include "lightning/checkpoint/pickle_reader.h"
#include "lightning/checkpoint/safetensors_header.h"
#include "lightning/checkpoint/torch_archive.h"
#include "lightning/checkpoint/zip_reader.h"
#include "lightning/errors.h"

// g++ 12 has these in its library and not in its headers, of which it lacks some.
extern "C" {
int __sanitizer_install_malloc_and_free_hooks(void (*malloc_hook)(const volatile void*, size_t),
                                              void (*free_hook)(const volatile void*));
size_t __sanitizer_get_allocated_size(const volatile void* place);
void __asan_poison_memory_region(const volatile void* place, size_t bytes);
void __asan_unpoison_memory_region(const volatile void* place, size_t bytes);
}

// Leaks are counted for each input; what the program itself keeps until its end is none. A length
// that was believed ends the program with a report rather than with the machine's memory.
extern "C" const char* __asan_default_options() {
  return "detect_leaks=0:max_allocation_size_mb=1024:hard_rss_limit_mb=4096:handle_abort=1";
}
extern "C" const char* __ubsan_default_options() { return "print_stacktrace=1"; }

namespace lightning::fuzz {
namespace {

using Kind = PickleNode::Kind;

template <class... Args>
void require(bool holds, const Args&... what) {
  if (!holds) throw Violation(str(what...));
}

// -- memory ------------------------------------------------------------------------------------

std::atomic<int64_t> live_bytes{0};
std::atomic<int64_t> peak_bytes{0};

void count_malloc(const volatile void*, size_t bytes) {
  const int64_t live = live_bytes += static_cast<int64_t>(bytes);
  int64_t peak = peak_bytes;
  while (live > peak && !peak_bytes.compare_exchange_weak(peak, live)) {
  }
}

void count_free(const volatile void* place) {
  if (place == nullptr) return;
  live_bytes -= static_cast<int64_t>(__sanitizer_get_allocated_size(place));
}

// What is allocated between its beginning and end, without what skip() runs.
class Meter {
 public:
  Meter() {
    static const int hooks = __sanitizer_install_malloc_and_free_hooks(count_malloc, count_free);
    require(hooks != 0, "the sanitizer takes no hooks of malloc");
    begin_ = live_bytes;
    peak_bytes = begin_;
  }
  int64_t left() const { return live_bytes - begin_; }
  uint64_t peak() const { return static_cast<uint64_t>(peak_bytes - begin_); }

  // What `work` still holds at its end does not count afterwards.
  template <class Work>
  void skip(const Work& work) {
    const int64_t peak = peak_bytes;
    const int64_t before = live_bytes;
    work();
    const int64_t held = live_bytes - before;
    begin_ += held;
    peak_bytes = peak + held;
  }

 private:
  int64_t begin_;
};

// -- the files ---------------------------------------------------------------------------------

// Bytes in a file in memory, alone or in the middle of other bytes, as an item of a .distcp file
// is. What is mapped around them must not be touched.
class GuardedFile {
 public:
  GuardedFile(std::string_view bytes, bool alone) {
    constexpr uint64_t kBefore = 4096 + 64;
    constexpr uint64_t kBehind = 512;
    const int fd = ::memfd_create("mutant", MFD_CLOEXEC);
    require(fd >= 0, "no file in memory");
    begin_ = alone ? 0 : kBefore;
    bytes_ = bytes.size();
    std::string content(begin_, 'P');
    content += bytes;
    if (!alone) content.append(kBehind, 'K');
    const bool written =
        ::write(fd, content.data(), content.size()) == static_cast<ssize_t>(content.size());
    if (written) file_ = MappedFile::open(str("/proc/self/fd/", fd));
    ::close(fd);
    require(written, "no room for a file in memory");
    const uint64_t page = static_cast<uint64_t>(::sysconf(_SC_PAGESIZE));
    mapped_ = (file_->size() + page - 1) / page * page;
    if (mapped_ == 0) return;
    __asan_poison_memory_region(file_->data(), begin_);
    __asan_poison_memory_region(file_->data() + begin_ + bytes_, mapped_ - begin_ - bytes_);
  }
  ~GuardedFile() {
    if (mapped_ != 0) __asan_unpoison_memory_region(file_->data(), mapped_);
  }
  GuardedFile(const GuardedFile&) = delete;
  GuardedFile& operator=(const GuardedFile&) = delete;

  const std::shared_ptr<MappedFile>& file() const { return file_; }
  uint64_t begin() const { return begin_; }
  uint64_t bytes() const { return bytes_; }

 private:
  std::shared_ptr<MappedFile> file_;
  uint64_t begin_ = 0;
  uint64_t bytes_ = 0;
  uint64_t mapped_ = 0;
};

// Their own allocation, so that the sanitizer guards both ends.
class GuardedText {
 public:
  explicit GuardedText(std::string_view text)
      : place_(new char[text.size()]), text_(place_.get(), text.size()) {
    std::copy(text.begin(), text.end(), place_.get());
  }
  std::string_view text() const { return text_; }

 private:
  std::unique_ptr<char[]> place_;
  std::string_view text_;
};

// -- pickles -----------------------------------------------------------------------------------

// Touches every byte; the sum keeps the compiler from leaving it out.
volatile uint8_t touched;
void touch(std::string_view text) {
  uint8_t sum = 0;
  for (const char c : text) sum = static_cast<uint8_t>(sum + static_cast<uint8_t>(c));
  touched = sum;
}

void check_node(const PickleNode& node) {
  touch(node.text);
  touch(node.name);
  const auto& items = node.items;
  switch (node.kind) {
    case Kind::kBool:
      return require(node.integer == 0 || node.integer == 1, "a bool is ", node.integer);
    case Kind::kBigInt:
      return require(node.text.size() > 8, "a big int has ", node.text.size(), " bytes");
    case Kind::kComplex:
      return require(
          items.size() == 2 && items[0]->kind == Kind::kFloat && items[1]->kind == Kind::kFloat,
          "a complex is not of two floats");
    case Kind::kDict:
      return require(items.size() % 2 == 0, "a dict has a key without a value");
    case Kind::kGlobal:
      return require(node.text.size() <= 512 + 8 && node.name.size() <= 512, "a long global");
    case Kind::kPersistent:
      return require(items.size() == 1, "a persistent id has ", items.size(), " items");
    case Kind::kCall:
      return require(items.size() == 2 && items[1]->kind == Kind::kTuple,
                     "a call is not of a callable and a tuple");
    case Kind::kNew:
      require(items.size() == 2 || items.size() == 3, "a new object has ", items.size(), " parts");
      require(items[1]->kind == Kind::kTuple, "the arguments of a new object are no tuple");
      return require(items.size() == 2 || items[2]->kind == Kind::kDict,
                     "the keywords of a new object are no dict");
    default:
      return;
  }
}

// A set without an allocation for each: those are what takes time under the sanitizer.
class Seen {
 public:
  // Whether it is new.
  bool insert(const PickleNode* node) {
    if (2 * ++size_ > table_.size()) grow();
    const bool is_new = place(node) == nullptr;
    place(node) = node;
    if (!is_new) --size_;
    return is_new;
  }

 private:
  const PickleNode*& place(const PickleNode* node) {
    size_t i = (reinterpret_cast<uintptr_t>(node) * 0x9e3779b97f4a7c15) >> 20;
    while (true) {
      auto& found = table_[i++ & (table_.size() - 1)];
      if (found == nullptr || found == node) return found;
    }
  }

  void grow() {
    const auto old = std::move(table_);
    table_.assign(std::max<size_t>(64, 4 * old.size()), nullptr);
    for (const PickleNode* node : old) {
      if (node != nullptr) place(node) = node;
    }
  }

  std::vector<const PickleNode*> table_;  // a power of 2 of places, at most half of them taken
  size_t size_ = 0;
};

// Every node once, in no order; checks each.
std::vector<const PickleNode*> nodes_of(const PickleNode& root) {
  std::vector<const PickleNode*> nodes = {&root};
  Seen seen;
  seen.insert(&root);
  const auto add = [&](const PickleItems& items) {
    for (const PickleNode* item : items) {
      require(item != nullptr, "an item is null");
      if (seen.insert(item)) nodes.push_back(item);
    }
  };
  // A list that several sets share is walked for each, which a file can repeat: bounded.
  uint64_t steps = uint64_t{1} << 24;
  for (size_t i = 0; i < nodes.size() && steps > 0; ++i) {
    const PickleNode& node = *nodes[i];
    check_node(node);
    steps -= std::min<uint64_t>(steps, node.items.size());
    add(node.items);
    if (node.additions == nullptr) continue;
    require(node.kind == Kind::kCall || node.kind == Kind::kNew, "additions to a plain value");
    require(node.additions->entries.size() % 2 == 0, "a key without a value was added");
    add(node.additions->items);
    add(node.additions->entries);
    const PickleNode* state = node.additions->state;
    if (state != nullptr && seen.insert(state)) nodes.push_back(state);
  }
  return nodes;
}

void run_pickle(std::string_view bytes, Meter& meter) {
  const Pickle pickle(bytes);
  require(pickle.bytes_read() <= bytes.size() && bytes[pickle.bytes_read() - 1] == '.',
          "a pickle ends at byte ", pickle.bytes_read(), " of ", bytes.size());
  meter.skip([&] { nodes_of(pickle.root()); });
}

// -- torch files -------------------------------------------------------------------------------

void check_record(const ZipReader& zip, const ZipReader::Record& record, const GuardedFile& file) {
  require(record.offset >= file.begin() && record.bytes <= file.bytes() &&
              record.offset - file.begin() <= file.bytes() - record.bytes,
          "the record at ", record.offset, " of ", record.bytes, " bytes leaves the zip");
  require(zip.find(record.name) == &record, "the record ", record.name, " is not found");
  touch(zip.data(record));
}

void check_tensor(const ZipReader& zip, const TensorRecord& tensor) {
  const auto element = static_cast<__int128>(info(tensor.dtype).bytes);
  require(tensor.storage != nullptr && tensor.storage_bytes <= tensor.storage->bytes,
          "a storage is longer than its record");
  require(tensor.sizes.size() == tensor.strides.size() && tensor.sizes.size() <= 64 &&
              tensor.storage_offset >= 0,
          "a tensor has ", tensor.sizes.size(), " sizes and ", tensor.strides.size(), " strides");
  constexpr __int128 kTooMany = static_cast<__int128>(1) << 63;
  __int128 bytes = element;
  __int128 last = tensor.storage_offset;
  bool empty = false;
  for (size_t d = 0; d < tensor.sizes.size(); ++d) {
    require(tensor.sizes[d] >= 0 && tensor.strides[d] >= 0, "a tensor has a negative size");
    empty = empty || tensor.sizes[d] == 0;
    last += (static_cast<__int128>(tensor.sizes[d]) - 1) * tensor.strides[d];
    bytes = std::min(bytes * tensor.sizes[d], kTooMany);
  }
  if (empty) return;
  require(bytes < kTooMany, "a tensor has more bytes than can be counted");
  require((last + 1) * element <= static_cast<__int128>(tensor.storage_bytes),
          "a tensor leaves its storage of ", tensor.storage_bytes, " bytes");
  const auto data = zip.data(*tensor.storage);
  touch(data.substr(static_cast<size_t>(tensor.storage_offset * element)));
}

void run_archive(const GuardedFile& file, bool verify, Meter& meter) {
  const TorchArchive archive(file.file(), file.begin(), file.bytes(), verify);
  std::vector<const PickleNode*> tensors;
  meter.skip([&] {
    tensors = nodes_of(archive.root());
    const auto is_other = [](const auto* node) { return !TorchArchive::is_tensor(*node); };
    tensors.erase(std::remove_if(tensors.begin(), tensors.end(), is_other), tensors.end());
  });
  bool refused = false;
  for (const PickleNode* node : tensors) {
    try {
      check_tensor(archive.zip(), archive.record(*node));
    } catch (const CheckpointError&) {
      refused = true;
    }
  }
  meter.skip([&] { std::vector<const PickleNode*>().swap(tensors); });
  if (refused) throw CheckpointError("a tensor claims what does not hold");
}

void run_torch_file(std::string_view bytes, Meter& meter) {
  std::unique_ptr<GuardedFile> file;
  meter.skip(
      [&] { file = std::make_unique<GuardedFile>(bytes, crc32(bytes.data(), bytes.size()) % 2); });
  struct Close {  // also where a reader throws
    std::unique_ptr<GuardedFile>& file;
    Meter& meter;
    ~Close() {
      meter.skip([this] { file = nullptr; });
    }
  } close{file, meter};

  try {
    const ZipReader zip(file->file(), file->begin(), file->bytes());
    for (const auto& record : zip.records()) check_record(zip, record, *file);
    zip.verify_all();
    for (const auto& record : zip.records()) zip.verify(record);
    run_archive(*file, true, meter);
  } catch (const CheckpointError&) {
    // Without CRCs there is more to see of it.
  }
  run_archive(*file, false, meter);
}

// -- the others --------------------------------------------------------------------------------

bool same(const DcpMetadata::Place& a, const DcpMetadata::Place& b) {
  return a.file == b.file && a.offset == b.offset && a.bytes == b.bytes;
}

bool same(const DcpMetadata::Item& a, const DcpMetadata::Item& b) {
  return a.fqn == b.fqn && a.path == b.path && a.is_tensor == b.is_tensor &&
         (!a.is_tensor || a.dtype == b.dtype) && a.sizes == b.sizes && same(a.place, b.place) &&
         std::equal(a.chunks.begin(), a.chunks.end(), b.chunks.begin(), b.chunks.end(),
                    [](const auto& x, const auto& y) {
                      return x.offsets == y.offsets && x.sizes == y.sizes && same(x.place, y.place);
                    });
}

void check_item(const DcpMetadata::Item& item) {
  const auto check_file = [&](const std::string& file) {
    require(!file.empty() && file != ".." && file.find('/') == std::string::npos, item.fqn,
            " lies in \"", file, "\"");
  };
  if (!item.is_tensor) return check_file(item.place.file);
  for (const auto& chunk : item.chunks) {
    bool empty = false;
    bool inside =
        chunk.offsets.size() == item.sizes.size() && chunk.sizes.size() == item.sizes.size();
    for (size_t d = 0; inside && d < item.sizes.size(); ++d) {
      inside = chunk.offsets[d] >= 0 && chunk.sizes[d] >= 0 &&
               chunk.sizes[d] <= item.sizes[d] - chunk.offsets[d];
      empty = empty || chunk.sizes[d] == 0;
    }
    require(inside, "a chunk of ", item.fqn, " does not lie in it");
    if (!empty) check_file(chunk.place.file);
  }
}

void run_metadata(std::string_view bytes, Meter&) {
  const auto metadata = DcpMetadata::parse(bytes);
  for (const auto& item : metadata.items) {
    check_item(item);
    require(metadata.find(item.fqn) == &item, "the item ", item.fqn, " is not found");
  }
  const auto written = metadata.to_pickle();
  std::vector<DcpMetadata::Item> again;
  try {
    again = DcpMetadata::parse(written).items;
  } catch (const CheckpointError& error) {
    throw Violation(str("metadata writes what it does not read: ", error.what()));
  }
  require(
      std::is_permutation(again.begin(), again.end(), metadata.items.begin(), metadata.items.end(),
                          [](const auto& a, const auto& b) { return same(a, b); }),
      "metadata comes back as another");
}

void run_safetensors(std::string_view bytes, Meter&) {
  // As read_safetensors() does it.
  constexpr size_t kLengthBytes = 8;
  if (bytes.size() < kLengthBytes) throw CheckpointError("short");
  uint64_t length = 0;
  for (size_t i = 0; i < kLengthBytes; ++i) {
    length |= uint64_t{static_cast<uint8_t>(bytes[i])} << (8 * i);
  }
  if (length > bytes.size() - kLengthBytes) throw CheckpointError("cut short");
  const uint64_t data_bytes = bytes.size() - kLengthBytes - length;
  const GuardedText json(bytes.substr(kLengthBytes, length));
  const auto header = SafetensorsHeader::parse(json.text(), data_bytes);
  for (const auto& entry : header.entries) {
    require(entry.begin <= entry.end && entry.end <= data_bytes, "the tensor ", entry.name,
            " leaves the file");
    require(entry.sizes.size() <= 64, "a tensor has ", entry.sizes.size(), " dims");
    __int128 needed = static_cast<__int128>(info(entry.dtype).bytes);
    for (const int64_t size : entry.sizes) {
      require(size >= 0, "a tensor has a negative size");
      needed = std::min<__int128>(needed * size, static_cast<__int128>(1) << 64);
    }
    require(needed == entry.end - entry.begin, "the tensor ", entry.name, " is not of its size");
  }
  const auto again = SafetensorsHeader::parse(header.to_json(), data_bytes);
  require(again.metadata == header.metadata && again.entries.size() == header.entries.size(),
          "a header comes back as another");
}

void run(Format format, std::string_view bytes, Meter& meter) {
  switch (format) {
    case Format::kTorchFile:
      return run_torch_file(bytes, meter);
    case Format::kPickle:
      return run_pickle(bytes, meter);
    case Format::kDcpMetadata:
      return run_metadata(bytes, meter);
    case Format::kSafetensors:
      return run_safetensors(bytes, meter);
  }
}

}  // namespace

Outcome fuzz_one(Format format, std::string_view bytes) {
  const GuardedText copy(bytes);
  Outcome outcome;
  Meter meter;
  try {
    run(format, copy.text(), meter);
    outcome.read = true;
  } catch (const CheckpointError& error) {
    require(error.what()[0] != '\0', "an error says nothing");
  } catch (const Violation&) {
    throw;
  } catch (const std::exception& error) {
    throw Violation(str("an exception that is no CheckpointError: ", error.what()));
  }
  outcome.peak_bytes = meter.peak();
  outcome.left_bytes = meter.left();
  require(outcome.peak_bytes <= kMostBytesBeside + kMostBytesPerByte * bytes.size(),
          outcome.peak_bytes, " bytes were allocated for an input of ", bytes.size());
  return outcome;
}

}  // namespace lightning::fuzz
