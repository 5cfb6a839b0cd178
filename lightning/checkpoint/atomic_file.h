// A file that is there whole or not at all.
//
// It is written beside its place under another name; commit() brings it to the disk and renames it,
// so that a crash, a full disk or an exception leaves what was there before. A file that was not
// committed takes its unfinished content with it.
//
// Errors of all members: CheckpointError with the path, the system's reason, and for a full disk
// the bytes that are needed and those that are free.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace lightning {

class AtomicFile {
 public:
  // Makes the folders above `path`, and reserves the bytes where the file system can, so that a
  // disk without room for them is found before anything is written.
  //
  //   bytes   what will be written in all
  AtomicFile(std::string path, uint64_t bytes);
  ~AtomicFile();
  AtomicFile(const AtomicFile&) = delete;
  AtomicFile& operator=(const AtomicFile&) = delete;

  void write(const void* data, size_t bytes);
  void commit();

 private:
  [[noreturn]] void fail(const char* what, int reason) const;

  std::string path_;
  std::string folder_;
  std::string unfinished_;
  uint64_t bytes_;
  int fd_ = -1;
};

}  // namespace lightning
