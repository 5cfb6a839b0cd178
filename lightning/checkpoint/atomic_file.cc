#include "lightning/checkpoint/atomic_file.h"

#include <dirent.h>
#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <csignal>
#include <cstring>
#include <stdexcept>
#include <string_view>
#include <utility>
#include <vector>

#include "lightning/errors.h"
#include "lightning/files.h"

namespace lightning {
namespace {

// Shorter parts wait for commit().
constexpr size_t kLeastSentOn = size_t{1} << 20;

// Two saves at once, also of one path, do not write into one another.
std::string unfinished_name(const std::string& path) {
  static std::atomic<uint64_t> count{0};
  return str(path, ".", ::getpid(), ".", count++, ".tmp");
}

bool is_unfinished_name(std::string_view name) {
  constexpr std::string_view kEnd = ".tmp";
  if (name.size() < kEnd.size() || name.substr(name.size() - kEnd.size()) != kEnd) return false;
  name.remove_suffix(kEnd.size());
  for (int numbers = 0; numbers < 2; ++numbers) {
    const auto dot = name.rfind('.');
    if (dot == std::string_view::npos || dot + 1 == name.size()) return false;
    const auto digits = name.substr(dot + 1);
    if (digits.find_first_not_of("0123456789") != std::string_view::npos) return false;
    name = name.substr(0, dot);
  }
  return !name.empty();
}

enum class Lock { kHeld, kTaken, kUnknown };
Lock lock(int fd) {
  int rc = 0;
  do {
    rc = ::flock(fd, LOCK_EX | LOCK_NB);
  } while (rc != 0 && errno == EINTR);
  if (rc == 0) return Lock::kTaken;
  return errno == EWOULDBLOCK ? Lock::kHeld : Lock::kUnknown;
}

// Whether the file was there, and nobody was writing it.
bool remove_if_left(const std::string& path) {
  // To write: where locks go over the network (NFS), this one takes the right to.
  const int fd = ::open(path.c_str(), O_WRONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK);
  if (fd < 0) return false;
  struct stat held {};
  struct stat named {};
  bool removed = false;
  if (::fstat(fd, &held) == 0 && S_ISREG(held.st_mode) && lock(fd) == Lock::kTaken) {
    // Its writer may have finished, and given it its own name, just before the lock was free.
    removed = ::lstat(path.c_str(), &named) == 0 && named.st_ino == held.st_ino &&
              named.st_dev == held.st_dev && ::unlink(path.c_str()) == 0;
  }
  ::close(fd);
  return removed;
}

// Beyond a limit of the shell (ulimit -f) a write is an error with a message, as on a full disk;
// the signal that comes with it would end the program without a word. Python ignores it too.
void ignore_file_size_signal() {
  struct sigaction now {};
  if (::sigaction(SIGXFSZ, nullptr, &now) == 0 && now.sa_handler == SIG_DFL) {
    ::signal(SIGXFSZ, SIG_IGN);
  }
}

}  // namespace

std::string folder_of(const std::string& path) {
  const auto slash = path.rfind('/');
  if (slash == std::string::npos) return ".";
  return slash == 0 ? "/" : path.substr(0, slash);
}

int sync_folder(const std::string& folder) {
  const int fd = ::open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (fd < 0) return 0;
  const int reason = ::fsync(fd) == 0 ? 0 : errno;
  ::close(fd);
  return reason == EINVAL || reason == ENOTSUP ? 0 : reason;
}

AtomicFile::AtomicFile(std::string path, uint64_t bytes, Cache cache)
    : path_(std::move(path)),
      folder_(folder_of(path_)),
      unfinished_(unfinished_name(path_)),
      bytes_(bytes),
      cache_(cache) {
  ignore_file_size_signal();
  struct stat found {};
  if (::stat(path_.c_str(), &found) == 0 && S_ISDIR(found.st_mode)) fail("write", EISDIR);
  try {
    make_directories(folder_);
  } catch (const std::runtime_error& error) {
    throw CheckpointError(
        str("Cannot write the checkpoint ", path_, " (", bytes_, " bytes): ", error.what()));
  }
  while (!create()) unfinished_ = unfinished_name(path_);
  if (bytes_ > 0 && ::fallocate(fd_, 0, 0, static_cast<off_t>(bytes_)) != 0) {
    // Not every file system can reserve; a write finds out the rest.
    const int reason = errno;
    const bool no_room = reason == ENOSPC || reason == EDQUOT || reason == EFBIG;
    if (no_room || ::ftruncate(fd_, static_cast<off_t>(bytes_)) != 0) {
      const int last_reason = no_room ? reason : errno;
      ::unlink(unfinished_.c_str());
      ::close(fd_);
      fail("write", last_reason);
    }
  } else {
    open_direct();
  }
}

// Only where the bytes are reserved: else the parts that do go through the page cache would first
// have to be read, and a disk that cannot reserve is mostly one that caches on another machine.
void AtomicFile::open_direct() {
  constexpr uint64_t kWorthIt = uint64_t{16} << 20;
  if (bytes_ < kWorthIt || cache_ == Cache::kThrough) return;
  direct_fd_ = ::open(unfinished_.c_str(), O_WRONLY | O_DIRECT | O_CLOEXEC);
  direct_ = direct_fd_ >= 0;
}

size_t AtomicFile::write_direct(uint64_t offset, const void* data, size_t bytes) {
  const uint64_t all = offset | bytes | reinterpret_cast<uintptr_t>(data);
  if (!direct_ || bytes == 0 || all % kDirectBytes != 0) return 0;
  const ssize_t written = ::pwrite(direct_fd_, data, bytes, static_cast<off_t>(offset));
  if (written > 0) return static_cast<size_t>(written);
  // Some file systems open files like this and then write none, or want larger multiples.
  if (written == 0 || errno != EINTR) direct_ = false;
  return 0;
}

bool AtomicFile::create() {
  fd_ = ::open(unfinished_.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
  if (fd_ < 0 && errno == EEXIST) {
    // Left by a process that was killed and had the same number, as in a container that started
    // again.
    remove_if_left(unfinished_);
    return false;
  }
  if (fd_ < 0) fail("write", errno);
  // remove_unfinished() of another process may have come between these two lines.
  struct stat made {};
  if (lock(fd_) != Lock::kHeld && ::fstat(fd_, &made) == 0 && made.st_nlink > 0) return true;
  ::close(std::exchange(fd_, -1));
  return false;
}

AtomicFile::~AtomicFile() {
  if (direct_fd_ >= 0) ::close(direct_fd_);
  if (fd_ < 0) return;
  ::unlink(unfinished_.c_str());
  ::close(fd_);
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

void AtomicFile::write_at(uint64_t offset, const void* data, size_t bytes) {
  if (offset > bytes_ || bytes > bytes_ - offset) {
    throw std::logic_error(str("AtomicFile of ", bytes_, " bytes was to write ", bytes, " at byte ",
                               offset, " of ", path_));
  }
  const auto* next = static_cast<const char*>(data);
  while (bytes > 0) {
    size_t done = write_direct(offset, next, bytes);
    if (done == 0) {
      const size_t most = std::min<size_t>(bytes, size_t{1} << 30);
      const ssize_t written = ::pwrite(fd_, next, most, static_cast<off_t>(offset));
      if (written < 0 && errno == EINTR) continue;
      if (written < 0) fail("write", errno);
      done = static_cast<size_t>(written);
      if (cache_ == Cache::kThrough && done >= kLeastSentOn) {
        // commit() finds what goes wrong.
        ::sync_file_range(fd_, static_cast<off_t>(offset), static_cast<off_t>(done),
                          SYNC_FILE_RANGE_WRITE);
      }
    }
    next += done;
    offset += done;
    bytes -= done;
  }
}

void AtomicFile::commit() {
  // The lock is held until the file has its own name: before, it looks like one that was left.
  if (::fsync(fd_) != 0 || ::rename(unfinished_.c_str(), path_.c_str()) != 0) fail("write", errno);
  if (::close(std::exchange(fd_, -1)) != 0 && errno != EINTR) fail("write", errno);
  // The rename is safe from a power cut once the folder is on the disk.
  if (const int reason = sync_folder(folder_); reason != 0) fail("sync the folder of", reason);
}

int64_t AtomicFile::remove_unfinished(const std::string& folder) {
  DIR* const open = ::opendir(folder.empty() ? "." : folder.c_str());
  if (open == nullptr && errno == ENOENT) return 0;
  if (open == nullptr) {
    throw CheckpointError(
        str("Cannot look into the folder ", folder, ": ", std::strerror(errno), "."));
  }
  std::vector<std::string> left;
  while (const dirent* const entry = ::readdir(open)) {
    if (is_unfinished_name(entry->d_name)) left.push_back(entry->d_name);
  }
  ::closedir(open);
  int64_t removed = 0;
  for (const auto& name : left) {
    removed += remove_if_left(folder.empty() ? name : folder + '/' + name) ? 1 : 0;
  }
  return removed;
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
