#include "lightning/checkpoint/zip_writer.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <new>
#include <string_view>
#include <unordered_set>
#include <utility>

#include "lightning/checkpoint/crc32.h"
#include "lightning/checkpoint/threads.h"
#include "lightning/checkpoint/zip_format.h"
#include "lightning/errors.h"

namespace lightning {
namespace {

using namespace zip_format;

constexpr uint64_t kAlignment = 64;
constexpr uint64_t kPieceBytes = uint64_t{4} << 20;
// Taken for the CRC and copied while it is in the cache.
constexpr uint64_t kStepBytes = uint64_t{256} << 10;
// Shorter records are put together in memory and written at once: a system call costs as much as
// copying some 10 KB.
constexpr uint64_t kShortBytes = uint64_t{256} << 10;

void put16(std::string& out, uint64_t value) {
  out += static_cast<char>(value & 0xff);
  out += static_cast<char>(value >> 8 & 0xff);
}
void put32(std::string& out, uint64_t value) {
  put16(out, value);
  put16(out, value >> 16);
}
void put64(std::string& out, uint64_t value) {
  put32(out, value);
  put32(out, value >> 32);
}

// The zip64 extra: what does not fit into 32 bits, or nothing. Local headers leave the packed size
// to the descriptor.
std::string zip64_extra(uint64_t bytes, uint64_t packed, uint64_t header) {
  std::string numbers;
  if (bytes >= kIn64) {
    put64(numbers, bytes);
    put64(numbers, packed);
  }
  if (header >= kIn64) put64(numbers, header);
  if (numbers.empty()) return numbers;
  std::string extra;
  put16(extra, kZip64Extra);
  put16(extra, numbers.size());
  return extra + numbers;
}

bool is_zero(const void* data, uint64_t bytes) {
  const char* const p = static_cast<const char*>(data);
  return bytes == 0 || (p[0] == 0 && std::memcmp(p, p + 1, bytes - 1) == 0);
}

uint32_t crc32_of_zeros(uint64_t bytes) { return crc32_combine(~0u, ~0u, bytes); }

std::shared_ptr<char> ordinary_memory(uint64_t bytes) {
  constexpr uint64_t kPage = AtomicFile::kDirectBytes;
  std::shared_ptr<char> buffer(
      static_cast<char*>(std::aligned_alloc(kPage, (bytes + kPage - 1) / kPage * kPage)),
      std::free);
  if (buffer == nullptr) throw std::bad_alloc();
  return buffer;
}

// A thread that waits for the disk needs no core, so two help even where there is one.
int writing_threads(uint64_t bytes) {
  return std::max(useful_threads(bytes), bytes < 4 * kPieceBytes ? 1 : 2);
}

uint64_t flags(uint64_t bytes) { return bytes > 0 ? kUtf8 | kHasDescriptor : kUtf8; }

}  // namespace

ZipSource ZipSource::of_text(std::string name, std::string text) {
  const auto kept = std::make_shared<const std::string>(std::move(text));
  return {std::move(name), kept->size(),
          [kept](uint64_t offset, uint64_t, void*) { return kept->data() + offset; }};
}

ZipSource ZipSource::of_memory(std::string name, const void* data, uint64_t bytes) {
  return {std::move(name), bytes, [data](uint64_t offset, uint64_t, void*) {
            return static_cast<const char*>(data) + offset;
          }};
}

ZipWriter::ZipWriter(std::string folder, std::vector<ZipSource> records)
    : folder_(std::move(folder)), records_(std::move(records)) {
  if (folder_.empty() || folder_.find('/') != std::string::npos) {
    throw CheckpointError(str("Cannot write a zip file with the top folder \"", folder_,
                              "\": expected a name without a slash, such as \"archive\"."));
  }
  std::unordered_set<std::string_view> names;
  for (const auto& record : records_) {
    if (!names.insert(record.name).second) {
      throw CheckpointError(str("Cannot write a zip file with two records named \"", record.name,
                                "\". Give each a name of its own."));
    }
    if (record.name.empty() || folder_.size() + 1 + record.name.size() > 0xffff) {
      throw CheckpointError(str("Cannot write a zip record with a name of ", record.name.size(),
                                " bytes: expected 1 to ", 0xffff - 1 - folder_.size(), "."));
    }
  }
  place_records();
}

void ZipWriter::place_records() {
  places_.resize(records_.size());
  uint64_t at = 0;
  uint64_t directory_bytes = 0;
  for (size_t i = 0; i < records_.size(); ++i) {
    const uint64_t bytes = records_[i].bytes;
    places_[i].header = at;
    const uint64_t name = folder_.size() + 1 + records_[i].name.size();
    const uint64_t wide = zip64_extra(bytes, bytes, at).size();
    // Behind the name and zip64 comes an extra "FB" of 4 bytes or more that fills up to a multiple.
    at += kLocalHeaderBytes + name + wide + 4;
    at += (kAlignment - at % kAlignment) % kAlignment;
    places_[i].data = at;
    at += bytes;
    if (bytes > 0) at += bytes >= kIn64 || places_[i].header >= kIn64 ? 24 : 16;
    places_[i].end = at;
    directory_bytes += kEntryBytes + name + wide;
  }
  directory_ = at;
  bytes_ = at + directory_bytes + kEnd64Bytes + kLocator64Bytes + kEndBytes;
}

std::string ZipWriter::header(size_t i) const {
  const auto& record = records_[i];
  const auto& place = places_[i];
  const std::string wide = zip64_extra(record.bytes, 0, place.header);
  const uint64_t name_bytes = folder_.size() + 1 + record.name.size();
  const uint64_t extra_bytes = place.data - place.header - kLocalHeaderBytes - name_bytes;
  std::string out;
  out.reserve(place.data - place.header);
  put32(out, kLocalHeader);
  put16(out, 0);  // no version
  put16(out, flags(record.bytes));
  put16(out, 0);         // stored
  put32(out, 0);         // no date
  out.append(12, '\0');  // CRC and sizes: in the descriptor
  put16(out, name_bytes);
  put16(out, extra_bytes);
  out += folder_;
  out += '/';
  out += record.name;
  out += wide;
  out += "FB";
  put16(out, extra_bytes - wide.size() - 4);
  out.append(extra_bytes - wide.size() - 4, 'Z');
  return out;
}

std::string ZipWriter::descriptor(size_t i, uint32_t crc) const {
  const uint64_t bytes = records_[i].bytes;
  std::string out;
  if (bytes == 0) return out;
  put32(out, kDescriptor);
  put32(out, crc);
  const bool wide = bytes >= kIn64 || places_[i].header >= kIn64;
  for (int packed_and_not = 0; packed_and_not < 2; ++packed_and_not) {
    wide ? put64(out, bytes) : put32(out, bytes);
  }
  return out;
}

std::string ZipWriter::directory(const std::vector<uint32_t>& crcs) const {
  std::string out;
  out.reserve(bytes_ - directory_);
  for (size_t i = 0; i < records_.size(); ++i) {
    const auto& record = records_[i];
    const std::string wide = zip64_extra(record.bytes, record.bytes, places_[i].header);
    put32(out, kEntry);
    put32(out, 0);  // no versions
    put16(out, flags(record.bytes));
    put16(out, 0);  // stored
    put32(out, 0);  // no date
    put32(out, crcs[i]);
    put32(out, std::min<uint64_t>(record.bytes, kIn64));
    put32(out, std::min<uint64_t>(record.bytes, kIn64));
    put16(out, folder_.size() + 1 + record.name.size());
    put16(out, wide.size());
    out.append(10, '\0');  // no comment, first disk, no attributes
    put32(out, std::min<uint64_t>(places_[i].header, kIn64));
    out += folder_;
    out += '/';
    out += record.name;
    out += wide;
  }
  const uint64_t directory_bytes = out.size();
  const uint64_t entries = records_.size();
  put32(out, kEnd64);
  put64(out, kEnd64Bytes - 12);
  put16(out, 0x031e);   // made by version 3.0 on Unix
  put16(out, 0x002d);   // version 4.5 reads it
  out.append(8, '\0');  // first disk of one
  put64(out, entries);
  put64(out, entries);
  put64(out, directory_bytes);
  put64(out, directory_);
  put32(out, kLocator64);
  put32(out, 0);
  put64(out, directory_ + directory_bytes);
  put32(out, 1);
  put32(out, kEnd);
  put32(out, 0);
  put16(out, std::min<uint64_t>(entries, kIn64Short));
  put16(out, std::min<uint64_t>(entries, kIn64Short));
  put32(out, std::min<uint64_t>(directory_bytes, kIn64));
  put32(out, std::min<uint64_t>(directory_, kIn64));
  put16(out, 0);
  return out;
}

std::vector<ZipWriter::Job> ZipWriter::jobs(uint64_t offset) const {
  std::vector<Job> jobs;
  for (size_t i = 0; i < records_.size();) {
    const uint64_t bytes = records_[i].bytes;
    if (bytes < kShortBytes) {
      size_t last = i + 1;
      while (last < records_.size() && records_[last].bytes < kShortBytes &&
             places_[last].end - places_[i].header <= kPieceBytes) {
        ++last;
      }
      jobs.push_back({i, last, 0, places_[last - 1].end - places_[i].header});
      i = last;
      continue;
    }
    // So two threads share no page of the file.
    for (uint64_t at = 0; at < bytes;) {
      const uint64_t left_of_piece = kPieceBytes - (offset + places_[i].data + at) % kPieceBytes;
      const uint64_t piece = std::min(left_of_piece, bytes - at);
      jobs.push_back({i, i + 1, at, piece});
      at += piece;
    }
    ++i;
  }
  return jobs;
}

void ZipWriter::write_short(AtomicFile& file, uint64_t offset, const Job& job, char* buffer,
                            std::vector<uint32_t>& crcs) const {
  const uint64_t begin = places_[job.first].header;
  const auto put = [&](uint64_t at, const std::string& text) {
    std::memcpy(buffer + (at - begin), text.data(), text.size());
  };
  for (size_t i = job.first; i < job.last; ++i) {
    const auto& record = records_[i];
    put(places_[i].header, header(i));
    if (record.bytes == 0) continue;
    char* const to = buffer + (places_[i].data - begin);
    const void* const from = record.read(0, record.bytes, to);
    if (from != to) std::memcpy(to, from, record.bytes);
    crcs[i] = crc32(to, record.bytes);
    put(places_[i].data + record.bytes, descriptor(i, crcs[i]));
  }
  file.write_at(offset + begin, buffer, job.bytes);
}

uint32_t ZipWriter::write_piece(AtomicFile& file, uint64_t offset, const Job& job,
                                char* buffer) const {
  if (job.offset == 0) {
    const std::string text = header(job.first);
    file.write_at(offset + places_[job.first].header, text.data(), text.size());
  }
  // The buffer begins at a multiple of kAround; what lies at one in the file shall do so in memory.
  constexpr uint64_t kAround = AtomicFile::kDirectBytes;
  const uint64_t begin = offset + places_[job.first].data + job.offset;
  char* const to = buffer + begin % kAround;
  const auto* const from =
      static_cast<const char*>(records_[job.first].read(job.offset, job.bytes, to));
  // A new file has zeros where nothing was written, and none of them on the disk.
  if (is_zero(from, job.bytes)) return crc32_of_zeros(job.bytes);
  if (!file.is_direct()) {
    file.write_at(begin, from, job.bytes);
    return crc32(from, job.bytes);
  }
  uint32_t crc = 0;
  for (uint64_t at = 0; at < job.bytes; at += kStepBytes) {
    const uint64_t bytes = std::min(kStepBytes, job.bytes - at);
    crc = crc32(from + at, bytes, crc);
    if (from != to) std::memcpy(to + at, from + at, bytes);
  }
  // The whole pages, and what stands in the first and the last with other records.
  const uint64_t head = std::min(job.bytes, (kAround - begin % kAround) % kAround);
  const uint64_t whole = (job.bytes - head) / kAround * kAround;
  file.write_at(begin, to, head);
  file.write_at(begin + head, to + head, whole);
  file.write_at(begin + head + whole, to + head + whole, job.bytes - head - whole);
  return crc;
}

void ZipWriter::write(AtomicFile& file, uint64_t offset, int threads) const {
  ZipBatch one;
  one.add(*this, offset);
  one.write(file, threads);
}

// ---- Several ------------------------------------------------------------------------------------

// Of one zip.
struct ZipBatch::Progress {
  Progress(const Entry& entry)
      : jobs(entry.zip->jobs(entry.offset)),
        crcs(entry.zip->records_.size()),
        piece_crcs(jobs.size()),
        left(jobs.size()) {}

