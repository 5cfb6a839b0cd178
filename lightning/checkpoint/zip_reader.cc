#include "lightning/checkpoint/zip_reader.h"

#include <algorithm>
#include <atomic>
#include <numeric>
#include <utility>

#include "lightning/checkpoint/crc32.h"
#include "lightning/checkpoint/threads.h"
#include "lightning/checkpoint/zip_format.h"
#include "lightning/errors.h"

namespace lightning {
namespace {

using namespace zip_format;

// What a thread takes at once when records are compared.
constexpr uint64_t kPieceBytes = uint64_t{4} << 20;

// For messages: names come from the file and may hold anything.
std::string shown(std::string_view name) {
  std::string text = "\"";
  for (const char c : name.substr(0, 200)) text += static_cast<unsigned char>(c) < ' ' ? '?' : c;
  return text + (name.size() > 200 ? "...\"" : "\"");
}

std::string hex(uint32_t value) {
  std::string text = "0x";
  for (int shift = 28; shift >= 0; shift -= 4) text += "0123456789abcdef"[value >> shift & 15];
  return text;
}

// Records that stand in the order of their numbers, as torch.save writes them, are sorted by this
// but for a few.
bool name_before(std::string_view a, std::string_view b) {
  return a.size() != b.size() ? a.size() < b.size() : a < b;
}

struct Directory {
  uint64_t entries = 0;
  uint64_t offset = 0;
  uint64_t bytes = 0;
};

struct Entry {
  std::string_view name;  // with the folder
  uint16_t flags = 0;
  uint16_t method = 0;
  uint32_t crc = 0;
  uint64_t packed = 0;
  uint64_t bytes = 0;
  uint64_t header = 0;
  uint64_t disk = 0;
};

// A zip in memory. All offsets are from its first byte, and all are checked before they are used.
class Zip {
 public:
  Zip(const uint8_t* data, uint64_t bytes, std::string where)
      : data_(data), bytes_(bytes), where_(std::move(where)) {}

  [[noreturn]] void refuse(const std::string& what) const {
    throw CheckpointError(str("Cannot read ", where_, ": ", what));
  }
  [[noreturn]] void refuse_torn(const std::string& what) const {
    refuse(what + " The file is torn or damaged; take another copy, or an earlier checkpoint.");
  }

  Directory directory() const;
  // The entry at `at`, which moves behind it.
  Entry entry(uint64_t& at, uint64_t end) const;
  // Where the data of an entry begins. It ends before `limit`.
  uint64_t data_offset(const Entry& entry, uint64_t limit) const;

 private:
  uint64_t end_record() const;
  void take_zip64(Entry& entry, const uint8_t* extra, uint64_t extra_bytes,
                  uint64_t disk_short) const;
  void check_header(const Entry& entry, const uint8_t* header) const;

