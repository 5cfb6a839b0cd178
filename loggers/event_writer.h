// Writes TensorBoard's event files: protobuf events in TFRecord frames (length and data, each with
// a masked CRC-32C).
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <mutex>
#include <string>
#include <thread>

namespace lightning {

// One file, `events.out.tfevents.<time>.<host>.<pid>.<n><suffix>`, created with its first event by
// the constructor. The functions that add only append to a buffer. A thread writes it out when
// `max_queue` events wait and every `flush_secs`; flush(), close() and the destructor write on
// the calling thread.
//
// Functions may be called from any thread.
// Errors: std::runtime_error with path and reason. When the background write failed, the next call
// throws; no event is lost: what was not written is tried again by each later write.
class EventWriter {
 public:
  // Creates the folder.
  EventWriter(const std::string& folder, int64_t max_queue, double flush_secs,
              const std::string& filename_suffix);
  ~EventWriter();
  EventWriter(const EventWriter&) = delete;
  EventWriter& operator=(const EventWriter&) = delete;

  const std::string& folder() const { return folder_; }
  const std::string& path() const { return path_; }

  //   summary     an encoded tensorboard.Summary
  //   wall_time   seconds since 1970
  void add_summary(const std::string& summary, int64_t step, double wall_time);
  // The summary of one number, without building it first.
  void add_scalar(const std::string& tag, float value, int64_t step, double wall_time);
  // An encoded tensorboard.GraphDef.
  void add_graph(const std::string& graph, double wall_time);

  void flush();
  // Ends the thread and writes the rest; nothing may be added after it.
  void close();

 private:
  // Appends one record to the buffer: `fill` appends the event to a string.
  template <class Fill>
  void add(const Fill& fill);
  void write_out();
  void run();

  std::string folder_;
  std::string path_;
  size_t max_queue_;
  double flush_secs_;
  int fd_ = -1;

  std::mutex file_mutex_;  // writes to the file, in order; taken before mutex_
  std::string writing_;    // what is being written

  std::mutex mutex_;
  std::condition_variable wake_;
  std::string pending_;
  size_t pending_events_ = 0;
  std::exception_ptr error_;  // of the background write
  bool stop_ = false;
  std::thread thread_;
};

double wall_time();

// CRC-32C (Castagnoli), masked as TFRecord wants it.
uint32_t masked_crc32c(const char* data, size_t size);

}  // namespace lightning
