#include "loggers/event_writer.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <chrono>
#include <climits>
#include <cstdio>
#include <cstring>
#include <stdexcept>
#include <utility>

#include "lightning/errors.h"
#include "lightning/files.h"
#include "lightning/log.h"
#include "loggers/protobuf.h"

namespace lightning {
namespace {

// Fields of tensorboard.Event.
constexpr uint32_t kWallTime = 1, kStep = 2, kFileVersion = 3, kGraphDef = 4, kSummary = 5,
                   kSourceMetadata = 10;

using CrcTables = std::array<std::array<uint32_t, 256>, 8>;

// tables[k][b] carries byte b past k further bytes, so that eight bytes are taken at a time.
CrcTables make_crc_tables() {
  constexpr uint32_t kPolynomial = 0x82F63B78;  // Castagnoli, bits reversed
  CrcTables tables{};
  for (uint32_t byte = 0; byte < 256; ++byte) {
    uint32_t crc = byte;
    for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ ((crc & 1) != 0 ? kPolynomial : 0);
    tables[0][byte] = crc;
  }
  for (size_t k = 1; k < tables.size(); ++k) {
    for (size_t byte = 0; byte < 256; ++byte) {
      const uint32_t before = tables[k - 1][byte];
      tables[k][byte] = (before >> 8) ^ tables[0][before & 0xFF];
    }
  }
  return tables;
}

std::string host_name() {
  char name[HOST_NAME_MAX + 1] = "localhost";
  gethostname(name, sizeof(name) - 1);
  return name;
}

std::string new_path(const std::string& folder, const std::string& suffix) {
  static std::atomic<int> count{0};
  char time[24];
  std::snprintf(time, sizeof(time), "%010lld", static_cast<long long>(wall_time()));
  return str(folder, "/events.out.tfevents.", time, ".", host_name(), ".", ::getpid(), ".",
             count.fetch_add(1), suffix);
}

}  // namespace

double wall_time() {
  const auto now = std::chrono::system_clock::now().time_since_epoch();
  return std::chrono::duration<double>(now).count();
}

uint32_t masked_crc32c(const char* data, size_t size) {
  static const CrcTables tables = make_crc_tables();
  uint32_t crc = ~0U;
  for (; size >= 8; data += 8, size -= 8) {
    uint32_t low = 0;
    uint32_t high = 0;
    std::memcpy(&low, data, 4);
    std::memcpy(&high, data + 4, 4);
    low ^= crc;
    crc = tables[7][low & 0xFF] ^ tables[6][(low >> 8) & 0xFF] ^ tables[5][(low >> 16) & 0xFF] ^
          tables[4][low >> 24] ^ tables[3][high & 0xFF] ^ tables[2][(high >> 8) & 0xFF] ^
          tables[1][(high >> 16) & 0xFF] ^ tables[0][high >> 24];
  }
  for (; size > 0; ++data, --size) {
    crc = (crc >> 8) ^ tables[0][(crc ^ static_cast<unsigned char>(*data)) & 0xFF];
  }
  crc = ~crc;
  return ((crc >> 15) | (crc << 17)) + 0xA282EAD8;
}

EventWriter::EventWriter(const std::string& folder, int64_t max_queue, double flush_secs,
                         const std::string& filename_suffix)
    : folder_(folder),
      max_queue_(static_cast<size_t>(std::max<int64_t>(1, max_queue))),
      flush_secs_(flush_secs) {
  make_directories(folder);
  path_ = new_path(folder, filename_suffix);
  fd_ = ::open(path_.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
  if (fd_ < 0) {
    throw std::runtime_error(str("Cannot create ", path_, ": ", std::strerror(errno), "."));
  }
  try {
    add([](std::string& event) {
      std::string writer;
      protobuf::text(writer, 1, "lightning.loggers.event_writer");
      protobuf::number(event, kWallTime, wall_time());
      protobuf::text(event, kFileVersion, "brain.Event:2");
      protobuf::bytes(event, kSourceMetadata, writer);
    });
    write_out();
    thread_ = std::thread([this] { run(); });
  } catch (...) {
    ::close(fd_);
    throw;
  }
}

EventWriter::~EventWriter() {
  try {
    close();
  } catch (const std::exception& error) {
    warn(str("TensorBoard's events since the last flush are lost: ", error.what()));
  }
  if (fd_ >= 0) ::close(fd_);
}

template <class Fill>
void EventWriter::add(const Fill& fill) {
  constexpr size_t kHeader = sizeof(uint64_t) + sizeof(uint32_t);
  std::unique_lock<std::mutex> lock(mutex_);
  if (fd_ < 0) throw std::logic_error(path_ + " is closed");
  const size_t begin = pending_.size();
  pending_.append(kHeader, '\0');
  fill(pending_);
  const uint64_t size = pending_.size() - begin - kHeader;
  std::memcpy(&pending_[begin], &size, sizeof(size));
  const uint32_t size_crc = masked_crc32c(&pending_[begin], sizeof(size));
  std::memcpy(&pending_[begin + sizeof(size)], &size_crc, sizeof(size_crc));
  protobuf::little_endian(pending_, masked_crc32c(&pending_[begin + kHeader], size));
  const bool full = ++pending_events_ == max_queue_;
  if (error_ != nullptr) std::rethrow_exception(std::exchange(error_, nullptr));
  lock.unlock();
  if (full) wake_.notify_one();
}

void EventWriter::add_summary(const std::string& summary, int64_t step, double wall_time) {
  add([&](std::string& event) {
    protobuf::number(event, kWallTime, wall_time);
    protobuf::integer(event, kStep, step);
    protobuf::bytes(event, kSummary, summary);
  });
}

void EventWriter::add_scalar(const std::string& tag, float value, int64_t step, double wall_time) {
  const auto varint_size = [](uint64_t size) {
    size_t bytes = 1;
    for (; size >= 0x80; size >>= 7) ++bytes;
    return bytes;
  };
  const uint64_t value_size = 1 + varint_size(tag.size()) + tag.size() + 5;
  add([&](std::string& event) {
    protobuf::number(event, kWallTime, wall_time);
    protobuf::integer(event, kStep, step);
    protobuf::key(event, kSummary, protobuf::kBytes);
    protobuf::varint(event, 1 + varint_size(value_size) + value_size);
    protobuf::key(event, 1, protobuf::kBytes);  // Summary.value
    protobuf::varint(event, value_size);
    protobuf::bytes(event, 1, tag);           // Value.tag
    protobuf::float_always(event, 2, value);  // Value.simple_value
  });
}

void EventWriter::add_graph(const std::string& graph, double wall_time) {
  add([&](std::string& event) {
    protobuf::number(event, kWallTime, wall_time);
    protobuf::bytes(event, kGraphDef, graph);
  });
}

void EventWriter::write_out() {
  const std::lock_guard<std::mutex> file_lock(file_mutex_);
  size_t events = 0;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (pending_.empty()) return;
    writing_.swap(pending_);
    events = std::exchange(pending_events_, 0);
  }
  try {
    append_all(fd_, writing_, path_);
  } catch (...) {
    const std::lock_guard<std::mutex> lock(mutex_);
    pending_.insert(0, writing_);
    pending_events_ += events;
    writing_.clear();
    throw;
  }
  writing_.clear();
}

void EventWriter::flush() {
  write_out();
  const std::lock_guard<std::mutex> lock(mutex_);
  error_ = nullptr;  // what the background could not write is written now
}

void EventWriter::close() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    stop_ = true;
  }
  wake_.notify_one();
  if (thread_.joinable()) thread_.join();
  if (fd_ < 0) return;
  flush();
  const std::scoped_lock lock(file_mutex_, mutex_);
  if (::close(std::exchange(fd_, -1)) != 0) {
    throw std::runtime_error(str("Cannot write to ", path_, ": ", std::strerror(errno), "."));
  }
}

void EventWriter::run() {
  std::unique_lock<std::mutex> lock(mutex_);
  while (!stop_) {
    wake_.wait_for(lock, std::chrono::duration<double>(flush_secs_), [this] {
      // After an error only time brings another try.
      return stop_ || (pending_events_ >= max_queue_ && error_ == nullptr);
    });
    if (stop_) return;
    lock.unlock();
    std::exception_ptr error;
    try {
      write_out();
    } catch (...) {
      error = std::current_exception();
    }
    lock.lock();
    error_ = error;
  }
}

}  // namespace lightning