  const std::vector<ZipWriter::Job> jobs;
  std::vector<uint32_t> crcs;        // of the records
  std::vector<uint32_t> piece_crcs;  // of long ones' pieces
  std::atomic<size_t> left;
};

void ZipBatch::add(const ZipWriter& zip, uint64_t offset) { entries_.push_back({&zip, offset}); }

void ZipBatch::write(AtomicFile& file, int threads, const Allocate& allocate) const {
  std::deque<Progress> progress;
  std::vector<Task> tasks;
  uint64_t bytes = 0, most = 1;
  for (size_t i = 0; i < entries_.size(); ++i) {
    const auto& jobs = progress.emplace_back(entries_[i]).jobs;
    if (jobs.empty()) finish(file, entries_[i], progress.back());
    for (size_t job = 0; job < jobs.size(); ++job) {
      tasks.push_back({i, job});
      most = std::max(most, jobs[job].bytes);
    }
    bytes += entries_[i].zip->bytes();
  }
  std::atomic<size_t> next{0};
  std::atomic<bool> failed{false};
  on_threads(threads > 0 ? threads : writing_threads(bytes), [&] {
    try {
      const auto buffer = (allocate ? allocate : ordinary_memory)(most + AtomicFile::kDirectBytes);
      for (size_t i = next++; i < tasks.size() && !failed; i = next++) {
        const auto& entry = entries_[tasks[i].entry];
        auto& own = progress[tasks[i].entry];
        const auto& job = own.jobs[tasks[i].job];
        if (entry.zip->records_[job.first].bytes < kShortBytes) {
          entry.zip->write_short(file, entry.offset, job, buffer.get(), own.crcs);
        } else {
          own.piece_crcs[tasks[i].job] =
              entry.zip->write_piece(file, entry.offset, job, buffer.get());
        }
        if (--own.left == 0) finish(file, entry, own);
      }
    } catch (...) {
      failed = true;
      throw;
    }
  });
}

// Once all bytes are there: the CRCs.
void ZipBatch::finish(AtomicFile& file, const Entry& entry, Progress& progress) const {
  const auto& [zip, offset] = entry;
  auto& crcs = progress.crcs;
  for (size_t i = 0; i < progress.jobs.size(); ++i) {
    const auto& job = progress.jobs[i];
    const uint64_t bytes = zip->records_[job.first].bytes;
    if (bytes < kShortBytes) continue;
    crcs[job.first] = crc32_combine(crcs[job.first], progress.piece_crcs[i], job.bytes);
    if (job.offset + job.bytes < bytes) continue;
    const std::string text = zip->descriptor(job.first, crcs[job.first]);
    file.write_at(offset + zip->places_[job.first].data + bytes, text.data(), text.size());
  }
  const std::string text = zip->directory(crcs);
  file.write_at(offset + zip->directory_, text.data(), text.size());
}

}  // namespace lightning
