// A file in memory, private to this process: pages are read when they are touched, and what is
// written to them stays here.
//
// A file that another program cuts short while it is mapped makes touching it raise SIGBUS, which
// would end the program. While any file is mapped a handler puts zeros in the place of such a page,
// says so on stderr with the file's name and marks the file as torn; other SIGBUS go to the handler
// that was there before. Whoever has read asks check() before it trusts the values.
// Files of checkpoints are replaced by renaming and so do not change under a reader; only other
// programs cut them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

namespace lightning {

class MappedFile {
 public:
  // Errors: CheckpointError with the path and the system's reason for a file that cannot be opened
  // or is a folder.
  static std::shared_ptr<MappedFile> open(const std::string& path);
  ~MappedFile();
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  const std::string& path() const { return path_; }
  uint8_t* data() const { return data_; }
  uint64_t size() const { return size_; }

  // Errors: CheckpointError when a page was not there to read.
  void check() const;

 private:
  MappedFile() = default;

  std::string path_;
  uint8_t* data_ = nullptr;
  uint64_t size_ = 0;
  int slot_ = -1;  // in the handler's table
};

// check() of every file that is mapped, for values that were copied since.
void check_mapped_files();
// How many of them are torn.
int torn_mapped_files();

}  // namespace lightning
