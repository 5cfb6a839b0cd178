#include "lightning/checkpoint/atomic_file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <utility>

#include "lightning/errors.h"
#include "lightning/files.h"

namespace lightning {
namespace {

// Two saves at once, also of one path, do not write into one another.
std::string unfinished_name(const std::string& path) {
  static std::atomic<uint64_t> count{0};
  return str(path, ".", ::getpid(), ".", count++, ".tmp");
}

std::string folder_of(const std::string& path) {
  const auto slash = path.rfind('/');
  if (slash == std::string::npos) return ".";
  return slash == 0 ? "/" : path.substr(0, slash);
}

}  // namespace

AtomicFile::AtomicFile(std::string path, uint64_t bytes)
    : path_(std::move(path)),
      folder_(folder_of(path_)),
      unfinished_(unfinished_name(path_)),
      bytes_(bytes) {
  struct stat found {};
  if (::stat(path_.c_str(), &found) == 0 && S_ISDIR(found.st_mode)) fail("write", EISDIR);
  try {
    make_directories(folder_);
  } catch (const std::runtime_error& error) {
    throw CheckpointError(
        str("Cannot write the checkpoint ", path_, " (", bytes_, " bytes): ", error.what()));
  }
  // Left by a process that was killed and had the same number, as in a container that started
  // again.
  ::unlink(unfinished_.c_str());
  fd_ = ::open(unfinished_.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
  if (fd_ < 0) fail("write", errno);
  if (bytes_ > 0 && ::fallocate(fd_, 0, 0, static_cast<off_t>(bytes_)) != 0) {
    // Not every file system can reserve; a write finds out the rest.
    const int reason = errno;
    if (reason == ENOSPC || reason == EDQUOT || reason == EFBIG) {
      ::close(fd_);
      ::unlink(unfinished_.c_str());
      fail("write", reason);
    }
  }
}

AtomicFile::~AtomicFile() {
  if (fd_ < 0) return;
  ::close(fd_);
  ::unlink(unfinished_.c_str());
}

void AtomicFile::write(const void* data, size_t bytes) {
  const auto* next = static_cast<const char*>(data);
  while (bytes > 0) {
    const ssize_t written = ::write(fd_, next, std::min<size_t>(bytes, size_t{1} << 30));
    if (written < 0) {
      if (errno == EINTR) continue;
      fail("write", errno);
    }
    next += written;
    bytes -= static_cast<size_t>(written);
  }
}

void AtomicFile::commit() {
  if (::fsync(fd_) != 0) fail("write", errno);
  if (::close(std::exchange(fd_, -1)) != 0 || ::rename(unfinished_.c_str(), path_.c_str()) != 0) {
    const int reason = errno;
    ::unlink(unfinished_.c_str());
    fail("write", reason);
  }
  // The rename is safe from a power cut once the folder is on the disk. A file system that cannot
  // sync folders has done what it can.
  const int folder = ::open(folder_.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (folder < 0) return;
  const int rc = ::fsync(folder);
  const int reason = errno;
  ::close(folder);
  if (rc != 0 && reason != EINVAL && reason != ENOTSUP) fail("sync the folder of", reason);
}

void AtomicFile::fail(const char* what, int reason) const {
  std::string advice;
  if (reason == ENOSPC || reason == EDQUOT) {
    struct statvfs disk {};
    if (::statvfs(folder_.c_str(), &disk) == 0) {
      advice = str(" ", static_cast<uint64_t>(disk.f_bavail) * disk.f_frsize, " are free.");
    }
    advice += " Free some space, or write elsewhere.";
  } else if (reason == EACCES || reason == EPERM || reason == EROFS || reason == ENOTDIR) {
    advice = " Give a folder that this user may write to.";
  } else if (reason == EISDIR) {
    advice = " Remove the folder, or give another name.";
  }
  throw CheckpointError(str("Cannot ", what, " the checkpoint ", path_, ", which needs ", bytes_,
                            " bytes: ", std::strerror(reason), ".", advice));
}

}  // namespace lightning
