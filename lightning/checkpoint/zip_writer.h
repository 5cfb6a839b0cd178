// Writes zip files byte for byte as torch.save does: stored records, each aligned to 64 bytes, CRCs
// in descriptors behind the data, a zip64 end. All places are known before the first byte is
// written, so several threads write pieces of the records and add up their CRCs. Needs no LibTorch.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "lightning/checkpoint/atomic_file.h"

namespace lightning {

struct ZipSource {
  std::string name;  // below the top folder: "data/0"
  uint64_t bytes = 0;
  // The bytes from `offset` on: a place in memory, or `buffer` filled with them (from a GPU).
  // Called from several threads, each with its own buffer of at least `bytes`.
  std::function<const void*(uint64_t offset, uint64_t bytes, void* buffer)> read;

  static ZipSource of_text(std::string name, std::string text);
  static ZipSource of_memory(std::string name, const void* data, uint64_t bytes);
};

// Where each record will be, and how long the zip gets.
class ZipWriter {
 public:
  //   folder    the top folder, "archive" in a checkpoint
  // Errors: CheckpointError for two records of one name.
  ZipWriter(std::string folder, std::vector<ZipSource> records);

  uint64_t bytes() const { return bytes_; }

  // Writes the zip at `offset` of the file, a multiple of 64.
  //
  //   threads   0: as many as help, at most four
  // Errors: CheckpointError of the file; what a source throws.
  void write(AtomicFile& file, uint64_t offset = 0, int threads = 0) const;

 private:
  friend class ZipBatch;
  struct Place {
    uint64_t header = 0;
    uint64_t data = 0;
    uint64_t end = 0;  // behind the descriptor
  };
  // What a thread takes at once: a piece of a long record, or short ones that lie side by side.
  // Pieces end at multiples of their size in a file where the zip lies at `offset`.
  struct Job {
    size_t first = 0;  // record
    size_t last = 0;   // the one behind
    uint64_t offset = 0;
    uint64_t bytes = 0;
  };
  std::vector<Job> jobs(uint64_t offset) const;
  void place_records();
  std::string header(size_t i) const;
  std::string descriptor(size_t i, uint32_t crc) const;
  std::string directory(const std::vector<uint32_t>& crcs) const;
  // Fills in the CRCs of its records.
  void write_short(AtomicFile& file, uint64_t offset, const Job& job, char* buffer,
                   std::vector<uint32_t>& crcs) const;
  // Gives the CRC of the piece.
  uint32_t write_piece(AtomicFile& file, uint64_t offset, const Job& job, char* buffer) const;

  std::string folder_;
  std::vector<ZipSource> records_;
  std::vector<Place> places_;
  uint64_t directory_ = 0;
  uint64_t bytes_ = 0;
};

// Zips of one file, long and short ones, written by the same threads: one copies from a GPU or
// takes a CRC while another waits for the disk.
class ZipBatch {
 public:
  // Memory at a multiple of AtomicFile::kDirectBytes, for each thread its own.
  using Allocate = std::function<std::shared_ptr<char>(uint64_t bytes)>;

  // The zip must live until write() is done.
  void add(const ZipWriter& zip, uint64_t offset);

  //   threads    0: as many as help, at most four
  //   allocate   where sources fill their buffers; null: ordinary memory
  // Errors: as ZipWriter::write().
  void write(AtomicFile& file, int threads = 0, const Allocate& allocate = nullptr) const;

 private:
  struct Entry {
    const ZipWriter* zip;
    uint64_t offset;
  };
  struct Progress;
  struct Task {
    size_t entry;
    size_t job;
  };
  void finish(AtomicFile& file, const Entry& entry, Progress& progress) const;

  std::vector<Entry> entries_;
};

}  // namespace lightning
