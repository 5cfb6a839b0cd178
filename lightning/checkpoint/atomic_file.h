// A file that is there whole or not at all.
//
// It is written beside its place under another name; commit() brings it to the disk and renames it,
// so that a crash, a full disk or an exception leaves what was there before. A file that was not
// committed takes its unfinished content with it.
//
// Errors of all members: CheckpointError with the path, the system's reason, and for a full disk
// the bytes that are needed and those that are free.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <string>

namespace lightning {

class AtomicFile {
 public:
  // What a large file leaves in the page cache. Around it goes what nobody reads again soon:
  // commit() has to wait for the disk, so the copy would only cost time and memory. Through it goes
  // what this machine may read next, at the speed of memory and not of the disk; each piece is sent
  // on to the disk at once, which takes no longer where a core is free for the copy.
  enum class Cache { kAround, kThrough };

  // Makes the folders above `path`, and reserves the bytes where the file system can, so that a
  // disk without room for them is found before anything is written.
  //
  //   bytes   what will be written in all; what is left out in between is zeros
  AtomicFile(std::string path, uint64_t bytes, Cache cache = Cache::kAround);
  ~AtomicFile();
  AtomicFile(const AtomicFile&) = delete;
  AtomicFile& operator=(const AtomicFile&) = delete;

  // Behind what write() wrote before.
  void write(const void* data, size_t bytes);
  // Anywhere below `bytes`; from several threads at once. Where offset, length and address are
  // multiples of kDirectBytes, large files go around the page cache, if they can and shall.
  static constexpr uint64_t kDirectBytes = 4096;
  bool is_direct() const { return direct_; }
  void write_at(uint64_t offset, const void* data, size_t bytes);
  void commit();

  // Deletes what killed processes left in a folder: files named as AtomicFile names unfinished ones
  // which nobody holds. While a file is written its process holds a lock on it (flock), which ends
  // with the process; file systems without such locks keep their leftovers. A folder that is not
  // there has none. Gives the number of files.
  static int64_t remove_unfinished(const std::string& folder);

 private:
  // Whether the file is there now; false: the name is taken.
  bool create();
  void open_direct();
  // What was written, 0 where it has to go through the page cache.
  size_t write_direct(uint64_t offset, const void* data, size_t bytes);
  [[noreturn]] void fail(const char* what, int reason) const;

  std::string path_;
  std::string folder_;
  std::string unfinished_;
  uint64_t bytes_;
  Cache cache_;
  int fd_ = -1;
  int direct_fd_ = -1;
  std::atomic<bool> direct_{false};  // whether the disk takes it
};

// The folder in which a path lies: "." for a bare name.
std::string folder_of(const std::string& path);

// Brings the names in a folder to the disk, so that they survive a power cut. Gives errno, 0 where
// that was done or where the file system cannot.
int sync_folder(const std::string& folder);

}  // namespace lightning