  const uint8_t* data_;
  uint64_t bytes_;
  std::string where_;
};

// The end record is the last thing but for a comment, whose length it gives.
uint64_t Zip::end_record() const {
  const bool begins_as_zip = bytes_ >= 4 && get32(data_) == kLocalHeader;
  const uint64_t most = std::min(bytes_, kEndBytes + kMostComment);
  for (uint64_t back = kEndBytes; back <= most; ++back) {
    const uint8_t* at = data_ + (bytes_ - back);
    if (get32(at) == kEnd && get16(at + 20) == back - kEndBytes) return bytes_ - back;
  }
  if (begins_as_zip) {
    refuse_torn(str("its ", bytes_, " bytes begin as a zip file but have no end record."));
  }
  refuse("it is no zip file, as torch.save has written since version 1.6.");
}

Directory Zip::directory() const {
  const uint64_t end = end_record();
  const uint8_t* at = data_ + end;
  const uint16_t entries = get16(at + 10);
  const uint32_t bytes = get32(at + 12);
  const uint32_t offset = get32(at + 16);
  Directory found{entries, offset, bytes};
  uint64_t limit = end;
  bool one_disk = get16(at + 4) == 0 && get16(at + 6) == 0 && get16(at + 8) == entries;

  const bool has_zip64 =
      end >= kLocator64Bytes && get32(data_ + (end - kLocator64Bytes)) == kLocator64;
  if (has_zip64) {
    const uint64_t before_locator = end - kLocator64Bytes;
    limit = get64(data_ + before_locator + 8);
    if (before_locator < kEnd64Bytes || limit > before_locator - kEnd64Bytes ||
        get32(data_ + limit) != kEnd64) {
      refuse_torn("its zip64 end record is not where the file says.");
    }
    const uint8_t* end64 = data_ + limit;
    found = {get64(end64 + 32), get64(end64 + 48), get64(end64 + 40)};
    one_disk = one_disk && get32(end64 + 16) == 0 && get32(end64 + 20) == 0 &&
               get64(end64 + 24) == found.entries;
    const bool agree = (entries == kIn64Short || entries == found.entries) &&
                       (bytes == kIn64 || bytes == found.bytes) &&
                       (offset == kIn64 || offset == found.offset);
    if (!agree) refuse_torn("its two end records differ.");
  }
  if (!one_disk) refuse_torn("its end record speaks of several disks.");
  if (found.offset > limit || found.bytes > limit - found.offset ||
      found.entries > found.bytes / kEntryBytes) {
    refuse_torn(str("its directory of ", found.entries, " records would lie at byte ", found.offset,
                    " and take ", found.bytes, " bytes, but has to end before byte ", limit, "."));
  }
  return found;
}

Entry Zip::entry(uint64_t& at, uint64_t end) const {
  const uint8_t* p = data_ + at;
  if (end - at < kEntryBytes || get32(p) != kEntry) {
    refuse_torn(str("its directory has no entry at byte ", at, "."));
  }
  Entry entry;
  entry.flags = get16(p + 8);
  entry.method = get16(p + 10);
  entry.crc = get32(p + 16);
  entry.packed = get32(p + 20);
  entry.bytes = get32(p + 24);
  const uint64_t name_bytes = get16(p + 28);
  const uint64_t extra_bytes = get16(p + 30);
  const uint64_t comment_bytes = get16(p + 32);
  const uint16_t disk = get16(p + 34);
  entry.header = get32(p + 42);
  if (end - at - kEntryBytes < name_bytes + extra_bytes + comment_bytes) {
    refuse_torn(str("the entry at byte ", at, " leaves its directory."));
  }
  entry.name = {reinterpret_cast<const char*>(p + kEntryBytes), name_bytes};
  entry.disk = disk;
  take_zip64(entry, p + kEntryBytes + name_bytes, extra_bytes, disk);
  at += kEntryBytes + name_bytes + extra_bytes + comment_bytes;
  return entry;
}

// The extra holds those numbers, in this order, that do not fit in their places.
void Zip::take_zip64(Entry& entry, const uint8_t* extra, uint64_t extra_bytes,
                     uint64_t disk_short) const {
  uint64_t* const wide[] = {entry.bytes == kIn64 ? &entry.bytes : nullptr,
                            entry.packed == kIn64 ? &entry.packed : nullptr,
                            entry.header == kIn64 ? &entry.header : nullptr};
  for (uint64_t at = 0; extra_bytes - at >= 4;) {
    const uint16_t kind = get16(extra + at);
    uint64_t left = get16(extra + at + 2);
    at += 4;
    if (left > extra_bytes - at) break;  // others write what they like here; zip64 is then missing
    if (kind != kZip64Extra) {
      at += left;
      continue;
    }
    for (uint64_t* number : wide) {
      if (number == nullptr) continue;
      if (left < 8) refuse_torn(str("the zip64 sizes of ", shown(entry.name), " are cut short."));
      *number = get64(extra + at);
      at += 8;
      left -= 8;
    }
    if (disk_short == kIn64Short && left >= 4) entry.disk = get32(extra + at);
    return;
  }
}

uint64_t Zip::data_offset(const Entry& entry, uint64_t limit) const {
  if (limit < kLocalHeaderBytes || entry.header > limit - kLocalHeaderBytes) {
    refuse_torn(str("the record ", shown(entry.name), " would begin at byte ", entry.header,
                    ", behind the last one's place at ", limit, "."));
  }
  const uint8_t* p = data_ + entry.header;
  if (get32(p) != kLocalHeader) {
    refuse_torn(
        str("the record ", shown(entry.name), " has no header at byte ", entry.header, "."));
  }
  const uint64_t name_bytes = get16(p + 26);
  const uint64_t extra_bytes = get16(p + 28);
  const uint64_t left = limit - entry.header - kLocalHeaderBytes;
  if (name_bytes + extra_bytes > left || entry.bytes > left - name_bytes - extra_bytes) {
    refuse_torn(str("the record ", shown(entry.name), " at byte ", entry.header, " has ",
                    entry.bytes, " bytes, more than the ", left, " before the directory."));
  }
  const std::string_view name(reinterpret_cast<const char*>(p + kLocalHeaderBytes), name_bytes);
  if (name != entry.name) {
    refuse_torn(str("the directory's record ", shown(entry.name), " calls itself ", shown(name),
                    " at byte ", entry.header, "."));
  }
  check_header(entry, p);
  return entry.header + kLocalHeaderBytes + name_bytes + extra_bytes;
}

void Zip::check_header(const Entry& entry, const uint8_t* header) const {
  constexpr uint16_t kAnyEncryption = kEncrypted | kStrongEncryption | kMaskedHeader;
  if (((entry.flags | get16(header + 6)) & kAnyEncryption) != 0) {
    refuse(str("the record ", shown(entry.name), " is encrypted. Write the file by torch.save."));
  }
  if (entry.method != 0 || get16(header + 8) != 0 || entry.packed != entry.bytes) {
    refuse(str("the record ", shown(entry.name), " is compressed (method ", entry.method, ", ",
               entry.packed, " of ", entry.bytes, " bytes), which torch.save never does. Pack it ",
               "again without compression (`zip -0`)."));
  }
  if (entry.disk != 0) refuse(str("the record ", shown(entry.name), " is on another disk."));
  if ((get16(header + 6) & kHasDescriptor) != 0) return;
  const uint32_t bytes = get32(header + 22);
  if (get32(header + 14) != entry.crc || (bytes != kIn64 && bytes != entry.bytes)) {
    refuse_torn(str("the record ", shown(entry.name), " has ", entry.bytes, " bytes and CRC ",
                    hex(entry.crc), " in the directory, but ", bytes, " and ",
                    hex(get32(header + 14)), " in its header."));
  }
}

}  // namespace

std::string place_of(const MappedFile& file, uint64_t begin, uint64_t bytes) {
  if (begin == 0 && bytes == file.size()) return file.path();
  return str(file.path(), " (the item of ", bytes, " bytes at byte ", begin, ")");
}

ZipReader::ZipReader(std::shared_ptr<MappedFile> file) : ZipReader(file, 0, file->size()) {}

ZipReader::ZipReader(std::shared_ptr<MappedFile> file, uint64_t begin, uint64_t bytes)
    : file_(std::move(file)) {
  if (begin > file_->size() || bytes > file_->size() - begin) {
    throw CheckpointError(str("Cannot read ", file_->path(), ": an item of ", bytes,
                              " bytes should lie at byte ", begin, ", but the file has ",
                              file_->size(), " bytes. It is torn; take another copy."));
  }
  where_ = place_of(*file_, begin, bytes);
  read_directory(begin, bytes);
  check_overlaps();
  sort_names();
  check_byteorder();
  file_->check();
}

void ZipReader::read_directory(uint64_t begin, uint64_t bytes) {
  const Zip zip(file_->data() + begin, bytes, where_);
  const Directory directory = zip.directory();
  const uint64_t end = directory.offset + directory.bytes;
  records_.reserve(directory.entries);
  spans_.reserve(directory.entries);
  uint64_t at = directory.offset;
  for (uint64_t i = 0; i < directory.entries; ++i) {
    const Entry entry = zip.entry(at, end);
    const uint64_t data = zip.data_offset(entry, directory.offset);
    spans_.emplace_back(entry.header, data + entry.bytes);
    const auto slash = entry.name.find('/');
    if (slash == 0 || slash == std::string_view::npos) {
      zip.refuse(str("the record ", shown(entry.name),
                     " is in no folder. It is a zip file, but not one of torch.save."));
    }
    const auto folder = entry.name.substr(0, slash);
    if (folder_.empty()) folder_ = folder;
    if (folder != folder_) {
      zip.refuse(str("it has records in two folders, ", shown(folder_), " and ", shown(folder),
                     ". It is a zip file, but not one of torch.save."));
    }
    const bool is_folder = entry.name.back() == '/' && entry.bytes == 0;  // zip programs add these
    if (is_folder) continue;
    records_.push_back({entry.name.substr(slash + 1), begin + data, entry.bytes, entry.crc});
    has_crcs_ = has_crcs_ || entry.crc != 0;
  }
  if (at != end) {
    zip.refuse_torn(str("its directory has ", end - at, " bytes behind its last entry."));
  }
  if (records_.empty()) zip.refuse("it is a zip file without records.");
}

void ZipReader::check_overlaps() {
  std::sort(spans_.begin(), spans_.end());
  for (size_t i = 1; i < spans_.size(); ++i) {
    if (spans_[i].first >= spans_[i - 1].second) continue;
    throw CheckpointError(str("Cannot read ", where_, ": the record at byte ", spans_[i].first,
                              " begins inside the one before it, which ends at byte ",
                              spans_[i - 1].second, ". The file is damaged; take another copy."));
  }
  spans_ = {};
}

// A sorted list and not a hash table: nobody can make names that take it long.
void ZipReader::sort_names() {
  const auto before = [this](size_t a, size_t b) {
    return name_before(records_[a].name, records_[b].name);
  };
  by_name_.resize(records_.size());
  std::iota(by_name_.begin(), by_name_.end(), size_t{0});
  std::sort(by_name_.begin(), by_name_.end(), before);
  const auto twice = std::adjacent_find(by_name_.begin(), by_name_.end(),
                                        [&before](size_t a, size_t b) { return !before(a, b); });
  if (twice == by_name_.end()) return;
  throw CheckpointError(str("Cannot read ", where_, ": it has the record ",
                            shown(records_[*twice].name),
                            " twice. The file is damaged; take another copy."));
}

void ZipReader::check_byteorder() const {
  const Record* order = find("byteorder");
  if (order == nullptr || data(*order) == "little") return;
  throw CheckpointError(str("Cannot read ", where_, ": its byte order is ",
                            shown(data(*order).substr(0, 40)),
                            ", only \"little\" can be read. Load and save it again on a "
                            "little-endian machine (x86, ARM)."));
}

const ZipReader::Record* ZipReader::find(std::string_view name) const {
  const auto found = std::lower_bound(
      by_name_.begin(), by_name_.end(), name,
      [this](size_t i, std::string_view wanted) { return name_before(records_[i].name, wanted); });
  if (found == by_name_.end() || records_[*found].name != name) return nullptr;
  return &records_[*found];
}

const ZipReader::Record& ZipReader::at(std::string_view name) const {
  if (const Record* record = find(name)) return *record;
  throw CheckpointError(str("Cannot read ", where_, ": it has no record ", shown(name),
                            " among its ", records_.size(),
                            ". It is not from torch.save, or damaged; take another copy."));
}

std::string_view ZipReader::data(const Record& record) const {
  return {reinterpret_cast<const char*>(file_->data()) + record.offset, record.bytes};
}

void ZipReader::refuse_crc(const Record& record, uint32_t crc) const {
  file_->check();  // a torn file explains it better
  throw CheckpointError(str("Cannot read ", where_, ": the ", record.bytes, " bytes of the record ",
                            shown(record.name), " have the CRC ", hex(crc), ", but the file says ",
                            hex(record.crc),
                            ". It was damaged after it was written; take another copy, or an "
                            "earlier checkpoint."));
}

void ZipReader::compare(const Record& record, uint32_t crc) const {
  if (has_crcs_ && crc != record.crc) refuse_crc(record, crc);
}

void ZipReader::verify(const Record& record) const {
  if (!has_crcs_) return;
  compare(record, crc32(file_->data() + record.offset, record.bytes));
  file_->check();
}

void ZipReader::verify_all(size_t part, size_t parts) const {
  if (!has_crcs_) return;
  std::vector<ZipRecord> records;
  for (size_t i = 0; i < records_.size(); ++i) {
    if (i % parts == part || records_[i].name == "data.pkl")
      records.push_back({this, &records_[i]});
  }
  const auto crcs = crcs_of(records);
  for (size_t i = 0; i < records.size(); ++i) compare(*records[i].record, crcs[i]);
  file_->check();
}

std::vector<uint32_t> crcs_of(const std::vector<ZipRecord>& records) {
  struct Piece {
    size_t record;
    const uint8_t* data;
    uint64_t bytes;
    uint32_t crc;
  };
  std::vector<Piece> pieces;
  uint64_t bytes = 0;
  for (size_t i = 0; i < records.size(); ++i) {
    const auto& [zip, record] = records[i];
    const auto* const data = zip->file()->data() + record->offset;
    for (uint64_t at = 0; at < record->bytes; at += kPieceBytes) {
      pieces.push_back({i, data + at, std::min(kPieceBytes, record->bytes - at), 0});
    }
    bytes += record->bytes;
  }
  std::atomic<size_t> next{0};
  on_threads(useful_threads(bytes, kMostReaders), [&] {
    for (size_t i = next++; i < pieces.size(); i = next++) {
      pieces[i].crc = crc32(pieces[i].data, pieces[i].bytes);
    }
  });
  std::vector<uint32_t> crcs(records.size());
  for (const auto& piece : pieces) {
    crcs[piece.record] = crc32_combine(crcs[piece.record], piece.crc, piece.bytes);
  }
  return crcs;
}

}  // namespace lightning
