// Reads the zip files that torch.save writes: stored records, none compressed, in one top folder.
// Trusts nothing: whatever the central directory claims is checked against the file before it is
// used. Needs no LibTorch. The bytes are in FORMATS.md.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "lightning/checkpoint/mapped_file.h"

namespace lightning {

// For messages: the file, and which part of it where a zip lies inside.
std::string place_of(const MappedFile& file, uint64_t begin, uint64_t bytes);

class ZipReader {
 public:
  struct Record {
    std::string_view name;  // without the top folder: "data/0"
    uint64_t offset = 0;    // of the data, from the file's start
    uint64_t bytes = 0;
    uint32_t crc = 0;  // 0 where the writer left it out
  };

  // The whole file, or a zip that lies inside it (an item of a .distcp file).
  //
  // Errors: CheckpointError that names the file, what is wrong and the record: no zip, cut short,
  // compressed, encrypted, several top folders, a name twice, records that overlap or leave the
  // zip, a big-endian `byteorder` record.
  explicit ZipReader(std::shared_ptr<MappedFile> file);
  ZipReader(std::shared_ptr<MappedFile> file, uint64_t begin, uint64_t bytes);

  const std::shared_ptr<MappedFile>& file() const { return file_; }
  const std::string& folder() const { return folder_; }
  const std::vector<Record>& records() const { return records_; }  // in the directory's order
  const Record* find(std::string_view name) const;                 // null when missing
  // Errors: CheckpointError when missing.
  const Record& at(std::string_view name) const;
  std::string_view data(const Record& record) const;

  // Compares the CRC of one record, or of all with several threads. A file all of whose CRCs are 0
  // was written without them and passes.
  //
  //   part, parts   of several processes that read the file, each compares the records of its part;
  //                 the pickle is compared by all
  // Errors: CheckpointError with the record's name and both values.
  void verify(const Record& record) const;
  void verify_all(size_t part = 0, size_t parts = 1) const;
  // The same for a record whose CRC is known by now.
  void compare(const Record& record, uint32_t crc) const;
  // Whether there are CRCs to compare.
  bool has_crcs() const { return has_crcs_; }

 private:
  void read_directory(uint64_t begin, uint64_t bytes);
  void check_overlaps();
  void sort_names();
  void check_byteorder() const;
  [[noreturn]] void refuse_crc(const Record& record, uint32_t crc) const;

  std::shared_ptr<MappedFile> file_;
  std::string where_;  // the file, and the place in it, for messages
  std::string folder_;
  std::vector<Record> records_;
  std::vector<size_t> by_name_;                       // places in records_
  std::vector<std::pair<uint64_t, uint64_t>> spans_;  // of the records, while the zip is checked
  bool has_crcs_ = false;
};

// Some records of one zip or of many.
struct ZipRecord {
  const ZipReader* zip;
  const ZipReader::Record* record;
};
// The CRC of each, by several threads, for which it does not matter how long or short they are.
std::vector<uint32_t> crcs_of(const std::vector<ZipRecord>& records);

}  // namespace lightning
